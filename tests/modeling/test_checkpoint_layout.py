"""What is on disk: DeepSeek's tensor names, exact round trips, resume, and code that travels with the weights."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from without_fathom import WITHOUT_FATHOM

from fathom import (
    FathomConfig,
    FathomForCausalLM,
    FathomForSequenceClassification,
    FathomForTokenClassification,
    FathomModel,
)

EXPERTS = 4
GENERATIONS = ["classic", "moe", "v2", "v3", "v3.2", "v4"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
ATTENTION = [
    "self_attn.q_a_proj.weight",
    "self_attn.q_a_layernorm.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
MATRICES = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
MOE = [
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    *(f"mlp.experts.{expert}.{matrix}" for expert in range(EXPERTS) for matrix in MATRICES),
    *(f"mlp.shared_experts.{matrix}" for matrix in MATRICES),
]
MTP = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"]


def config(generation: str = "v3", **overrides) -> FathomConfig:
    settings = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "max_position_embeddings": 256,
    }
    return FathomConfig.preset(generation, **{**settings, **overrides})


def model(generation: str = "v3", **overrides) -> FathomForCausalLM:
    """Random weights, random routing biases: a bias of 0 could be forgotten unnoticed."""
    torch.manual_seed(0)
    created = FathomForCausalLM(config(generation, **overrides)).eval()
    for name, buffer in created.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    return created


def tokens(batch: int = 2, length: int = 15) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def assert_same_state(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Parameters and all buffers, those that are not saved included, are equal bit by bit."""
    for mine_named, theirs_named in (
        (mine.named_parameters(), theirs.named_parameters()),
        (mine.named_buffers(), theirs.named_buffers()),
    ):
        expected, got = dict(mine_named), dict(theirs_named)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert value.dtype == got[name].dtype, name
            assert torch.equal(value, got[name]), name


def names_on_disk(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


def test_tensor_names_are_the_official_ones(tmp_path):
    """Layer 0 is dense, layer 1 has experts, and layer 2, one beyond the last, is the MTP layer."""
    model().save_pretrained(tmp_path)
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.0.{name}" for name in [*ATTENTION, *NORMS, *(f"mlp.{m}" for m in MATRICES)]}
    expected |= {f"model.layers.1.{name}" for name in [*ATTENTION, *NORMS, *MOE]}
    expected |= {f"model.layers.2.{name}" for name in [*ATTENTION, *NORMS, *MOE, *MTP]}
    assert names_on_disk(tmp_path) == expected
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes["model.layers.1.mlp.experts.3.gate_proj.weight"] == (32, 64)
    assert shapes["model.layers.1.mlp.experts.3.down_proj.weight"] == (64, 32)
    assert shapes["model.layers.2.eh_proj.weight"] == (64, 128)


@pytest.mark.parametrize("rope", [None, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("generation", ["v3", "v3.2", "v4"])
def test_round_trip_is_exact(tmp_path, generation, shards, rope):
    saved = model(generation, rope_parameters=rope, num_nextn_predict_layers=2)
    saved.save_pretrained(tmp_path, max_shard_size="100KB" if shards else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == shards
    loaded = FathomForCausalLM.from_pretrained(tmp_path)
    assert_same_state(saved, loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert names_on_disk(tmp_path / "again") == names_on_disk(tmp_path)
    assert_same_state(saved, FathomForCausalLM.from_pretrained(tmp_path / "again"))


def test_yarn_frequencies_after_loading_are_yarns(tmp_path):
    """Buffers that are not saved are computed anew, not left as uninitialised memory or as plain RoPE."""
    model(rope_parameters=YARN).save_pretrained(tmp_path)
    loaded = FathomForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    width, factor = loaded.config.qk_rope_head_dim, YARN["factor"]
    plain = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    frequencies = loaded.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    # The fastest pair turns as without YaRN, the slowest is slowed down by the factor (arXiv 2309.00071, eq. 23).
    torch.testing.assert_close(frequencies[0], plain[0])
    torch.testing.assert_close(frequencies[-1], plain[-1] / factor)
    assert torch.equal(loaded.model.rotary_emb.original_inv_freq, frequencies)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("generation", ["v3", "v4"])
def test_a_converted_model_lets_go_of_its_file(tmp_path, generation):
    """Biases and tables, which no dtype converts, are no parts of it."""
    model(generation).save_pretrained(tmp_path)
    loaded = FathomForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_tensor_names_of_v4(tmp_path):
    """DeepSeek's own names for V4. Layer 0 routes by token id, layer 2 is `csa`, layer 3 is `hca`."""
    model("v4", num_hidden_layers=4).save_pretrained(tmp_path)
    streams = [f"hc_{site}_{name}" for site in ("attn", "ffn") for name in ("fn", "base", "scale")]
    head = [f"hc_head_{name}" for name in ("fn", "base", "scale")]
    attention = [f"attn.{name}.weight" for name in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b")]
    networks = ["shared_experts", *(f"experts.{expert}" for expert in range(EXPERTS))]
    experts = ["ffn.gate.weight", *(f"ffn.{network}.{w}.weight" for network in networks for w in ("w1", "w2", "w3"))]
    common = [*attention, *streams, *experts, "attn.attn_sink", "attn_norm.weight", "ffn_norm.weight"]
    compressor = ["compressor.ape", "compressor.wkv.weight", "compressor.wgate.weight", "compressor.norm.weight"]
    indexer = ["indexer.wq_b.weight", "indexer.weights_proj.weight", *(f"indexer.{name}" for name in compressor)]

    expected = {"embed.weight", "norm.weight", "head.weight", *head}
    for layer in range(4):
        choice = "ffn.gate.tid2eid" if layer == 0 else "ffn.gate.bias"
        expected |= {f"layers.{layer}.{name}" for name in [*common, choice]}
    for layer in (2, 3):
        expected |= {f"layers.{layer}.attn.{name}" for name in compressor}
    expected |= {f"layers.2.attn.{name}" for name in indexer}
    mtp = ["enorm.weight", "hnorm.weight", "e_proj.weight", "h_proj.weight", "norm.weight", *head, "ffn.gate.bias"]
    expected |= {f"mtp.0.{name}" for name in [*common, *mtp]}
    assert names_on_disk(tmp_path) == expected
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes["layers.1.ffn.experts.3.w1.weight"] == (32, 64)
    assert shapes["layers.1.ffn.experts.3.w2.weight"] == (64, 32)


@pytest.mark.parametrize("model_class", [FathomForCausalLM, FathomModel, FathomForSequenceClassification])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_load_state_dict_reads_what_is_on_disk(tmp_path, generation, model_class):
    """Trainer reads the file itself to resume: a name that is not understood would silently keep the old weights."""
    saved, other = (model_class(config(generation)) for _ in range(2))
    for parameter in other.parameters():
        parameter.data.normal_()
    saved.save_pretrained(tmp_path)
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not missing
    assert not unexpected
    assert_same_state(saved, other)


class Documents(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = tokens(32, 12)[index]
        return {"input_ids": row, "labels": row}


class Callbacks(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.update_router_bias()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_age"] = -state.global_step


def train(generation: str, folder: Path, steps: int, resume: Path | None = None, **overrides) -> FathomForCausalLM:
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    arguments = TrainingArguments(**{**settings, **overrides})
    trainer = Trainer(
        model(generation), arguments, train_dataset=Documents(), eval_dataset=Documents(), callbacks=[Callbacks()]
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.model


@pytest.mark.parametrize("generation", GENERATIONS)
def test_resume_restores_everything(tmp_path, generation):
    """Two steps, a new process' model, two more: bit by bit the weights of four steps in one go."""
    uninterrupted = train(generation, tmp_path / "whole", 4)
    train(generation, tmp_path / "half", 2)
    resumed = train(generation, tmp_path / "half", 4, resume=tmp_path / "half" / "checkpoint-2")
    assert_same_state(uninterrupted, resumed)
    assert_same_state(resumed, FathomForCausalLM.from_pretrained(tmp_path / "half" / "checkpoint-4"))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_best_model_is_restored(tmp_path, generation):
    """The first checkpoint counts as the best one."""
    restored = train(
        generation,
        tmp_path,
        4,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_age",
        greater_is_better=True,
    )
    assert_same_state(restored, FathomForCausalLM.from_pretrained(tmp_path / "checkpoint-2"))
    last = FathomForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    trained = [name for name, parameter in last.named_parameters() if parameter.requires_grad]
    best, newest = restored.state_dict(), last.state_dict()
    assert not [name for name in trained if torch.equal(best[name], newest[name])]


def test_copies_of_embedding_and_head_in_an_mtp_layer_are_ignored_quietly(tmp_path, caplog, monkeypatch):
    """Official checkpoints store both with every MTP layer."""
    saved = model()
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        loaded, info = FathomForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert "embed_tokens" not in caplog.text
    assert_same_state(saved, loaded)


def test_a_missing_tensor_is_no_silence(tmp_path):
    model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        FathomForCausalLM.from_pretrained(tmp_path)


def test_auto_classes(tmp_path):
    saved = model()
    saved.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is FathomConfig
    for auto_class, model_class in (
        (AutoModel, FathomModel),
        (AutoModelForCausalLM, FathomForCausalLM),
        (AutoModelForSequenceClassification, FathomForSequenceClassification),
        (AutoModelForTokenClassification, FathomForTokenClassification),
    ):
        assert type(auto_class.from_pretrained(tmp_path)) is model_class
        assert type(auto_class.from_config(saved.config)) is model_class
    assert_same_state(saved.model, AutoModel.from_pretrained(tmp_path))


STRANGER = """
import torch
from pathlib import Path
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification)

folder = Path(sys.argv[1])
tokens = torch.load(folder / "tokens.pt")
for name, auto in (("AutoModel", AutoModel), ("AutoModelForCausalLM", AutoModelForCausalLM),
                   ("AutoModelForSequenceClassification", AutoModelForSequenceClassification),
                   ("AutoModelForTokenClassification", AutoModelForTokenClassification)):
    saved = folder / name
    assert AutoConfig.from_pretrained(saved, trust_remote_code=True).model_type == "fathom"
    model = auto.from_pretrained(saved, trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(tokens)
    result = output.last_hidden_state if name == "AutoModel" else output.logits
    torch.testing.assert_close(result, torch.load(folder / f"{name}.pt"), atol=1e-6, rtol=0)
    # The language model's folder serves every Auto class.
    auto.from_pretrained(folder / "AutoModelForCausalLM", trust_remote_code=True)

lm = AutoModelForCausalLM.from_pretrained(folder / "AutoModelForCausalLM", trust_remote_code=True).eval()
generated = lm.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
assert torch.equal(generated, torch.load(folder / "generated.pt"))
lm.train()(tokens, labels=tokens).loss.backward()
lm.update_router_bias()
lm.eval().save_pretrained(folder / "again")
again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
assert all(torch.equal(p, q) for p, q in zip(lm.state_dict().values(), again.state_dict().values(), strict=True))
assert not any(name.split(".")[0] == "fathom" for name in sys.modules)
print("equal")
"""


@pytest.mark.usefixtures("long_texts")
@pytest.mark.parametrize("generation", ["v3", "v4"])
def test_code_travels_with_the_weights(tmp_path, generation):
    """A fresh process that has no fathom: same numbers for all Auto classes, generation, training, saving again."""
    ids = tokens()
    torch.save(ids, tmp_path / "tokens.pt")
    language_model = model(generation)
    for auto_class, model_class in (
        (AutoModel, FathomModel),
        (AutoModelForCausalLM, FathomForCausalLM),
        (AutoModelForSequenceClassification, FathomForSequenceClassification),
        (AutoModelForTokenClassification, FathomForTokenClassification),
    ):
        folder = tmp_path / auto_class.__name__
        saved = language_model if model_class is FathomForCausalLM else model_class(config(generation)).eval()
        saved.save_pretrained(folder)
        with torch.no_grad():
            output = saved(ids)
        torch.save(output.last_hidden_state if model_class is FathomModel else output.logits, f"{folder}.pt")
    generated = language_model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    torch.save(generated, tmp_path / "generated.pt")

    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_FATHOM + STRANGER, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("equal")
    first, again = (sorted(p.name for p in (tmp_path / d).glob("*.py")) for d in ("AutoModelForCausalLM", "again"))
    assert first == again
    assert {"configuration_fathom.py", "modeling_fathom.py", "attention.py", "experts.py"} <= set(first)
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
