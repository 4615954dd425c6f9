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

Logits processors and stopping criteria that are known to depend on the text alone (`draft_rules`) are called for all
drafts at once. All others may remember what they were called with, as grammars and guidance do. They are called as in
plain decoding: once per token that is kept, in order (`accept_in_turn`). Several rows keep different numbers of drafts,
so that this is impossible; such calls are refused.

What is counted is counted by Python: where texts end, which rows go on, which tokens are kept. A step of a small model
takes less time than the tensor operations that this would be.

MTP layers have caches of their own. At depth k a token's entry needs the token k ahead, which for the last K - 1
tokens is a draft: these are read again in the next step.

Shapes: B batch, T tokens read at once, K depths, V vocabulary, C columns of the texts.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from time import perf_counter
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from .cache import FathomDynamicCache, cache_layer
from .draft_rules import STATELESS_PROCESSORS, Stops, with_state
from .fused import project

PLAIN_STEPS = 5  # whose median is the cost of plain decoding; the first may be slow
DRAFT_STEPS = 8  # that are looked back on to compare with it
FIRST_STEPS = 2  # with drafts, that may be slow and are not looked back on


@dataclass
class DraftDecodingOutput(GenerateDecoderOnlyOutput):
    """What `generate(use_mtp=True, return_dict_in_generate=True)` returns.

    Args:
        sequences: [B, C].
        cache: the main model's cache, without the newest token; None with several rows, whose caches hold
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
    """A cache, and which of its columns hold tokens of which row.

    Args:
        real: bool [B, columns], or None where nothing is padding.
    """

    def __init__(self, cache: Cache, real: torch.Tensor | None):
        self.cache = cache
        self.real = real
        cache.activate_past_recording()

    def extend(self, tokens: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor | None:
        """Adds tokens [B, T], of which some are `real` (None: all), and returns the attention mask (None: all)."""
        if real is not None or self.real is not None:
            before = all_real(tokens, int(self.cache.get_seq_length())) if self.real is None else self.real
            self.real = torch.cat((before, all_real(tokens, tokens.shape[1]) if real is None else real), dim=1)
        return None if self.real is None else self.real.long()

    def forget(self, refused: list[list[bool]], tokens: torch.Tensor) -> None:
        """Turns those of the newest tokens into padding that `refused` says, [B][T]; `tokens` are any of the rows."""
        count, columns = int(self.cache.get_seq_length()), list(zip(*refused, strict=True))
        trailing = sum(1 for _ in takewhile(all, reversed(columns)))
        if any(any(column) for column in columns[: len(columns) - trailing]):
            hidden = torch.tensor(columns, device=tokens.device).T
            self.real = all_real(tokens, count) if self.real is None else self.real
            self.real[:, count - len(columns) :] &= ~hidden
            # Before the crop: what it forgets of old tokens depends on which new ones count.
            for layer in self.cache.layers:
                layer.hide(hidden)
        self.real = None if self.real is None else self.real[:, : count - trailing]
        self.cache.crop(-trailing)


def all_real(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """For the rows of `tokens`: bool [B, count], no padding."""
    return tokens.new_ones(len(tokens), count, dtype=torch.bool)


class MainOutput(NamedTuple):
    """What the MTP layers read of T tokens."""

    states: torch.Tensor  # [B, T, ...], the main model's `final_states`
    columns: torch.Tensor  # [B, T], where the tokens stand in the texts
    positions: torch.Tensor  # [B, T]
    real: torch.Tensor | None  # bool [B, T]; None: all

    def at(self, rows, columns) -> "MainOutput":
        """The same of some tokens."""
        return MainOutput(*(None if each is None else each[rows, columns] for each in self))  # type: ignore[arg-type]

    @staticmethod
    def joined(parts: "list[MainOutput]") -> "MainOutput":
        if len(parts) == 1:
            return parts[0]
        states, columns, positions = (
            torch.cat(each, dim=1) for each in zip(*(part[:3] for part in parts), strict=True)
        )
        if all(part.real is None for part in parts):
            return MainOutput(states, columns, positions, None)
        real = [all_real(part.columns, part.columns.shape[1]) if part.real is None else part.real for part in parts]
        return MainOutput(states, columns, positions, torch.cat(real, dim=1))


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
        cache: Cache,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ):
        self.model = model
        self.process = logits_processor
        self.in_turn = bool(with_state(logits_processor, STATELESS_PROCESSORS))
        self.stops = Stops(stopping_criteria)
        self.samples = generation_config.do_sample
        self.depths = model.config.num_nextn_predict_layers
        self.drafting = True
        batch, device = input_ids.shape[0], input_ids.device

        # The texts; behind `lengths` stand the drafts.
        room = generation_config.max_length - input_ids.shape[1] + self.depths
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.texts = torch.cat((input_ids, input_ids.new_full((batch, room), self.pad)), dim=1)
        self.lengths = [input_ids.shape[1]] * batch
        self.alive = [True] * batch
        self.draft_probabilities: list[torch.Tensor] = []

        past = int(cache.get_seq_length())
        length = position_ids.shape[1] - past
        self.prompt_embeds = inputs_embeds
        self.prompt_columns = torch.arange(length, device=device).expand(batch, -1) + (input_ids.shape[1] - length)
        self.prompt_positions = position_ids[:, past:].expand(batch, -1)
        # From now on rows advance together in columns and positions.
        self.offset = (self.prompt_positions - self.prompt_columns)[:, -1:]
        real = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        self.prompt_real = None if real is None else real[:, past:]
        self.main = Columns(cache, None if real is None else real[:, :past])
        self.drafts = Columns(DraftCache(model.config), None)
        # What the MTP layers have not read yet: with several depths also what they read again, at the beginning.
        self.unread: list[MainOutput] = []
        self.figures = {"forwards": 0, "drafted_tokens": 0, "accepted_tokens": 0}
        # Seconds and tokens of the steps so far.
        self.plain_steps: list[tuple[float, int]] = []
        self.draft_steps: list[tuple[float, int]] = []

    def run(self, streamer=None) -> DraftDecodingOutput:
        self.read_prompt(streamer)
        while any(self.alive):
            self.step(streamer)
        if streamer is not None:
            streamer.end()
        texts = self.texts[:, : max(self.lengths)].clone()
        for row, length in enumerate(self.lengths):
            texts[row, length:] = self.pad
        return DraftDecodingOutput(
            sequences=texts,
            cache=self.main.cache if len(texts) == 1 else None,  # type: ignore[arg-type]
            **self.figures,
        )

    def read_prompt(self, streamer) -> None:
        """Reads the prompt, and chooses the first token."""
        columns = self.prompt_columns
        # Of a prompt given by embeddings, only hash layers want the ids too, if there are any.
        embeds, first = self.prompt_embeds, int(columns[0, 0])
        wanted = embeds is None or (self.model.model.routes_by_id and first >= 0)
        ids = self.texts.gather(1, columns) if wanted else None
        prompt, logits = self.read(ids, columns, self.prompt_positions, self.prompt_real, 1, embeds)
        self.check(logits, columns[:, :0], streamer)
        # Of a prompt given by embeddings only the last token's successor is known.
        prompt = prompt.at(slice(None), slice(max(-1 - first, 0), None))
        if self.depths > 1:
            # The MTP layers read the last tokens again: before the first there are none.
            none = prompt.at(slice(None), [0] * (self.depths - 1))
            self.unread = [none._replace(real=torch.zeros_like(none.columns, dtype=torch.bool))]
        self.draft(prompt, [prompt.columns.shape[1]] * len(columns))

    def step(self, streamer) -> None:
        """Checks the drafts, accepts what agrees, and drafts again."""
        start, before = perf_counter(), self.lengths.copy()
        depths = self.depths if self.has_drafts() else 0
        as_tensor = partial(torch.tensor, device=self.texts.device)
        columns = as_tensor([list(range(length - 1, length + depths)) for length in self.lengths])
        real = None if all(self.alive) else as_tensor([[alive] * (depths + 1) for alive in self.alive])
        ids = self.texts.gather(1, columns)
        output, logits = self.read(ids, columns, columns + self.offset, real, depths + 1)
        self.figures["drafted_tokens"] += sum(self.alive) * depths
        self.check(logits, ids[:, 1:], streamer)
        # The newest token is not in the cache; a row that has stopped before its last draft did not keep the others.
        gained = [now - then for now, then in zip(self.lengths, before, strict=True)]
        self.figures["accepted_tokens"] += sum(max(tokens - 1, 0) for tokens in gained)
        refused = [[index >= tokens for index in range(depths + 1)] for tokens in gained]
        self.main.forget(refused, ids)
        if not depths:
            self.plain_steps.append((perf_counter() - start, sum(gained)))
        if min(gained) <= depths:
            # Tokens that every row refuses are not read.
            real = None if min(gained) == max(gained) else ~as_tensor(refused)
            output = output._replace(real=real).at(slice(None), slice(max(gained)))
        self.draft(output, gained)
        if depths:
            self.draft_steps.append((perf_counter() - start, sum(gained)))
            self.drafting = self.drafts_pay()

    def has_drafts(self) -> bool:
        """Whether drafts stand behind the texts."""
        return self.drafting and len(self.plain_steps) >= PLAIN_STEPS

    def drafts_pay(self) -> bool:
        """Whether the last steps with drafts took less time per token than plain ones."""
        recent = self.draft_steps[FIRST_STEPS:][-DRAFT_STEPS:]
        if len(recent) < DRAFT_STEPS or not self.plain_steps:
            return True
        seconds, tokens = (sum(column) for column in zip(*recent, strict=True))
        return seconds / tokens < statistics.median(seconds / tokens for seconds, tokens in self.plain_steps)

    def read(
        self,
        ids: torch.Tensor | None,
        columns: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor | None,
        logits: int,
        embeds: torch.Tensor | None = None,
    ) -> tuple[MainOutput, torch.Tensor]:
        """Runs the main model: what the MTP layers read of it, and the last `logits` tokens' logits in fp32."""
        outputs = self.model.model(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=self.main.extend(columns, real),
            position_ids=positions,
            cache=self.main.cache,
            use_cache=True,
        )
        self.figures["forwards"] += 1
        (newest,) = project(outputs.last_hidden_state[:, -logits:], self.model.lm_head)
        return MainOutput(outputs.final_states, columns, positions, real), newest.float()

    def check(self, logits: torch.Tensor, drafts: torch.Tensor, streamer) -> None:
        """Accepts the drafts [B, K] as far as the main model's logits [B, K + 1, V] agree, and one token more."""
        if self.in_turn:
            self.accept_in_turn(logits, drafts, streamer)
            return
        tokens, kept = self.choose(self.scores(logits), drafts)
        self.accept(tokens, kept, streamer)

    def accept_in_turn(self, logits: torch.Tensor, drafts: torch.Tensor, streamer) -> None:
        """As `check`, of one row: processors and criteria are called once for every token that is kept, in order."""
        start = self.lengths[0]
        for depth, draft in enumerate([*drafts[0].tolist(), None]):
            end = self.lengths[0]
            scores = self.process(self.texts[:, :end], logits[:, depth].clone())  # [1, V]
            token = self.choose_one(scores[0], depth, draft)
            self.texts[0, end] = token
            self.lengths[0] = end + 1
            self.alive[0] = not self.stops(self.texts[:, : end + 1], token)
            if token != draft or not self.alive[0]:
                break
        if streamer is not None:
            streamer.put(self.texts[0, start : self.lengths[0]].cpu())

    def choose_one(self, scores: torch.Tensor, depth: int, draft: int | None) -> int:
        """The next token by scores [V]: the draft of this depth where it agrees, None being none (see `choose`)."""
        if not self.samples:
            return int(scores.argmax())
        p = scores.softmax(dim=-1)
        if draft is None:
            return int(p.multinomial(1))
        q = self.draft_probabilities[depth][0]
        if torch.rand((), device=p.device) * q[draft] < p[draft]:
            return draft
        rest = (p - q).clamp(min=0)
        return int((rest if rest.any() else p).multinomial(1))

    def scores(self, logits: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Logits [B, T, V] after the processors, every one with the text before it, drafts included."""
        if not self.process:
            return logits
        processed = torch.empty_like(logits)
        # All rows at once, as processors may know the rows, and one text length after the other.
        ends = torch.tensor(self.lengths)[:, None] + torch.arange(first, first + logits.shape[1])
        for end in ends.unique().tolist():
            rows, columns = (each.to(logits.device) for each in (ends == end).nonzero(as_tuple=True))
            whole = logits[:, 0].clone()
            whole[rows] = logits[rows, columns]
            processed[rows, columns] = self.process(self.texts[:, :end], whole)[rows]
        return processed

    def choose(self, scores: torch.Tensor, drafts: torch.Tensor) -> tuple[list[list[int]], list[int]]:
        """The next tokens by the scores [B, K + 1, V] that follow the newest token and the K drafts [B, K].

        Returns:
            Tokens [B][K + 1], of which those up to the number of kept drafts [B] count.
        """
        depths = drafts.shape[1]
        if not self.samples:
            tokens = scores.argmax(dim=-1).tolist()
            pairs = (zip(guesses, row, strict=False) for guesses, row in zip(drafts.tolist(), tokens, strict=True))
            return tokens, [sum(1 for _ in takewhile(lambda both: both[0] == both[1], row)) for row in pairs]
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
        return tokens.scatter(1, kept[:, None], rest.multinomial(1)).tolist(), kept.tolist()

    def accept(self, tokens: list[list[int]], kept: list[int], streamer) -> None:
        """Puts the kept drafts and the main model's token into the texts, up to where a row stops."""
        for row, (start, news) in enumerate(zip(self.lengths, tokens, strict=True)):
            if not self.alive[row]:
                continue
            news = news[: kept[row] + 1]
            self.texts[row, start : start + len(news)] = torch.tensor(news)
            for end, token in enumerate(news, start + 1):
                if self.stops(self.texts[row : row + 1, :end], token):
                    self.alive[row] = False
                    break
            self.lengths[row] = end
            if streamer is not None:
                streamer.put(self.texts[row, start:end].cpu())

    def draft(self, output: MainOutput, real: list[int]) -> None:
        """Lets the MTP layers read what the main model has read, and writes their drafts behind the texts.

        Args:
            real: [B], how many of the output's tokens are a row's, the first; 0 of one that has stopped.
        """
        if not self.drafting or not any(self.alive):
            return
        self.unread.append(output)
        if not self.has_drafts():
            return
        tokens, self.unread = MainOutput.joined(self.unread), []
        count = tokens.columns.shape[1]
        last = [count - output.columns.shape[1] + max(each, 1) - 1 for each in real]
        rows = torch.arange(len(last))[:, None]
        if self.depths > 1:
            again = [[index - back for back in range(self.depths - 2, -1, -1)] for index in last]  # [B][K - 1]
            self.unread = [tokens.at(rows, again)]

        model, mask = self.model.model, self.drafts.extend(tokens.columns, tokens.real)
        ends = torch.tensor(self.lengths, device=self.texts.device)[:, None]
        alone = len(set(last)) == 1
        inputs: dict | None = None
        states = tokens.states
        self.draft_probabilities = []
        for depth, layer in enumerate(model.mtp_layers, start=1):
            ids = self.texts.gather(1, (tokens.columns + depth).clamp(max=self.texts.shape[1] - 1))
            embeds = model.embed_tokens(ids)
            if inputs is None:
                inputs = model.layer_inputs(embeds, mask, tokens.positions, self.drafts.cache)
                inputs.pop("position_ids")
            guess = layer(states, embeds, input_ids=ids, cache=self.drafts.cache, **inputs)
            states = guess.states
            newest = guess.hidden_states
            newest = newest[:, last[0] : last[0] + 1] if alone else newest[rows, [[index] for index in last]]
            (logits,) = project(newest, self.model.lm_head)
            # A processor with a state may see no text that is not kept; drafts are good or bad guesses all the same.
            scores = (logits.float() if self.in_turn else self.scores(logits.float(), first=depth - 1))[:, 0]
            draft = scores.argmax(dim=-1, keepdim=True)
            if self.samples:
                self.draft_probabilities.append(scores.softmax(dim=-1))
                draft = self.draft_probabilities[-1].multinomial(1)
            self.texts.scatter_(1, ends + (depth - 1), draft)
        # Those that are read again, and behind them what is none of the row's.
        read_again = range(min(last) - self.depths + 2, count)
        self.drafts.forget([[column > end - self.depths + 1 for column in read_again] for end in last], ends)
