"""The functions of `kernels/` for PyTorch's tensors.

They read and write memory by the sizes that they are told, so every size is compared here with the tensors before the
call (`native_arguments`), and where something does not fit a method returns None: PyTorch is asked then, and serves, or
says what is wrong. `fused.kernels_for` has seen that tensors of the model's dtype are in memory and in one piece; these
methods see to the others.

Shapes: as in `fused`.
"""

import math
from types import SimpleNamespace
from typing import final

import torch

from .native_arguments import (
    MOST_ITERATIONS,
    angles_fit,
    as_token_ids,
    choice_fits,
    fits,
    fits_side_by_side,
    is_real,
    lies_in_rows,
    limit_fits,
    readable,
    seen,
)


def _experts_fit(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether tokens [N, d], choices [N, K] and experts [E, 2 I, d], [E, d, I] (of `dtype`, or that of x) are such."""
    if x.dim() != 2 or indices.dim() != 2 or down.dim() != 3 or not indices.shape[1]:
        return False
    (tokens, width), (experts, _, inner), dtype = x.shape, down.shape, dtype or x.dtype
    choices = fits(indices, torch.int64, tokens, indices.shape[1]) and fits(weights, torch.float32, *indices.shape)
    return choices and fits(gate_up, dtype, experts, 2 * inner, width) and fits(down, dtype, experts, width, inner)


@final
class Kernels:
    """The native functions for one dtype.

    All tensors are contiguous and of that dtype, where nothing else is said. All methods return None where what they
    are given does not fit.
    """

    def __init__(self, functions: SimpleNamespace):
        self.functions = functions

    def project(self, x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor] | None:
        """`x W^T` for up to four weights [n, d]: [..., d] -> [..., n] each."""
        width = x.shape[-1]
        if len(weights) > 4 or not all(each.dim() == 2 and each.shape[1] == width for each in weights):
            return None
        outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
        maps: list[int | None] = []
        for weight, output in zip(weights, outputs, strict=True):
            maps += [weight.data_ptr(), output.data_ptr(), weight.shape[0]]
        maps += [None, None, 0] * (4 - len(weights))
        self.functions.project(x.data_ptr(), x.numel() // width, width, *maps, torch.get_num_threads())
        return outputs

    def project_groups(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """[B, T, G, in] and weight [G out, in] -> [B, T, G, out]."""
        if x.dim() != 4 or weight.dim() != 2 or weight.shape[1] != x.shape[3] or weight.shape[0] % x.shape[2]:
            return None
        batch, tokens, groups, width = x.shape
        output = x.new_empty(batch, tokens, groups, weight.shape[0] // groups)
        sizes = (batch * tokens, groups, width, weight.data_ptr(), output.shape[-1])
        self.functions.project_groups(x.data_ptr(), *sizes, output.data_ptr(), torch.get_num_threads())
        return output

    def norm_rotate(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        first: int = 0,
        interleaved: bool = True,
        backwards: bool = False,
        norm_width: int = 0,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor | None:
        """Norms the first `norm_width` numbers of heads [B, T, H, D], then rotates P of them from `first` on.

        Args:
            cos, sin: [B or 1, T, P / 2].
            norm: [norm_width], the norm's weight, or None without one.
        """
        if x.dim() != 4 or not angles_fit(cos, sin, x.shape[0], x.shape[1]):
            return None
        width, heads = x.shape[-1], x.shape[-2]
        inside = 0 <= first <= width - 2 * cos.shape[2] and 0 <= norm_width <= width and is_real(eps)
        if not inside or (norm is not None and norm.shape != (norm_width,)):
            return None
        output = torch.empty_like(x)
        self.functions.norm_rotate(
            x.data_ptr(),
            output.data_ptr(),
            x.numel() // (width * heads),
            heads,
            width,
            None if norm is None else norm.data_ptr(),
            norm_width,
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[0] * cos.shape[1],
            2 * cos.shape[-1],
            first,
            interleaved,
            -1.0 if backwards else 1.0,
            torch.get_num_threads(),
        )
        return output

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
        """RMSNorm of [..., d]."""
        if weight.shape != x.shape[-1:] or not is_real(eps):
            return None
        output = torch.empty_like(x)
        width = x.shape[-1]
        self.functions.norm_rotate(
            *(x.data_ptr(), output.data_ptr(), x.numel() // width, 1, width, weight.data_ptr(), width, eps),
            *(None, None, 1, 0, 0, 0, 1.0, torch.get_num_threads()),
        )
        return output

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines [B, T, P / 2] of positions int64 [B, T] times frequencies fp32 [P / 2], times `scale`."""
        positions = positions.contiguous()
        known = fits(positions, torch.int64, *positions.shape) and positions.numel() > 0
        if not known or frequencies.dim() != 1 or not fits(frequencies, torch.float32, *frequencies.shape):
            return None
        pairs = frequencies.shape[0]
        cos = torch.empty(*positions.shape, pairs, dtype=dtype)
        sin = torch.empty_like(cos)
        sizes = positions.numel(), frequencies.data_ptr(), pairs, scale
        self.functions.angles(positions.data_ptr(), *sizes, cos.data_ptr(), sin.data_ptr())
        return cos, sin

    def attend_latents(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        kv_b: torch.Tensor,
        scaling: float,
        rank: int,
        nope: int,
        visible: torch.Tensor | None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Absorbed attention of MLA.

        Args:
            query: [B, T, H, D + P].
            cache: [B, S, R + P], rows side by side.
            kv_b: [H (D + D_v), R].
            visible: bool [B or 1, T, S], see `readable`; None: every query sees every key.
            chosen: int64 [B, T, K], the keys that a query reads, which `visible` is then about; None: all.

        Returns:
            [B, T, H D_v].
        """
        batch, tokens, heads, head = query.shape
        value_width, rotary = kv_b.shape[0] // heads - nope, head - nope
        sizes = kv_b.shape == (heads * (nope + value_width), rank) and value_width > 0 and nope >= 0 and rotary >= 0
        if not sizes or cache.dim() != 3 or not cache.shape[1]:
            return None
        read = cache.shape[1] if chosen is None else chosen.shape[-1]
        if not fits_side_by_side(cache, query.dtype, batch, cache.shape[1], rank + rotary):
            return None
        if not readable(visible, batch, tokens, read):
            return None
        if chosen is not None and not fits(chosen, torch.int64, batch, tokens, read):
            return None
        output = query.new_empty(batch, tokens, heads * value_width)
        done = self.functions.attend_latents(
            query.data_ptr(),
            cache.data_ptr(),
            cache.stride(0),
            cache.shape[-1],
            rank,
            read,
            cache.shape[1],
            None if chosen is None else chosen.data_ptr(),
            *seen(visible),
            kv_b.data_ptr(),
            nope,
            value_width,
            batch,
            tokens,
            heads,
            scaling,
            output.data_ptr(),
            torch.get_num_threads(),
        )
        return output if done else None

    def attend_shared(
        self, query: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor | None, sinks: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        """Attention with sinks [H] to one key per token, its value too: query [B, T, H, D], keys [B, S, D].

        What is `visible`: as in `attend_latents`.
        """
        batch, tokens, heads, width = query.shape
        if sinks.shape != (heads,) or keys.dim() != 3 or not readable(visible, batch, tokens, keys.shape[1]):
            return None
        if not fits_side_by_side(keys, query.dtype, batch, keys.shape[1], width):
            return None
        output = torch.empty_like(query)
        self.functions.attend_shared(
            *(query.data_ptr(), keys.data_ptr(), keys.stride(0), width, keys.shape[1], *seen(visible)),
            *(batch, tokens, heads, scaling, sinks.data_ptr(), output.data_ptr(), torch.get_num_threads()),
        )
        return output

    def attend_text(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor | None:
        """Attention of a text: query [B, H, T, D], key [B, H_kv, S, D], value [B, H_kv, S, D_v] -> [B, T, H, D_v].

        The numbers of a row stand side by side, rows anywhere.

        Args:
            visible: bool [B or 1, T, S], see `readable`; None: causal, and the last query stands at the last key.
        """
        batch, heads, tokens, width = query.shape
        kv_heads, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
        for each in (query, key, value):
            if not lies_in_rows(each, query.dtype):
                return None
        if key.shape != (batch, kv_heads, keys, width) or value.shape != (batch, kv_heads, keys, value_width):
            return None
        if heads % kv_heads or (tokens > keys if visible is None else not readable(visible, batch, tokens, keys)):
            return None
        output = query.new_empty(batch, tokens, heads, value_width)
        rows = [number for each in (query, key, value) for number in (each.data_ptr(), *each.stride()[:3])]
        sizes = batch, heads, heads // kv_heads, tokens, keys, width, value_width
        self.functions.attend_text(*rows, *seen(visible), *sizes, scaling, output.data_ptr(), torch.get_num_threads())
        return output

    def choose_keys(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        visible: torch.Tensor | None,
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The keys that an indexer chooses for every query.

        Args:
            query: [B, T, J, D]. keys: [B, S, D], rows side by side, S >= K.
            visible: as in `attend_latents`.
            hidden_states: [B, T, d], which with `weight` [J, d] give the weights of the heads (`head_weights`).

        Returns:
            int64 [B, T, K] in the order of the keys, and bool [B, T, K]: False for keys that are not visible, which
            fill up where less than K are.
        """
        batch, tokens, heads, width = query.shape
        query = query.contiguous()
        if not fits(query, hidden_states.dtype, batch, tokens, heads, width) or keys.dim() != 3:
            return None
        model_width = hidden_states.shape[-1]
        if hidden_states.shape != (batch, tokens, model_width) or weight.shape != (heads, model_width):
            return None
        if not fits_side_by_side(keys, hidden_states.dtype, batch, keys.shape[1], width):
            return None
        if not 1 <= top_k <= keys.shape[1] or not readable(visible, batch, tokens, keys.shape[1]):
            return None
        chosen = torch.empty(batch, tokens, top_k, dtype=torch.int64)
        sees = torch.empty(batch, tokens, top_k, dtype=torch.bool)
        self.functions.choose_keys(
            *(query.data_ptr(), keys.data_ptr(), keys.stride(0), hidden_states.data_ptr(), weight.data_ptr()),
            *(hidden_states.shape[2], *seen(visible), batch, tokens, heads, width, keys.shape[1], top_k),
            *(chosen.data_ptr(), sees.data_ptr(), torch.get_num_threads()),
        )
        return chosen, sees

    def route(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        choice: tuple[int | float, ...],
        bias: torch.Tensor | None,
        table: torch.Tensor | None,
        ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Logits fp32 [N, E], weights fp32 [N, K] and indices [N, K] of the experts that tokens [N, d] choose.

        Args:
            choice: top_k, n_group, topk_group, group_top, scoring (`SCORING_NUMBERS`), normalises, scale.
            bias: fp32 [E] or None. table: int64 [V, K], by which the token ids [N] alone choose, or None.
        """
        tokens, experts, top_k = x.shape[0], weight.shape[0], int(choice[0])
        if x.dim() != 2 or weight.shape != (experts, x.shape[1]) or not choice_fits(choice, experts, table is not None):
            return None
        if not is_real(choice[-1]):
            return None
        if bias is not None and not fits(bias, torch.float32, experts):
            return None
        vocabulary = 0
        if table is not None:
            ids, vocabulary = as_token_ids(ids, tokens), len(table)
            if ids is None or not fits(table, torch.int64, vocabulary, top_k):
                return None
        logits = torch.empty(tokens, experts)
        weights = torch.empty(tokens, top_k)
        indices = torch.empty(tokens, top_k, dtype=torch.int64)
        done = self.functions.route(
            *(x.data_ptr(), tokens, x.shape[1], weight.data_ptr(), None if bias is None else bias.data_ptr()),
            *(None if table is None else table.data_ptr(), vocabulary, None if ids is None else ids.data_ptr()),
            *(experts, *choice),
            *(logits.data_ptr(), weights.data_ptr(), indices.data_ptr(), torch.get_num_threads()),
        )
        return (logits, weights, indices) if done else None

    def mix_experts(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        limit: float | None,
    ) -> torch.Tensor | None:
        """Tokens [N, d] through their experts [N, K], weighted by fp32 [N, K] and added: [N, d]."""
        if not _experts_fit(x, indices, weights, gate_up, down) or not limit_fits(limit):
            return None
        output = torch.empty_like(x)
        done = self.functions.mix_channels(
            *(x.data_ptr(), x.shape[0], x.shape[1], indices.data_ptr(), weights.data_ptr(), indices.shape[1]),
            *(len(gate_up), gate_up.data_ptr(), down.data_ptr(), down.shape[2], None, None, None, 0),
            *(math.inf if limit is None else limit, output.data_ptr(), torch.get_num_threads()),
        )
        return output if done else None

    def mix_channels(
        self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, limit: float | None
    ) -> torch.Tensor | None:
        """Tokens [..., d] through one gated network, weights [I, d], [I, d] and [d, I]: [..., d]."""
        inner, width = len(gate), x.shape[-1]
        if (
            gate.shape != (inner, width)
            or up.shape != gate.shape
            or down.shape != (width, inner)
            or not limit_fits(limit)
        ):
            return None
        output = torch.empty_like(x)
        self.functions.mix_channels(
            *(x.data_ptr(), x.numel() // width, width, None, None, 0, 0, None, None, 0),
            *(gate.data_ptr(), up.data_ptr(), down.data_ptr(), gate.shape[0]),
            *(math.inf if limit is None else limit, output.data_ptr(), torch.get_num_threads()),
        )
        return output

    def read_streams(
        self,
        streams: torch.Tensor,
        fn: torch.Tensor,
        base: torch.Tensor,
        scale: torch.Tensor,
        norm_eps: float,
        eps: float,
        iterations: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """What a sub-layer reads of streams [B, T, n, d]: [B, T, d]; and its fp32 weights `StreamMixing`."""
        if streams.dim() != 4:
            return None
        batch, tokens, n, width = streams.shape
        rows = (2 + n) * n
        if fn.shape != (rows, n * width) or base.shape != (rows,) or scale.shape != (3,):
            return None
        if not 1 <= iterations <= MOST_ITERATIONS or not is_real(norm_eps) or not is_real(eps):
            return None
        post, residual = torch.empty(batch, tokens, n), torch.empty(batch, tokens, n, n)
        addresses = iterations, post.data_ptr(), residual.data_ptr()
        return self._sum_streams(streams, (fn, base, scale), norm_eps, eps, addresses), post, residual

    def collapse_streams(
        self, streams: torch.Tensor, weights: tuple[torch.Tensor, ...], norm_eps: float, eps: float
    ) -> torch.Tensor | None:
        """Streams [B, T, n, d] as one, [B, T, d], by `hc_fn`, `hc_base` and `hc_scale`."""
        n, width = streams.shape[2:]
        if [each.shape for each in weights] != [(n, n * width), (n,), (1,)]:
            return None
        if not is_real(norm_eps) or not is_real(eps):
            return None
        return self._sum_streams(streams, weights, norm_eps, eps, (0, None, None))

    def _sum_streams(self, streams, weights, norm_eps: float, eps: float, mixing: tuple) -> torch.Tensor:
        """`mixing`: Sinkhorn's steps, and where to write `post` and `residual`."""
        batch, tokens, n, width = streams.shape
        output = streams.new_empty(batch, tokens, width)
        iterations, *written = mixing
        self.functions.read_streams(
            *(streams.data_ptr(), batch * tokens, n, width, *(each.data_ptr() for each in weights)),
            *(norm_eps, eps, iterations, output.data_ptr(), *written, torch.get_num_threads()),
        )
        return output

    def write_streams(
        self, streams: torch.Tensor, output: torch.Tensor, post: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor | None:
        """Streams [B, T, n, d] after a sub-layer's output [B, T, d], by what `read_streams` gave."""
        batch, tokens, n, width = streams.shape
        if output.shape != (batch, tokens, width) or not fits(post, torch.float32, batch, tokens, n):
            return None
        if not fits(residual, torch.float32, batch, tokens, n, n):
            return None
        written = torch.empty_like(streams)
        self.functions.write_streams(
            *(streams.data_ptr(), output.data_ptr(), post.data_ptr(), residual.data_ptr()),
            *(batch * tokens, n, width, written.data_ptr()),
        )
        return written

    def project_int8(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, groups: int = 1
    ) -> torch.Tensor | None:
        """`x W^T` for an int8 weight [n, d] with fp32 scales [n]: [..., d] -> [..., n].

        With groups, as in `project_groups`: [..., G, in], weight [G out, in] and scales [G out] -> [..., G, out].
        """
        rows, width = weight.shape[0] // groups, x.shape[-1]
        if not fits(weight, torch.int8, groups * rows, width) or not fits(scale, torch.float32, groups * rows):
            return None
        if groups != 1 and (x.dim() < 2 or x.shape[-2] != groups):
            return None
        output = x.new_empty(*x.shape[:-1], rows)
        self.functions.project_int8(
            *(x.data_ptr(), x.numel() // (groups * width), groups, width, weight.data_ptr(), scale.data_ptr(), rows),
            *(output.data_ptr(), torch.get_num_threads()),
        )
        return output

    def mix_int8(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        gate_up_scale: torch.Tensor,
        down: torch.Tensor,
        down_scale: torch.Tensor,
        limit: float | None,
    ) -> torch.Tensor | None:
        """`mix_experts` by int8 weights with fp32 scales [E, 2 I] and [E, d]."""
        if not _experts_fit(x, indices, weights, gate_up, down, torch.int8) or not limit_fits(limit):
            return None
        scales_fit = fits(gate_up_scale, torch.float32, *gate_up.shape[:2])
        if not scales_fit or not fits(down_scale, torch.float32, *down.shape[:2]):
            return None
        output = torch.empty_like(x)
        matrices = gate_up, gate_up_scale, down, down_scale
        done = self.functions.mix_int8(
            *(x.data_ptr(), x.shape[0], x.shape[1], indices.data_ptr(), weights.data_ptr(), indices.shape[1]),
            *(
                len(gate_up),
                *[each.data_ptr() for each in matrices],
                down.shape[2],
                math.inf if limit is None else limit,
            ),
            *(output.data_ptr(), torch.get_num_threads()),
        )
        return output if done else None
