"""TRL's own trainers, with their defaults, on one process and on two: they run, and the routing biases move."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import model, packed_rows, torchrun, trainer
from transformers import Trainer

from fathom import FathomConfig, FathomForCausalLM
from fathom.training.router_bias import RouterBiasCallback

SCRIPT = str(Path(__file__).parents[1] / "trl_steps.py")
JOBS = ("sft:v3", "dpo:v3", "grpo:v3", "sft:v3.2", "sft:v4")


@pytest.fixture(scope="module", params=[2, 1], ids=["two-processes", "one-process"])
def results(request, tmp_path_factory) -> dict[str, dict]:
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("trl")
    process = torchrun(SCRIPT, str(folder), *JOBS, processes=request.param, timeout=400)
    assert process.returncode == 0, process.stderr[-3000:]
    return {
        job: json.loads((folder / f"{job.replace(':', '-')}-{request.param}" / "result.json").read_text())
        for job in JOBS
    }


@pytest.mark.parametrize("job", JOBS)
def test_trl_s_trainers_run_with_their_defaults(job: str, results: dict[str, dict]):
    result = results[job]
    assert result["steps"] == 3
    assert result["layers"] > 0
    assert result["ranks_agree"]
    # They call the layers alone: MTP layers get no gradient, and stay.
    assert result["mtp"] == 0


@pytest.mark.parametrize("job", JOBS)
def test_the_callback_moves_the_routing_biases_under_them(job: str, results: dict[str, dict]):
    speed = FathomConfig.preset(job.split(":")[1]).router_bias_update_speed
    assert results[job]["biases"]
    assert all(moved >= speed * 0.9 for moved in results[job]["biases"])
    assert results[job]["said"] == []


class TestSaysThatItCannot:
    """A callback that does nothing is worse than none."""

    @staticmethod
    def warned(trained, tmp_path, **settings) -> list[str]:
        import warnings

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kind = settings.pop("kind", Trainer)
            made = trainer(tmp_path, trained, packed_rows(12), kind=kind, callbacks=[RouterBiasCallback()], **settings)
            made.train()
        return [str(entry.message) for entry in said if "RouterBiasCallback" in str(entry.message)]

    def test_nothing_is_said_where_biases_move(self, tmp_path: Path):
        assert self.warned(model(), tmp_path) == []

    @pytest.mark.parametrize(
        ("generation", "reason"), [("classic", "classic model has none"), ("v2", "has none (topk_method='")]
    )
    def test_models_without_routing_bias(self, generation: str, reason: str, tmp_path: Path):
        config = FathomConfig.preset(generation, hidden_size=64, num_hidden_layers=2, vocab_size=97)
        (line,) = self.warned(FathomForCausalLM(config), tmp_path)
        assert reason in line

    def test_frozen_routers(self, tmp_path: Path):
        trained = model()
        for router in trained.routers():
            router.requires_grad_(False)
        (line,) = self.warned(trained, tmp_path)
        assert "all its routers are frozen" in line

    def test_no_speed(self, tmp_path: Path):
        (line,) = self.warned(model(router_bias_update_speed=0.0), tmp_path)
        assert "router_bias_update_speed is 0" in line

    def test_a_trainer_that_counts_nothing(self, tmp_path: Path):
        class InEvalMode(Trainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                model.eval()
                return super().compute_loss(model, inputs, *args, **kwargs)

        (line,) = self.warned(model(), tmp_path, kind=InEvalMode)
        assert "no forward in training mode counted the tokens of its experts" in line

    def test_another_library_s_model(self):
        with pytest.warns(UserWarning, match="Linear is no Fathom model"):
            RouterBiasCallback().on_train_begin(SimpleNamespace(), None, None, model=torch.nn.Linear(2, 2))


def test_the_layers_alone_count_as_much_as_the_language_model():
    """TRL calls the first, transformers' Trainer the second."""
    ids = torch.arange(3, 23)[None]
    counted = []
    for call in (
        lambda trained: trained.model(ids),
        lambda trained: trained(ids),
        lambda trained: trained(ids, labels=ids),
    ):
        trained = model().train()
        call(trained)
        counted.append(trained.update_router_bias())
    assert counted[0].any()
    assert torch.equal(counted[0], counted[1])
    mtp = 1
    assert torch.equal(counted[2][:-mtp], counted[0][:-mtp])
    assert counted[2][-mtp:].any()
    assert not counted[0][-mtp:].any()
