"""Channel mixing by DeepSeekMoE: many small routed experts, a few shared ones (arXiv 2401.06066, section 3).

    y = sum_{i chosen} g_i FFN_i(x) + FFN_shared(x)

How experts are scored (`scoring_func`) and chosen (`topk_method`) makes the routers of the generations:

    DeepSeekMoE  greedy                s = softmax(W x);  I = top-k of s
    V2           group_limited_greedy  s = softmax(W x);  keep the groups with the best expert;  I = top-k of s there
    V3           noaux_tc              s = sigmoid(W x);  z = s + b;  keep the groups with the largest sum of their
                                       two best z;  I = top-k of z there
    g_i = scale * s_i  or  s_i / sum_{j in I} s_j,  and in V3 scale * s_i / sum_{j in I} s_j

V3's bias b (arXiv 2412.19437, section 2.1.2) chooses and does not weigh. V4 scores by `s = sqrt(softplus(W x))`,
which does not saturate, and without groups; in its first layers I does not depend on s at all: a table says by which
experts a token id is processed (`HashRouter`).

The bias has no gradient: once per optimizer step it moves by a fixed speed towards equal load (arXiv 2408.15664),

    b_i += speed * sign(mean(c) - c_i),   c_i = tokens sent to expert i since the last step, over all ranks

Before V3 a loss keeps the load even (DeepSeekMoE, eqs 12-14): `alpha * sum_i f_i P_i`, f the share of tokens that an
expert gets and P its mean score.

Shapes: B batch, T tokens per sequence, N = B T tokens, E routed experts, K chosen experts per token, d width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .feed_forward import FeedForward, gated_activation
from .fused import FEW_TOKENS, PLAIN, SCORING_NUMBERS, SILU, kernels_for
from .host import host_can_read
from .memory import in_parts
from .precision import KeepsFloat32Buffers, float32_linear
from .products import fits_functions
from .sorted_experts import SortedExperts, sort_slots
from .unread_experts import mix_unread

SCORING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=-1),
    "sqrtsoftplus": ACT2FN["sqrtsoftplus"],
}

# Up to so many rows per expert, on average, a grouped product costs less than sorted ones. Milliseconds of one thread
# (Zen 5) by `python -m fathom.training.benchmark.experts`, forward / forward and backward, 4 of 16 experts chosen:
#
#                rows per expert         1              4             16             64            256            1024
#   fp32, d=256         sorted   0.80 / 3.3    1.1 / 4.6     1.3 / 5.2      2.2 / 7.9     5.7 / 21       22 / 86
#                      grouped   0.20 / 0.6    0.4 / 1.4     0.9 / 3.2      2.8 / 9.3     12 / 35        82 / 153
#   bf16, d=256         sorted   0.85 / 3.2    1.0 / 3.8     1.1 / 4.3      1.7 / 6.7     4.1 / 15       13 / 44
#                      grouped   0.47 / 1.6    0.6 / 1.9     0.8 / 2.7      1.5 / 5.6     5.3 / 16       26 / 69
#   fp32, d=768         sorted   4.3 / 16      5.9 / 21      7.1 / 24       14 / 45       43 / 132       160 / 527
#                      grouped   3.0 / 26      6.1 / 17      10 / 29        25 / 89       106 / 284      462 / 1133
#
# The loop (`eager`) is nearly everywhere behind the better of both, a batched product (`batched_mm`) from 2 tokens on.
GROUPED_ROWS = 64


class ExpertRouter(KeepsFloat32Buffers):
    """Scores the experts in fp32 and weighs the K chosen ones; how they are chosen is up to the subclass.

    It also holds the load of its experts since the last bias update.
    """

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        # `MoEGate` of DeepSeek-V2's modeling_deepseek.py scales or normalises, those of V3 and V4 do both.
        scales_always = config.topk_method == "noaux_tc"
        self.norm_topk_prob = config.norm_topk_prob and (scales_always or self.top_k > 1)
        self.routed_scaling_factor = config.routed_scaling_factor if scales_always or not self.norm_topk_prob else 1.0
        self.affinities = SCORING[config.scoring_func]
        self.scoring_func = config.scoring_func
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        # No buffer: DDP would overwrite it with rank 0's counts at every forward.
        self.expert_load: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [N, d] and their ids [N] -> logits [N, E], weights [N, K] and indices [N, K] of the chosen experts."""
        kernels = kernels_for(self.training, len(hidden_states), hidden_states, self.weight)
        routed = kernels and kernels.route(hidden_states, self.weight, *self.fused_choice(input_ids))
        if routed is not None:
            return routed
        # In bf16 near ties would be routed by rounding.
        logits = in_parts(partial(float32_linear, weight=self.weight), hidden_states)  # [N, E]
        scores = self.affinities(logits)
        indices = self.choose(scores, input_ids)
        weights = scores.gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices

    def choose(self, scores: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """Scores [N, E] and token ids [N] -> experts [N, K], all different in a row."""
        raise NotImplementedError

    def fused_choice(self, input_ids: torch.Tensor | None) -> tuple:
        """What `fused.Kernels.route` takes behind the weight: the numbers of the choice, bias, table and token ids."""
        raise NotImplementedError

    @torch.no_grad()
    def add_load(self, expert_counts: torch.Tensor) -> None:
        """Adds one forward's `expert_counts` [E] to the load that the next bias update looks at."""
        expert_counts = expert_counts.float()  # what is averaged and reduced over ranks
        self.expert_load = expert_counts if self.expert_load is None else self.expert_load + expert_counts


class TopKRouter(ExpertRouter):
    """Chooses the K experts with the best scores, by `topk_method`, and holds the routing bias if there is one."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config):
        super().__init__(config)
        biased = config.topk_method == "noaux_tc"
        self.n_group = 1 if config.topk_method == "greedy" else config.n_group
        self.topk_group = config.topk_group
        self.group_top = 2 if biased else 1
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if biased else None
        self.register_buffer("e_score_correction_bias", bias)

    def choose(self, scores: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        biased = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        if self.n_group > 1:
            biased = self._keep_best_groups(biased)
        return biased.topk(self.top_k, dim=-1, sorted=False).indices  # [N, K]

    def fused_choice(self, input_ids: torch.Tensor | None) -> tuple:
        groups = self.n_group, self.topk_group, self.group_top
        weighing = SCORING_NUMBERS[self.scoring_func], self.norm_topk_prob, self.routed_scaling_factor
        return (self.top_k, *groups, *weighing), self.e_score_correction_bias, None, None

    def _keep_best_groups(self, biased: torch.Tensor) -> torch.Tensor:
        """Sets the scores of all but `topk_group` groups to -inf; a group counts by its best, or its best two."""
        grouped = biased.unflatten(-1, (self.n_group, -1))  # [N, groups, E / groups]
        group_scores = grouped.topk(self.group_top, dim=-1).values.sum(dim=-1)
        best = group_scores.topk(self.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)
        return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)

    @torch.no_grad()
    def update_bias(self, load: torch.Tensor, speed: float, recenter: bool = False) -> None:
        """Moves the bias of overloaded experts down and of underloaded ones up by `speed`. `load` is [E].

        With `recenter` the mean of the moves is taken off them, so that the biases keep their mean; the choice of
        experts is the same.
        """
        if self.e_score_correction_bias is not None:
            move = speed * torch.sign(load.mean() - load)
            self.e_score_correction_bias += move - move.mean() if recenter else move


class HashRouter(ExpertRouter):
    """Chooses experts by the token's id: `tid2eid` [V, K] is fixed, saved with the weights, and never learned.

    How DeepSeek made its table is not published. `balanced_table` is ours: over any E consecutive ids every expert is
    chosen exactly K times. The ids of a BPE vocabulary are in order of frequency, so experts of a layer get about
    equal shares of the tokens as well.
    """

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config)
        self.seed = layer_idx
        self.tid2eid: torch.Tensor
        self.register_buffer("tid2eid", torch.zeros(config.vocab_size, self.top_k, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_check_table)

    def choose(self, scores: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        return self.tid2eid[input_ids]

    def fused_choice(self, input_ids: torch.Tensor | None) -> tuple:
        weighing = SCORING_NUMBERS[self.scoring_func], self.norm_topk_prob, self.routed_scaling_factor
        return (self.top_k, 1, 1, 1, *weighing), None, self.tid2eid, input_ids

    @torch.no_grad()
    def check_table(self, name: str = "") -> None:
        """Makes a table that was loaded int64, which indices have to be.

        Args:
            name: the router's, for the message.

        Raises:
            ValueError: it does not hold the numbers of experts that there are.
        """
        table, what = self.tid2eid, f"{name}.tid2eid".lstrip(".")
        if table.is_meta:
            return
        if table.is_floating_point() or table.is_complex() or table.dtype is torch.bool:
            raise ValueError(f"{what} is {table.dtype}; it must hold the numbers of experts, as int64")
        if table.shape[1:] != (self.top_k,):
            raise ValueError(
                f"{what} is {list(table.shape)}; a row must have num_experts_per_tok = {self.top_k} experts"
            )
        wrong = table[(table < 0) | (table >= self.num_experts)]
        if len(wrong):
            raise ValueError(f"{what} names expert {int(wrong[0])}; there are experts 0 to {self.num_experts - 1}")
        self.tid2eid = table.to(torch.int64)

    @torch.no_grad()
    def reset_table(self) -> None:
        init.copy_(self.tid2eid, balanced_table(len(self.tid2eid), self.top_k, self.num_experts, self.seed))

    @torch.no_grad()
    def resize_table(self, vocab_size: int) -> None:
        """Adds rows for new token ids, or drops those of removed ones."""
        table = balanced_table(vocab_size, self.top_k, self.num_experts, self.seed).to(self.tid2eid.device)
        kept = min(vocab_size, len(self.tid2eid))
        table[:kept] = self.tid2eid[:kept]
        self.tid2eid = table


def _check_table(router: HashRouter, _) -> None:
    router.check_table()


def balanced_table(vocab_size: int, top_k: int, num_experts: int, seed: int) -> torch.Tensor:
    """K different experts for every token id, int64 [V, K]; the same for the same seed, on every machine.

    Ids are taken E at a time. Within such a block id j goes to the experts `(p[j] + s_k) mod E` for a random
    permutation p and K different shifts s_k, hence K times to every expert.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = -(-vocab_size // num_experts)

    def permutations() -> torch.Tensor:
        return torch.rand(blocks, num_experts, generator=generator, device="cpu").argsort(dim=-1)

    places, shifts = permutations(), permutations()[:, :top_k]
    table = (places.unsqueeze(2) + shifts.unsqueeze(1)) % num_experts  # [blocks, E, K]
    return table.flatten(0, 1)[:vocab_size].contiguous()


@use_experts_implementation
class RoutedExperts(nn.Module):
    """E SwiGLU experts as two 3-D parameters, so that one kernel can run them all.

    `forward` is the readable reference (`experts_implementation="eager"`); transformers' decorator dispatches to
    the others: `sorted_mm` below, its own grouped products. On disk every expert has tensors of its own (see
    `conversion`).
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        inner = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, inner))
        self.act_fn = ACT2FN[config.hidden_act]
        self.swiglu_limit = config.swiglu_limit
        self.register_load_state_dict_pre_hook(_fuse_experts)

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tokens [N, d], chosen experts [N, K] and their weights [N, K] -> [N, d]."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(indices == expert)
            inner = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            expert_output = F.linear(inner, self.down_proj[expert])
            weighted = expert_output * weights[token, slot, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 I] -> [..., I]. transformers' grouped kernels call it by this name."""
        gate, up = gate_up.chunk(2, dim=-1)
        return gated_activation(gate, up, self.act_fn, self.swiglu_limit)


def sorted_mm_experts_forward(
    experts: RoutedExperts, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same as `RoutedExperts.forward`, with the tokens of an expert side by side. The fast way everywhere.

    On a CPU the numbers of rows are known. Where experts have few rows, grouped products cost less (`GROUPED_ROWS`),
    and single tokens are best read one by one. An accelerator would be waited for: see `unread_experts`.

    A grouped product runs in the dtype of the weights, so autocast does not reach it; plain products do follow
    it. Whole parameters are cast and unbound: indexing them one by one would fill a gradient of all experts for
    each expert.
    """
    device, slots, compiles = hidden_states.device.type, indices.numel(), torch.compiler.is_compiling()
    few = not torch.is_grad_enabled() and len(indices) <= FEW_TOKENS and device == "cpu"
    if compiles and few and not experts._is_expert_parallel:
        return _experts_in_one_loop(experts, hidden_states, indices, weights)
    # A grouped product's rows have to fill whole 16 bytes, and it knows no float64.
    known = experts.gate_up_proj.dtype != torch.float64
    whole = known and not (experts.gate_up_proj.shape[-1] % 8 or experts.down_proj.shape[-1] % 8)
    # Expert parallelism marks the tokens of other ranks by an index beyond the last expert, as the kernels expect.
    if device == "cpu" and whole and (experts._is_expert_parallel or compiles or not slots):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, indices, weights)
    if not host_can_read(hidden_states) or experts._is_expert_parallel or not slots:
        return mix_unread(experts, hidden_states, indices, weights, _dtype_of_products(hidden_states))
    if isinstance(experts.act_fn, SILU):
        parameters = experts.gate_up_proj, experts.down_proj
        kernels = kernels_for(experts.training, len(hidden_states), hidden_states, *parameters, any_text=True)
        output = kernels and kernels.mix_experts(hidden_states, indices, weights, *parameters, experts.swiglu_limit)
        if output is not None:
            return output
    if not torch.is_grad_enabled() and 2 * slots <= experts.num_experts:
        return _experts_one_by_one(experts, hidden_states, indices, weights)
    if slots <= GROUPED_ROWS * experts.num_experts and whole and not torch.is_autocast_enabled(device):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, indices, weights)
    differentiable_twice = torch.is_grad_enabled() and not experts.training
    if _is_swiglu(experts) and fits_functions() and not differentiable_twice:
        return in_parts(partial(_one_after_another, experts), hidden_states, indices, weights)
    return in_parts(partial(_sorted_experts, experts), hidden_states, indices, weights)


def _dtype_of_products(hidden_states: torch.Tensor) -> torch.dtype:
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


def _one_after_another(
    experts: RoutedExperts, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    dtype = _dtype_of_products(hidden_states)
    learning = hidden_states, weights, experts.gate_up_proj, experts.down_proj
    return SortedExperts.apply(*learning, indices, experts.swiglu_limit, dtype, torch.is_grad_enabled())


def _is_swiglu(experts: RoutedExperts) -> bool:
    """Whether these are SwiGLU experts with plain weights."""
    plain = type(experts.gate_up_proj) in PLAIN and type(experts.down_proj) in PLAIN
    return plain and isinstance(experts.act_fn, SILU)


def _sorted_experts(
    experts: RoutedExperts, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    dtype = _dtype_of_products(hidden_states)
    slots = sort_slots(indices, experts.num_experts, fill=dtype != torch.float32)
    rows, token = slots.rows, slots.token
    # Weighing the inner activations instead of the outputs is the same and touches fewer numbers.
    weights = slots.arrange(weights.to(dtype))
    # Not by brackets, whose gradient is added up number by number.
    grouped = hidden_states.to(dtype).index_select(0, token).split(rows)
    each_weights = weights.unsqueeze(1).split(rows)
    gate_ups, downs = experts.gate_up_proj.to(dtype).unbind(), experts.down_proj.to(dtype).unbind()
    outputs = []
    for expert, count in enumerate(rows):
        if count:
            inner = experts._apply_gate(F.linear(grouped[expert], gate_ups[expert]))
            outputs.append(F.linear(inner * each_weights[expert], downs[expert]))
    return torch.zeros_like(hidden_states).index_add(0, token, torch.cat(outputs).to(hidden_states.dtype))


def _experts_one_by_one(
    experts: RoutedExperts, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same for a few tokens and without gradients: each slot by itself costs less than sorting them."""
    chosen, rows = indices.flatten().tolist(), hidden_states.split(1)
    top_k = indices.shape[1]
    gate_up = [F.linear(rows[slot // top_k], experts.gate_up_proj[expert]) for slot, expert in enumerate(chosen)]
    inner = experts._apply_gate(torch.cat(gate_up))  # [N K, I]
    inner = (inner * weights.to(inner.dtype).view(-1, 1)).split(1)
    outputs = [F.linear(row, experts.down_proj[expert]) for row, expert in zip(inner, chosen, strict=True)]
    return torch.cat(outputs).view(*indices.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _experts_in_one_loop(
    experts: RoutedExperts, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same for a compiled step of a few tokens on a CPU: gathering, product and sum become one loop over weights.

    Grouped products there are one by one, those of experts without tokens too. Without compilation this would copy the
    weights of all chosen experts.
    """
    inner = (experts.gate_up_proj[indices].float() * hidden_states[:, None, None].float()).sum(dim=-1)  # [N, K, 2 I]
    inner = experts._apply_gate(inner) * weights.unsqueeze(-1)
    outputs = (experts.down_proj[indices].float() * inner.unsqueeze(2)).sum(dim=-1)  # [N, K, d]
    return outputs.sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("sorted_mm", sorted_mm_experts_forward)


def _fuse_experts(module: RoutedExperts, state_dict: dict, prefix: str, *_) -> None:
    """Lets `load_state_dict` read per-expert tensors.

    `from_pretrained` fuses them by the conversion mapping; Trainer's resume and best-model reload call
    `load_state_dict(strict=False)` on the file itself and would silently keep the old experts.
    """
    if f"{prefix}0.gate_proj.weight" not in state_dict:
        return

    def take(name: str) -> list[torch.Tensor]:
        return [state_dict.pop(f"{prefix}{expert}.{name}.weight") for expert in range(module.num_experts)]

    gates, ups, downs = take("gate_proj"), take("up_proj"), take("down_proj")
    state_dict[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    state_dict[f"{prefix}down_proj"] = torch.stack(downs)


class MixtureOfExperts(nn.Module):
    """Router, routed experts and shared experts (stored as one network of their joint width)."""

    def __init__(self, config, layer_idx: int = 0):
        super().__init__()
        # Not read from `gate`: an adapter may stand in its place.
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.affinities = SCORING[config.scoring_func]
        self.seq_aux_loss_coef = config.seq_aux_loss_coef
        self.aux_loss_alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.gate = self.make_router(config, layer_idx)
        self.experts = RoutedExperts(config)
        self.shared_experts = (
            FeedForward(config, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def make_router(self, config, layer_idx: int) -> ExpertRouter:
        return TopKRouter(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Mixes channels, and reports how the tokens were routed.

        Args:
            hidden_states: [B, T, d].
            token_mask: [B, T], True for real tokens; padding is routed but not counted. None: all are real.
            input_ids: [B, T], what a hash router routes by.

        Returns:
            Output [B, T, d]; tokens per expert [E]; weighted balance losses, in training only.
        """
        tokens = hidden_states.flatten(0, 1)  # [N, d]
        logits, weights, indices = self.gate(tokens, None if input_ids is None else input_ids.flatten())
        output = self.experts(tokens, indices, weights).view_as(hidden_states)
        if (shared := self.shared_experts) is not None:
            add = partial(_add_shared_experts, shared)
            # A hook on them is called once, with all tokens.
            hooked = shared._forward_hooks or shared._forward_pre_hooks
            output = add(output, hidden_states) if hooked else in_parts(add, output, hidden_states, into=output)

        counts = count_tokens(indices, self.num_experts, None if token_mask is None else token_mask.flatten())
        balance_loss = None
        if self.training and (self.seq_aux_loss_coef or self.aux_loss_alpha):
            sequences = hidden_states.shape[:2]
            scores = self.affinities(logits).unflatten(0, sequences)
            balance_loss = self.balance_loss(scores, indices.unflatten(0, sequences), token_mask)
        return output, counts, balance_loss

    def balance_loss(
        self, scores: torch.Tensor, indices: torch.Tensor, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The weighted losses that are switched on, for affinities [B, T, E] and chosen experts [B, T, K]."""
        loss = scores.new_zeros(())
        if self.seq_aux_loss_coef:
            loss = loss + self.seq_aux_loss_coef * sequence_balance_loss(scores, self.top_k, token_mask)
        if self.aux_loss_alpha:
            if not self.seq_aux:  # the whole batch as one sequence
                scores, indices = scores.flatten(0, 1).unsqueeze(0), indices.flatten(0, 1).unsqueeze(0)
                token_mask = None if token_mask is None else token_mask.flatten().unsqueeze(0)
            loss = loss + self.aux_loss_alpha * expert_balance_loss(scores, indices, token_mask)
        return loss


class HashMixtureOfExperts(MixtureOfExperts):
    """A mixture whose experts are chosen by token id. Nothing is to be balanced by learning, so it has no loss."""

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.seq_aux_loss_coef = self.aux_loss_alpha = 0.0

    def make_router(self, config, layer_idx: int) -> ExpertRouter:
        return HashRouter(config, layer_idx)


def _add_shared_experts(shared: nn.Module, routed: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """What routed experts made of tokens [B, T, d], and what shared ones make of them."""
    return routed + shared(hidden_states)


def count_tokens(indices: torch.Tensor, num_experts: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens per expert: chosen experts [T, K] -> counts [E], or of each sequence, [B, T, K] -> [B, E].

    Padding, where `token_mask` [T] or [B, T] is not True, is left out.
    """
    chosen = indices.flatten(-2)
    if token_mask is None and chosen.dim() == 1 and host_can_read(chosen):
        return chosen.bincount(minlength=num_experts)
    if token_mask is None:
        tokens = torch.ones_like(chosen)
    else:
        tokens = token_mask.to(chosen.dtype).unsqueeze(-1).expand_as(indices).flatten(-2)
    counts = chosen.new_zeros(*chosen.shape[:-1], num_experts)
    return counts.scatter_add_(-1, chosen, tokens)


def expert_balance_loss(
    scores: torch.Tensor, indices: torch.Tensor, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """DeepSeekMoE's expert-level balance loss (arXiv 2401.06066, eqs 12-14), mean over sequences.

    `sum_i f_i P_i` with `f_i = E / (K T) * tokens sent to expert i` (without gradient) and `P_i` the mean over tokens
    of the scores normalised to 1 (softmax scores are so already). It is 1 when all experts are equally loaded.

    Args:
        scores: non-negative affinities [B, T, E].
        indices: chosen experts [B, T, K].
        token_mask: [B, T], True for real tokens. None: all are real.
    """
    mask = torch.ones_like(scores[..., 0]) if token_mask is None else token_mask.to(scores.dtype)  # [B, T]
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
    counts = count_tokens(indices, scores.shape[-1], token_mask)
    fraction = counts * scores.shape[-1] / (indices.shape[-1] * length)  # [B, E]
    normalised = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20) * mask.unsqueeze(-1)
    return (fraction * normalised.sum(dim=1) / length).sum(dim=-1).mean()


def sequence_balance_loss(scores: torch.Tensor, top_k: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """DeepSeek-V3's sequence-wise balance loss (arXiv 2412.19437, eqs 17-20), mean over sequences.

    The expert-level loss of tokens sent to their K largest scores, as if there were no bias and no groups.

    Args:
        scores: non-negative affinities [B, T, E].
        top_k: K.
        token_mask: [B, T], True for real tokens. None: all are real.
    """
    return expert_balance_loss(scores, scores.topk(top_k, dim=-1).indices, token_mask)
