"""What is exported is what the other code makes of it: the same logits, the same words, the same tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import CLASSES, greedy, ids, stock_model
from without_fathom import WITHOUT_FATHOM

from fathom import FathomConfig, FathomForCausalLM
from fathom.training.errors import UserError
from fathom.training.export import export_checkpoint

TOLERANCE = 1e-4
NATIVE = {"v2": "deepseek_v2", "v3": "deepseek_v3", "v3.2": "deepseek_v32", "v4": "deepseek_v4"}


def small(generation: str, **overrides) -> FathomConfig:
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 97, "moe_intermediate_size": 32}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256}
    # Enough heads that no two keys have the same score; few enough entries that a choice is made.
    indexer = {"index_n_heads": 64, "index_topk": 9} if generation in ("v3.2", "v4") else {}
    if generation == "v4":
        indexer |= {"sliding_window": 11, "compress_rate_hca": 8}
    heads = {"num_attention_heads": 2, "initializer_range": 0.2}
    if generation == "moe":
        heads["head_dim"] = 32
    return FathomConfig.preset(generation, **{**shape, **experts, **indexer, **heads, **overrides})


def save(config: FathomConfig, folder: Path, **options) -> FathomForCausalLM:
    torch.manual_seed(1)
    model = FathomForCausalLM(config).eval()
    # The row of the padding token is zero, and a text of such tokens full of ties.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.initializer_range)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dim() == 1 and "inv_freq" not in name:
            value.data.normal_(mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder, **options)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def is_mtp(name: str, config: FathomConfig) -> bool:
    return name.startswith(("mtp.", f"model.layers.{config.num_hidden_layers}."))


STRANGER = """
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM

for folder in map(Path, sys.argv[1:]):
    seen = torch.load(folder / "seen.pt")
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.deepseek"), type(model)
    mtp = {name for name in report["unexpected_keys"] if name.startswith(seen["mtp"])}
    assert not report["missing_keys"] and report["unexpected_keys"] == mtp and not report["mismatched_keys"], report
    with torch.no_grad():
        torch.testing.assert_close(model(seen["tokens"]).logits, seen["logits"], atol=1e-4, rtol=0)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    mask = torch.ones_like(seen["tokens"])
    assert torch.equal(model.generate(seen["tokens"], attention_mask=mask, **settings), seen["generated"]), folder
assert not any(name.split(".")[0] == "fathom" for name in sys.modules)
print("equal")
"""


def test_transformers_loads_every_generation_without_us(tmp_path):
    """A fresh process that has no Fathom: the native class, equal logits and words; MTP layers are all it leaves."""
    folders = []
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    yarn_mla = {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    variants = [
        ("v2", {}),
        ("v2", {"q_lora_rank": None, "topk_method": "greedy", "rope_parameters": yarn_mla}),
        ("v3", {}),
        ("v3", {"num_nextn_predict_layers": 0, "rope_parameters": yarn_mla, "tie_word_embeddings": True}),
        ("v3.2", {}),
        ("v3.2", {"channel_mixers": ["moe", "dense", "moe", "dense", "moe"], "n_group": 2}),
        ("v4", {}),
        ("v4", {"rope_parameters": yarn, "hc_mult": 2, "token_mixers": ["csa", "hca", "swa", "csa", "swa"]}),
    ]
    for number, (generation, overrides) in enumerate(variants):
        source, target = tmp_path / f"ours {number}", tmp_path / f"native {number}"
        config = small(generation, **overrides)
        model = save(config, source)
        written = export_checkpoint(source, target, "transformers", "150KB" if number % 2 else "5GB")
        assert (written.model_type, written.mtp_layers) == (NATIVE[generation], config.num_nextn_predict_layers)
        assert (written.files > 1) == bool(number % 2)
        assert not list(target.glob("*.py"))
        tokens = ids(model, 2, 40)
        with torch.no_grad():
            logits = model(tokens).logits
        mtp = "mtp." if generation == "v4" else f"model.layers.{config.num_hidden_layers}."
        seen = {"tokens": tokens, "logits": logits, "generated": greedy(model, tokens), "mtp": mtp}
        torch.save(seen, target / "seen.pt")
        folders.append(str(target))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_FATHOM + STRANGER, *folders],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().endswith("equal")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("generation", CLASSES)
def test_there_and_back_changes_no_bit(tmp_path, generation, seed):
    """transformers' model -> its files -> ours -> our files -> exported -> transformers' model."""
    stock = stock_model(generation, seed)
    stock.save_pretrained(tmp_path / "stock")
    FathomForCausalLM.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", "transformers")
    back, report = CLASSES[generation][1].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    expected = stock.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, value in back.state_dict().items():
        assert torch.equal(value, expected[name]), name
    tokens = ids(stock, 2, 45)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, stock(tokens).logits)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("generation", CLASSES)
def test_their_folder_can_be_exported_at_once(tmp_path, generation, seed):
    stock = stock_model(generation, seed)
    stock.save_pretrained(tmp_path / "stock")
    for to in ("transformers", "deepseek"):
        if to == "deepseek" and not _in_deepseeks_code(stock.config):
            continue
        written = export_checkpoint(tmp_path / "stock", tmp_path / to, to)
        assert written.mtp_layers == 0
        ours = FathomForCausalLM.from_pretrained(tmp_path / to)
        tokens = ids(stock, 2, 45)
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens).logits, stock(tokens).logits, atol=TOLERANCE, rtol=0)


def _in_deepseeks_code(config) -> bool:
    """Whether hash layers come first, and pairs of rotary dimensions are neighbours."""
    kinds = getattr(config, "mlp_layer_types", None) or []
    return sorted(kinds, key=lambda kind: kind == "moe") == kinds and getattr(config, "rope_interleave", True)


@pytest.mark.parametrize("generation", ["moe", "v2", "v3", "v3.2", "v4"])
def test_deepseeks_form_keeps_everything(tmp_path, generation):
    """Every tensor under the same name, MTP layers as well, and a config.json in which we read the same model."""
    # transformers reads DeepSeek's `compress_ratios` with the rates of the releases only.
    config = small(generation, **({"compress_rate_hca": 128} if generation == "v4" else {}))
    model = save(config, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "released", "deepseek")
    before, after = tensors(tmp_path / "ours"), tensors(tmp_path / "released")
    copies = after.keys() - before.keys()
    mtp = f"model.layers.{config.num_hidden_layers}"
    has_copies = generation in ("v3", "v3.2")
    assert copies == ({f"{mtp}.embed_tokens.weight", f"{mtp}.shared_head.head.weight"} if has_copies else set())
    if has_copies:
        assert torch.equal(after[f"{mtp}.embed_tokens.weight"], before["model.embed_tokens.weight"])
        assert torch.equal(after[f"{mtp}.shared_head.head.weight"], before["lm_head.weight"])
    for name, value in before.items():
        assert torch.equal(after[name], value), name

    content = json.loads((tmp_path / "released" / "config.json").read_text())
    assert "rope_parameters" not in content
    assert "auto_map" not in content
    assert content["rope_theta"] == 10000.0
    ours, report = FathomForCausalLM.from_pretrained(tmp_path / "released", output_loading_info=True)
    assert not any(report.values()), report
    tokens = ids(model, 2, 150)
    with torch.no_grad():
        outputs, expected = ours(tokens, labels=tokens), model(tokens, labels=tokens)
    assert torch.equal(outputs.logits, expected.logits)
    if config.num_nextn_predict_layers:
        assert torch.equal(outputs.mtp_loss, expected.mtp_loss)
    if generation != "moe":
        # transformers reads DeepSeek's form, too.
        stock = CLASSES[generation][1].from_pretrained(tmp_path / "released")
        with torch.no_grad():
            torch.testing.assert_close(stock(tokens).logits, expected.logits, atol=TOLERANCE, rtol=0)


def test_bf16_stays_bf16_and_tokenizer_files_come_along(tmp_path, tiny_checkpoint):
    model = FathomForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "ours" / name).write_bytes((tiny_checkpoint / name).read_bytes())
    export_checkpoint(tmp_path / "ours", tmp_path / "native", "transformers")
    for name, value in tensors(tmp_path / "native").items():
        assert value.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "native" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == "bfloat16"


def test_quantised_weights_are_dequantised_on_the_way(tmp_path):
    """Into the dtype that the config names; what is not quantised keeps its own."""
    stock_model("v3", seed=1).save_pretrained(tmp_path / "quantised")
    plain = tensors(tmp_path / "quantised")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    numbers = plain[name].to(torch.float8_e4m3fn)
    quantised = {**plain, name: numbers, f"{name}_scale_inv": torch.full((1, 1), 0.3)}
    save_file(quantised, tmp_path / "quantised" / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "quantised" / "config.json").read_text())
    content |= {"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(content))

    export_checkpoint(tmp_path / "quantised", tmp_path / "plain", "transformers")
    written = tensors(tmp_path / "plain")
    assert written.keys() == plain.keys()
    assert torch.equal(written.pop(name), (numbers.float() * torch.tensor(0.3)).to(torch.bfloat16))
    assert all(torch.equal(value, plain[other]) for other, value in written.items())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize(
    ("generation", "overrides", "to", "message"),
    [
        ("classic", {}, "transformers", "cannot express position_embedding_type='sinusoidal'; it knows only 'rope'"),
        ("classic", {}, "deepseek", "cannot express position_embedding_type='sinusoidal'; it knows only 'rope'"),
        ("moe", {}, "transformers", "cannot express token_mixers='mha'"),
        ("moe", {"head_dim": 48}, "deepseek", "head_dim=48; it knows only hidden_size / num_attention_heads = 32"),
        ("v2", {"norm_topk_prob": True}, "transformers", "deepseek_v2 cannot express norm_topk_prob=True"),
        ("v2", {"num_nextn_predict_layers": 1}, "transformers", "num_nextn_predict_layers=1; it knows only 0"),
        ("v2", {"scoring_func": "sigmoid"}, "deepseek", "scoring_func='sigmoid'; it knows only 'softmax'"),
        ("v3", {"scoring_func": "softmax"}, "transformers", "scoring_func='softmax'; it knows only 'sigmoid'"),
        ("v3", {"topk_method": "greedy"}, "transformers", "deepseek_v2 cannot express"),
        ("v3.2", {"index_dense": True}, "transformers", "deepseek_v32 cannot express index_dense=True"),
        ("v4", {"index_dense": True}, "deepseek", "deepseek_v4 cannot express index_dense=True"),
        ("v3", {"hc_mult": 2}, "transformers", "deepseek_v3 cannot express hc_mult=2; it knows only 1"),
        ("v3", {"swiglu_limit": 7.0}, "transformers", "swiglu_limit=7.0; it knows only None"),
        ("v3", {"mlp_gated": False}, "transformers", "mlp_gated=False; it knows only True"),
        ("v3", {"rope_interleave": False}, "deepseek", "rope_interleave=False; it knows only True"),
        ("v3", {"n_shared_experts": 0}, "transformers", "n_shared_experts=0; it knows only 1 or more"),
        ("v3", {"channel_mixers": ["moe", "dense", "moe", "moe", "moe"]}, "transformers", "first layers 'dense'"),
        ("v3", {"channel_mixers": "dense"}, "transformers", "channel_mixers[4]='dense'; it knows only 'moe' in MTP"),
        ("v3", {"token_mixers": ["mla", "dsa", "mla", "dsa", "mla"]}, "transformers", "token_mixers=['dsa', 'mla']"),
        ("v4", {"hc_mult": 1}, "transformers", "hc_mult=1; it knows only 2 or more"),
        ("v4", {"swiglu_limit": None}, "transformers", "swiglu_limit=None; it knows only a number"),
        ("v4", {"token_mixers": "csa"}, "transformers", "token_mixers[4]='csa'; it knows only 'swa' in MTP layers"),
        ("v4", {"n_shared_experts": 2}, "transformers", "n_shared_experts=2; it knows only 1"),
        ("v4", {"compress_rate_csa": 3}, "deepseek", "compress_rate_csa=3; it knows only 4"),
        ("v4", {"channel_mixers": ["moe", "hash", "moe", "moe", "moe"]}, "deepseek", "first layers 'hash'"),
    ],
)
def test_what_the_other_code_cannot_express_is_refused(tmp_path, generation, overrides, to, message):
    FathomForCausalLM(small(generation, **overrides)).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError) as error:
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, tiny_checkpoint):
    cases = [
        ((tiny_checkpoint, "out", "transformer"), "cannot export to 'transformer'; did you mean transformers?"),
        ((tmp_path / "absent", "out", "transformers"), "there is no folder"),
        ((tiny_checkpoint, "out", "deepseek", "5 apples"), "max_shard_size='5 apples' is no size"),
        ((tiny_checkpoint, tiny_checkpoint, "transformers"), "is the checkpoint itself"),
    ]
    for (source, target, *rest), message in cases:
        with pytest.raises(UserError, match=r"^[^\n]+$") as error:
            export_checkpoint(source, tmp_path / target, *rest)
        assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save(small("v3"), tmp_path / "ours")
    content = json.loads((tmp_path / "ours" / "config.json").read_text())
    for change, message in (
        ({"moe_intermediate_size": 48}, "down_proj.weight is [64, 32], should be [64, 48]"),
        ({"n_routed_experts": 16}, "tensors are missing that the config expects: layers.1.mlp.experts.8.gate_proj"),
        ({"first_k_dense_replace": 0}, "tensors are missing that the config expects: layers.0.mlp.gate.weight"),
    ):
        (tmp_path / "ours" / "config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=r"do not fit its config\.json") as error:
            export_checkpoint(tmp_path / "ours", tmp_path / "out", "transformers")
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()
