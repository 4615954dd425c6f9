"""Rows that come to a batch and leave it while others are being continued; the oracle is each row alone, uncached."""

import pytest
import torch
from generations import GENERATIONS, model
from transformers import DynamicCache, StaticCache

from fathom.modeling.cache import adopt_cache

PROMPTS = [3, 41, 10, 25]
NEW_TOKENS = 30

every_generation = pytest.mark.parametrize("generation", GENERATIONS)


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (length + NEW_TOKENS,), generator=generator) for length in PROMPTS]


class Running:
    """A batch of texts: which of them, and how many of their tokens have been read."""

    def __init__(self, ours) -> None:
        self.ours = ours
        self.texts = texts()
        self.expected = [ours(text[None], use_cache=False).logits[0] for text in self.texts]
        self.rows: list[int] = []
        self.read: list[int] = []
        self.cache: DynamicCache | None = None

    def prompt(self, row: int) -> DynamicCache:
        cache = DynamicCache(config=self.ours.config)
        logits = self.ours(self.texts[row][None, : PROMPTS[row]], cache=cache).logits[0]
        torch.testing.assert_close(logits, self.expected[row][: PROMPTS[row]], atol=1e-5, rtol=1e-5)
        return cache

    def admit(self, row: int) -> None:
        cache = self.prompt(row)
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.batch_append(cache)
        self.rows.append(row)
        self.read.append(PROMPTS[row])

    def step(self, times: int) -> None:
        for _ in range(times):
            tokens = torch.stack([self.texts[row][read] for row, read in zip(self.rows, self.read, strict=True)])
            read, columns = torch.tensor(self.read)[:, None], max(self.read) + 1
            mask = (torch.arange(columns) >= columns - 1 - read).long()
            logits = self.ours(tokens[:, None], attention_mask=mask, position_ids=read, cache=self.cache).logits[:, 0]
            expected = torch.stack([self.expected[row][at] for row, at in zip(self.rows, self.read, strict=True)])
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
            self.read = [at + 1 for at in self.read]
            assert self.cache is not None
            assert self.cache.get_seq_length() == max(self.read)

    def remove(self, row: int) -> None:
        at = self.rows.index(row)
        before = max(self.read)
        del self.rows[at], self.read[at]
        assert self.cache is not None
        self.cache.batch_select_indices(torch.tensor([i for i in range(len(self.rows) + 1) if i != at]))
        self.cache.drop_oldest(before - max(self.read))


@torch.no_grad()
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_rows_that_come_and_go_read_what_they_read_alone(generation: str) -> None:
    running = Running(model(generation))
    running.admit(0)
    running.step(2)
    running.admit(1)  # a longer one: what stands before the first row is nothing
    running.step(9)
    running.admit(2)
    running.step(3)
    running.remove(1)  # the longest
    running.step(1)
    running.admit(3)
    running.step(10)
    running.remove(0)
    running.step(5)


@torch.no_grad()
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_nothing_stays_of_rows_that_left(generation: str) -> None:
    running = Running(model(generation))
    running.admit(2)
    running.admit(1)
    running.admit(0)
    running.step(4)
    running.remove(1)
    running.remove(0)
    assert running.cache is not None
    alone = DynamicCache(config=running.ours.config)
    running.ours(running.texts[2][None, : PROMPTS[2] + 4], cache=alone)
    assert running.cache.nbytes() == alone.nbytes()
    for layer, expected in zip(running.cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, atol=1e-5, rtol=1e-5)
        for rows, expected_rows in zip(
            *(getattr(each, "entries", {}).values() for each in (layer, expected)), strict=True
        ):
            torch.testing.assert_close(rows, expected_rows, atol=1e-5, rtol=1e-5)
    running.step(3)


@torch.no_grad()
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_memory_that_nothing_was_written_to_is_not_read(generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.Tensor.new_empty

    def garbage(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    running = Running(model(generation))
    monkeypatch.setattr(torch.Tensor, "new_empty", garbage)
    running.admit(0)
    running.admit(3)
    running.step(3)


@torch.no_grad()
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_tokens_can_be_taken_back_after_rows_came(generation: str) -> None:
    running = Running(model(generation))
    running.admit(1)
    running.admit(0)
    assert running.cache is not None
    running.cache.activate_past_recording()
    running.step(6)
    running.cache.crop(-4)
    running.read = [at - 4 for at in running.read]
    running.step(8)


@torch.no_grad()
@pytest.mark.parametrize("generation", ["v3", "v4"])
def test_what_cannot_be_put_together(generation: str) -> None:
    ours = model(generation)
    running = Running(ours)
    running.admit(0)
    cache = running.cache
    assert cache is not None
    empty = DynamicCache(config=ours.config)
    adopt_cache(empty, ours.config)
    with pytest.raises(ValueError, match="an empty one has no rows"):
        cache.batch_append(empty)
    other = model("classic" if generation == "v4" else "v4")
    foreign = other(texts()[0][None]).cache
    with pytest.raises(ValueError, match="a growing cache of the same model"):
        cache.batch_append(foreign)
    static = StaticCache(ours.config, max_cache_len=60)
    ours(texts()[0][None], cache=static)
    with pytest.raises(ValueError, match="a growing cache of the same model"):
        cache.batch_append(static)
    for columns in (-1, PROMPTS[0]):
        with pytest.raises(ValueError, match=rf"drop_oldest\({columns}\) must be at least 0 and less than the 3"):
            cache.drop_oldest(columns)
    running.step(3)
