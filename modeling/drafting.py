"""Draft decoding: MTP layers guess the next tokens, one forward of the main model checks them all.

`generate(use_mtp=True)`, or `use_mtp` in the generation config. A step reads the newest token and K drafts, K being the
number of MTP layers, and so knows the main model's choice after each of them. As many drafts as agree are kept, and one
more token, the main model's own. Greedy decoding gives the text of plain decoding. Sampling gives its distribution
(arXiv 2211.17192): a draft x, drawn from q, is kept with probability min(1, p(x) / q(x)), and the first that is not is
replaced by a draw from max(p - q, 0), normalised.

Rows of a batch keep different numbers of drafts. A draft that only its own row refuses stays in the caches as padding;
columns that are padding in every row are cropped.

The first steps do without drafts, to know what plain decoding costs here. Where steps with drafts take longer per
token, there are no more of them. So with sampling a seed may give another text where a machine is busier.

MTP layers have caches of their own. At depth k a token's entry needs the token k ahead, which for the last K - 1
tokens is a draft: these are read again in the next step.

Shapes: B batch, T tokens read at once, K depths, V vocabulary, C columns of the texts.
"""

import statistics
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from .cache import FathomDynamicCache, cache_layer
from .fused import project

PLAIN_STEPS = 3  # whose median is the cost of plain decoding
DRAFT_STEPS = 16  # that are looked back on to compare with it


@dataclass
class DraftDecodingOutput(GenerateDecoderOnlyOutput):
    """What `generate(use_mtp=True, return_dict_in_generate=True)` returns.

    Args:
        sequences: [B, C].
        past_key_values: the main model's cache, without the newest token; None with several rows, whose caches hold
            padding between tokens.
        forwards: forwards of the main model, the prompt's included.
        drafted_tokens, accepted_tokens: drafts in all rows, and how many of them were kept.
    """

    forwards: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None


class DraftCache(FathomDynamicCache):
    """Cache of the MTP layers, whose indices follow those of the main layers."""

    def __init__(self, config):
        super().__init__()
        self.first = config.num_hidden_layers
        self.layers = [cache_layer(config, self.first + depth) for depth in range(config.num_nextn_predict_layers)]

    def layer(self, layer_idx: int):
        return super().layer(layer_idx - self.first)

    def fetch(self, layer_idx: int, device: torch.device):
        return super().fetch(layer_idx - self.first, device)

    def release(self, layer_idx: int) -> None:
        super().release(layer_idx - self.first)

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return super().update(key_states, value_states, layer_idx - self.first, *args, **kwargs)


class Columns:
    """A cache, and which of its columns hold tokens of which row."""

    def __init__(self, cache: Cache, real: torch.Tensor):
        self.cache = cache
        self.real = real  # bool [B, columns]
        cache.activate_past_recording()

    def extend(self, real: torch.Tensor) -> torch.Tensor | None:
        """Says which of the next tokens [B, T] are real, and returns the attention mask; None if nothing is padding."""
        self.real = torch.cat((self.real, real), dim=1)
        return None if self.real.all() else self.real.long()

    def forget(self, refused: torch.Tensor) -> None:
        """Turns those of the newest tokens into padding that `refused` says, bool [B, T]."""
        if not refused.any():
            return
        everywhere = refused.all(dim=0).tolist()
        trailing = sum(1 for _ in takewhile(bool, reversed(everywhere)))
        self.real[:, self.real.shape[1] - refused.shape[1] :] &= ~refused
        self.real = self.real[:, : self.real.shape[1] - trailing]
        for layer in self.cache.layers:
            layer.hide(refused)
        self.cache.crop(-trailing)


class MainOutput(NamedTuple):
    """What the MTP layers read of T tokens."""

    states: torch.Tensor  # [B, T, ...], the main model's `final_states`
    columns: torch.Tensor  # [B, T], where the tokens stand in the texts
    positions: torch.Tensor  # [B, T]
    real: torch.Tensor  # bool [B, T]


class DraftDecoder:
    """One call of `generate`.

    Args:
        model: a `FathomForCausalLM` with MTP layers.
        input_ids: [B, T], padded on the left; with `inputs_embeds` and without ids [B, 0].
        position_ids: of the prompt and of what the cache holds before it, [B or 1, P + T].
        attention_mask: the same, 1 for real tokens [B, P + T], or None.
    """

    def __init__(
        self,
        model,
        input_ids: torch.Tensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        past_key_values: Cache,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ):
        self.model = model
        self.process = logits_processor
        self.stops = stopping_criteria
        self.samples = generation_config.do_sample
        self.depths = model.config.num_nextn_predict_layers
        self.drafting = True
        batch, device = input_ids.shape[0], input_ids.device

        # The texts; behind `lengths` stand the drafts.
        room = generation_config.max_length - input_ids.shape[1] + self.depths
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.texts = torch.cat((input_ids, input_ids.new_full((batch, room), self.pad)), dim=1)
        self.lengths = torch.full((batch,), input_ids.shape[1], device=device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.draft_probabilities: list[torch.Tensor] = []

        past = int(past_key_values.get_seq_length())
        length = position_ids.shape[1] - past
        self.prompt_embeds = inputs_embeds
        self.prompt_columns = torch.arange(length, device=device).expand(batch, -1) + (input_ids.shape[1] - length)
        self.prompt_positions = position_ids[:, past:].expand(batch, -1)
        # From now on rows advance together in columns and positions.
        self.offset = self.prompt_positions[:, -1] - self.prompt_columns[:, -1]
        real = torch.ones(batch, past + length, dtype=torch.bool, device=device)
        real = real if attention_mask is None else attention_mask.bool()
        self.prompt_real = real[:, past:]
        self.main = Columns(past_key_values, real[:, :past])
        self.drafts = Columns(DraftCache(model.config), real[:, :0])
        # What the MTP layers have not read yet: with several depths also what they read again, at the beginning.
        self.unread: list[MainOutput] = []
        self.figures = {"forwards": 0, "drafted_tokens": 0, "accepted_tokens": 0}
        # Seconds and tokens of the steps so far.
        self.plain_steps: list[tuple[float, int]] = []
        self.draft_steps: list[tuple[float, int]] = []

    def run(self, streamer=None) -> DraftDecodingOutput:
        self.read_prompt(streamer)
        while self.alive.any():
            self.step(streamer)
        if streamer is not None:
            streamer.end()
        alone = len(self.texts) == 1
        texts = self.texts[:, : int(self.lengths.max())]
        drafts = torch.arange(texts.shape[1], device=texts.device) >= self.lengths[:, None]
        return DraftDecodingOutput(
            sequences=texts.masked_fill(drafts, self.pad),
            past_key_values=self.main.cache if alone else None,  # type: ignore[arg-type]
            **self.figures,
        )

    def read_prompt(self, streamer) -> None:
        """Reads the prompt, and chooses the first token."""
        states, logits = self.read(self.prompt_columns, self.prompt_positions, self.prompt_real, self.prompt_embeds, 1)
        tokens, _ = self.choose(self.scores(logits))
        self.accept(tokens, torch.zeros_like(self.lengths), streamer)
        # Of a prompt given by embeddings only the last token's successor is known.
        known = self.prompt_columns[0] >= -1
        whole = (states, self.prompt_columns, self.prompt_positions, self.prompt_real)
        prompt = MainOutput(*(each[:, known] for each in whole))
        if self.depths > 1:
            # The MTP layers read the last tokens again: before the first there are none.
            first = MainOutput(*(each[:, :1].repeat_interleave(self.depths - 1, dim=1) for each in prompt))
            self.unread = [first._replace(real=torch.zeros_like(first.real))]
        self.draft(prompt, torch.full_like(self.lengths, prompt.columns.shape[1] - 1))

    def step(self, streamer) -> None:
        """Checks the drafts, accepts what agrees, and drafts again."""
        start, before = perf_counter(), int(self.lengths.sum())
        depths = self.depths if self.has_drafts() else 0
        columns = self.lengths[:, None] - 1 + torch.arange(depths + 1, device=self.lengths.device)
        positions = columns + self.offset[:, None]
        states, logits = self.read(columns, positions, self.alive[:, None].expand_as(columns), None, depths + 1)
        tokens, kept = self.choose(self.scores(logits))
        self.figures["drafted_tokens"] += int(self.alive.sum()) * depths
        self.accept(tokens, kept, streamer)
        # The newest token is not in the cache; a row that has stopped before its last draft did not keep the others.
        real = columns < self.lengths[:, None] - 1
        self.figures["accepted_tokens"] += int(real[:, 1:].sum())
        self.main.forget(~real)
        gained = int(self.lengths.sum()) - before
        if not depths:
            self.plain_steps.append((perf_counter() - start, gained))
        self.draft(MainOutput(states, columns, positions, real), kept)
        if depths:
            self.draft_steps.append((perf_counter() - start, gained))
            self.drafting = self.drafts_pay()

    def has_drafts(self) -> bool:
        """Whether drafts stand behind the texts."""
        return self.drafting and len(self.plain_steps) >= PLAIN_STEPS

    def drafts_pay(self) -> bool:
        """Whether the last steps with drafts took less time per token than plain ones."""
        recent = self.draft_steps[-DRAFT_STEPS:]
        if len(recent) < DRAFT_STEPS or not self.plain_steps:
            return True
        seconds, tokens = (sum(column) for column in zip(*recent, strict=True))
        return seconds / tokens < statistics.median(seconds / tokens for seconds, tokens in self.plain_steps)

    def read(
        self,
        columns: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor,
        embeds: torch.Tensor | None,
        logits: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the main model: its `final_states`, and the last `logits` tokens' logits in fp32."""
        # Of a prompt given by embeddings, only hash layers want the ids too, if there are any.
        wanted = embeds is None or (self.model.model.routes_by_id and int(columns.min()) >= 0)
        outputs = self.model.model(
            input_ids=self.texts.gather(1, columns) if wanted else None,
            inputs_embeds=embeds,
            attention_mask=self.main.extend(real),
            position_ids=positions,
            past_key_values=self.main.cache,
            use_cache=True,
        )
        self.figures["forwards"] += 1
        (newest,) = project(outputs.last_hidden_state[:, -logits:], self.model.lm_head)
        return outputs.final_states, newest.float()

    def scores(self, logits: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Logits [B, T, V] after the processors, every one with the text before it, drafts included."""
        if not self.process:
            return logits
        processed = torch.empty_like(logits)
        # All rows at once, as processors may know the rows, and one text length after the other.
        ends = self.lengths[:, None] + torch.arange(first, first + logits.shape[1], device=logits.device)
        for end in ends.unique().tolist():
            rows, columns = (ends == end).nonzero(as_tuple=True)
            whole = logits[:, 0].clone()
            whole[rows] = logits[rows, columns]
            processed[rows, columns] = self.process(self.texts[:, :end], whole)[rows]
        return processed

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens by the scores [B, K + 1, V] that follow the newest token and the K drafts.

        Returns:
            Tokens [B, K + 1], of which those up to the number of kept drafts [B] count.
        """
        depths = scores.shape[1] - 1
        drafts = self.texts.gather(1, self.lengths[:, None] + torch.arange(depths, device=scores.device))
        if not self.samples:
            tokens = scores.argmax(dim=-1)
            return tokens, (tokens[:, :depths] == drafts).long().cumprod(dim=1).sum(dim=1)
        p = scores.softmax(dim=-1)
        q = torch.zeros_like(p)
        if depths:
            q[:, :depths] = torch.stack(self.draft_probabilities, dim=1)
        chances = torch.rand(drafts.shape, device=p.device) * q[:, :depths].gather(2, drafts[..., None])[..., 0]
        agreed = chances < p[:, :depths].gather(2, drafts[..., None])[..., 0]
        kept = agreed.long().cumprod(dim=1).sum(dim=1)
        at = kept[:, None, None].expand(-1, 1, p.shape[-1])
        rest = (p - q).clamp(min=0).gather(1, at)[:, 0]
        # Where p and q differ by rounding alone, nothing may be left of it.
        rest = torch.where(rest.any(dim=-1, keepdim=True), rest, p.gather(1, at)[:, 0])
        tokens = torch.cat((drafts, drafts.new_zeros(len(drafts), 1)), dim=1)
        return tokens.scatter(1, kept[:, None], rest.multinomial(1)), kept

    def accept(self, tokens: torch.Tensor, kept: torch.Tensor, streamer) -> None:
        """Puts the kept drafts and the main model's token into the texts, up to where a row stops."""
        for row in self.alive.nonzero().flatten().tolist():
            start = int(self.lengths[row])
            for end, token in enumerate(tokens[row, : int(kept[row]) + 1].tolist(), start + 1):
                self.texts[row, end - 1] = token
                if self.stops(self.texts[row : row + 1, :end], None).item():
                    self.alive[row] = False
                    break
            self.lengths[row] = end
            if streamer is not None:
                streamer.put(self.texts[row, start:end].cpu())

    def draft(self, output: MainOutput, last: torch.Tensor) -> None:
        """Lets the MTP layers read what the main model has read, and writes their drafts behind the texts.

        Args:
            last: [B], index of every row's last real token in the output.
        """
        if not self.drafting or not self.alive.any():
            return
        self.unread.append(output)
        if not self.has_drafts():
            return
        parts, self.unread = self.unread, []
        joined = parts[0] if len(parts) == 1 else [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]
        states, columns, positions, real = joined
        last = last[:, None] + columns.shape[1] - output.columns.shape[1]
        rows = torch.arange(len(last), device=last.device)[:, None]
        refused = ~real
        if self.depths > 1:
            again = last - torch.arange(self.depths - 2, -1, -1, device=last.device)  # [B, K - 1]
            unread = MainOutput(states[rows, again], columns[rows, again], positions[rows, again], real[rows, again])
            self.unread.append(unread)
            refused[rows, again] = True

        model, mask = self.model.model, self.drafts.extend(real)
        inputs: dict | None = None
        self.draft_probabilities = []
        for depth, layer in enumerate(model.mtp_layers, start=1):
            ids = self.texts.gather(1, (columns + depth).clamp(0, self.texts.shape[1] - 1))
            embeds = model.embed_tokens(ids)
            if inputs is None:
                inputs = model.layer_inputs(embeds, mask, positions, self.drafts.cache)
                inputs.pop("position_ids")
            guess = layer(states, embeds, input_ids=ids, past_key_values=self.drafts.cache, **inputs)
            states = guess.states
            (logits,) = project(guess.hidden_states[rows, last], self.model.lm_head)
            scores = self.scores(logits.float(), first=depth - 1)[:, 0]
            draft = scores.argmax(dim=-1)
            if self.samples:
                self.draft_probabilities.append(scores.softmax(dim=-1))
                draft = self.draft_probabilities[-1].multinomial(1)[:, 0]
            self.texts.scatter_(1, (self.lengths + depth - 1)[:, None], draft[:, None])
        self.drafts.forget(refused)


def check_draft_decoding(config, generation_config, past_key_values: Cache | None, synced_gpus: bool) -> None:
    """Raises ValueError for what draft decoding cannot do, with what can be done instead."""
    if not config.num_nextn_predict_layers:
        raise ValueError("use_mtp=True needs MTP layers: this model has num_nextn_predict_layers=0")
    if not isinstance(past_key_values, FathomDynamicCache):
        raise ValueError(
            "use_mtp=True needs a cache that can be cropped: leave cache_implementation and use_cache alone"
        )
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    for name in wanted:
        if getattr(generation_config, name, None):
            raise ValueError(f"{name}=True is not returned with use_mtp=True; generate without one of them")
    if synced_gpus:
        raise ValueError("use_mtp=True does not run with sharded parameters; gather them first, or generate without")
