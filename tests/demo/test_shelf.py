"""One model in memory, whichever is chosen and whatever fails."""

import gc
import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from fathom.demo import shelf as module
from fathom.demo.shelf import Shelf, load_source, untrained
from fathom.modeling.presets import GENERATIONS
from fathom.training.errors import UserError


@pytest.fixture
def runs(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    for name in ("first", "second", "damaged"):
        shutil.copytree(tiny_checkpoint, tmp_path / name)
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    return tmp_path


def test_sources_are_named_ones_then_checkpoints_then_untrained_models(runs: Path) -> None:
    sources = Shelf(runs, ["owner/name", str(runs / "second")]).sources()
    assert sources[:2] == ["owner/name", str(runs / "second")]
    assert set(sources[2:4]) == {str(runs / "first"), str(runs / "damaged")}
    newest_first = [f"random:{generation}" for generation in reversed(GENERATIONS)]
    assert sources[4:] == Shelf(runs / "none").sources() == newest_first


def test_the_first_model_is_freed_before_the_second_is_loaded(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(runs)
    first = weakref.ref(shelf.load(str(runs / "first")).model)
    assert shelf.load(str(runs / "first")).model is first(), "no second copy of the one in use"
    alive = []

    def load(*args) -> module.Loaded:
        alive.append(first() is not None)
        return load_source(*args)

    monkeypatch.setattr(module, "load_source", load)
    assert shelf.load(str(runs / "second")).source == str(runs / "second")
    assert alive == [False]


def test_after_a_failure_the_previous_model_is_in_use(runs: Path) -> None:
    shelf = Shelf(runs)
    shelf.load(str(runs / "first"))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        shelf.load(str(runs / "damaged"))
    assert shelf.in_use().source == str(runs / "first")
    gc.collect()


def test_a_model_that_answers_stays_until_it_has_and_nobody_overtakes(runs: Path) -> None:
    shelf = Shelf(runs)
    first, second = str(runs / "first"), str(runs / "second")
    order: list[str] = []

    def ask(source: str) -> None:
        with shelf.borrow(source) as loaded:
            order.append(loaded.source)

    with shelf.borrow(first) as answering:
        ask(first)
        askers = [threading.Thread(target=ask, args=(source,)) for source in (second, first)]
        for asker in askers:
            asker.start()
            time.sleep(0.2)
        assert order == [first], "the second model waits for the answer, the next asker for the second model"
        assert shelf.in_use() is answering
    for asker in askers:
        asker.join(30)
    assert order == [first, second, first]


def test_a_model_that_is_put_away_answers_no_more(runs: Path) -> None:
    shelf = Shelf(runs)
    batch = shelf.load(str(runs / "first")).model.shared_batch
    assert batch.max_rows == module.ANSWERS
    shelf.load(str(runs / "second"))
    assert batch.model.shared_batch is None


def test_only_what_is_on_offer_can_be_loaded(runs: Path, tiny_checkpoint: Path) -> None:
    shelf = Shelf(runs)
    with pytest.raises(UserError, match="no model is loaded"):
        shelf.in_use()
    with pytest.raises(UserError, match="on offer"):
        shelf.load(str(tiny_checkpoint))


@pytest.mark.parametrize("generation", ["v3", "classic"])
def test_untrained_models_are_the_same_each_time_and_leave_the_generator_alone(generation: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, tokenizer = untrained(generation)
    assert torch.equal(torch.rand(3), expected)
    assert model.config.generation == generation
    assert not model.training
    again, _ = untrained(generation)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    text = "def f(x):\n    return x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_model_in_int8(runs: Path) -> None:
    shelf = Shelf(runs, int8=True)
    for source in (str(runs / "first"), "random:classic"):
        assert shelf.load(source).model.lm_head.weight.dtype == torch.int8


def test_an_unknown_generation_names_the_near_ones() -> None:
    with pytest.raises(UserError, match="did you mean v3"):
        load_source("random:v33")
    with pytest.raises(UserError, match="unknown model"):
        load_source("random:v3-671b")  # a preset, but one that fits into no memory


def test_parameters_are_those_of_the_model(tiny_checkpoint: Path) -> None:
    loaded = load_source(str(tiny_checkpoint))
    counts = loaded.model.parameter_counts()
    assert loaded.parameters() == (counts["total"], counts["active"])
    assert loaded.generation == "v3"
