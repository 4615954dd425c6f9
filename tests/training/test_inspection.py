"""Inspection against stock transformers' parameter counts, DeepSeek's published layout, and files with faults.

No fault is made by the code under test: files are written by safetensors, stock transformers or byte by byte.
"""

import json
import math
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
)

from fathom import FathomConfig, FathomForCausalLM, FathomModel
from fathom.training.errors import UserError
from fathom.training.inspection import inspect_checkpoint, layer_runs
from fathom.training.tensor_layout import canonical_name

MLA = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
V4 = {
    "vocab_size": 67,
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 20,
    "o_groups": 2,
    "o_lora_rank": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    "sliding_window": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 4,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
STOCK = {
    "v2": (DeepseekV2ForCausalLM, DeepseekV2Config, MLA, ["0 mla + dense", "1-2 mla + moe"]),
    "v3": (DeepseekV3ForCausalLM, DeepseekV3Config, MLA, ["0 mla + dense", "1-2 mla + moe"]),
    "v3.2": (
        DeepseekV32ForCausalLM,
        DeepseekV32Config,
        {**MLA, "index_n_heads": 4, "index_head_dim": 8, "index_topk": 4},
        ["0 dsa + dense", "1-2 dsa + moe"],
    ),
    "v4": (DeepseekV4ForCausalLM, DeepseekV4Config, V4, ["0 swa + hash", "1 csa + moe", "2 hca + moe"]),
}


@pytest.mark.parametrize("generation", STOCK)
def test_stock_folders(generation, tmp_path: Path):
    model_class, config_class, shape, layers = STOCK[generation]
    stock = model_class(config_class(**shape))
    stock.save_pretrained(tmp_path, max_shard_size="60KB")
    found = inspect_checkpoint(str(tmp_path))
    assert (found.generation, found.model_type) == (generation, stock.config.model_type)
    assert found.layers == layers
    assert found.problems == []
    assert found.parameters["total"] == stock.num_parameters()
    assert found.dtype == "float32"
    assert found.files == len(list(tmp_path.glob("*.safetensors"))) > 1
    on_disk = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.memory.stored == sum(tensor.nbytes for tensor in on_disk.values())
    assert sum(each.numbers for each in found.formats) == sum(tensor.numel() for tensor in on_disk.values())
    assert sum(group.count for group in found.tensors) == len(on_disk)
    assert found.memory.fp32 == 2 * found.memory.bf16 == 4 * sum(t.numel() for t in stock.state_dict().values())


@pytest.mark.parametrize("generation", ["classic", "moe", "v2", "v3", "v3.2", "v4"])
def test_own_folders(generation, tmp_path: Path):
    model = FathomForCausalLM(FathomConfig.preset(generation, vocab_size=99, hidden_size=128)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(str(tmp_path), context=1000)
    assert found.problems == []
    assert (found.generation, found.dtype) == (generation, "bfloat16")
    counts = model.parameter_counts()
    assert found.parameters == {**counts, "active_without_input_embedding": counts["active"] - 99 * 128}
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    others = sum(tensor.numel() for tensor in model.state_dict().values()) - sum(trained)
    assert found.memory.adamw == 16 * sum(trained) + 4 * others
    json.loads(found.as_json())


def test_a_folder_without_head(tmp_path: Path):
    """Of the class that its config names."""
    FathomModel(FathomConfig.preset("v3", vocab_size=99, hidden_size=128)).save_pretrained(tmp_path)
    assert inspect_checkpoint(str(tmp_path)).problems == []


def test_cache_of_v3():
    """DeepSeek-V2, arXiv 2405.04434, table 1: (512 + 64) numbers per layer, where 128 heads of 192 + 128 would be."""
    cache = inspect_checkpoint("v3-671b", context=10).cache
    assert cache.bytes_per_token == cache.released_bytes_per_token == 61 * (512 + 64) * 2
    assert cache.multi_head_bytes_per_token == 61 * 128 * (192 + 128) * 2
    assert cache.bytes_at_context == 10 * cache.bytes_per_token
    assert cache.multi_head_bytes_at_context == 10 * cache.multi_head_bytes_per_token


def test_cache_of_v4_holds_windows_beside_the_past():
    cache = inspect_checkpoint("v4", context=100).cache
    assert cache.bytes_at_context > 100 * cache.bytes_per_token


@pytest.mark.parametrize(
    ("preset", "layers"),
    [
        ("v3-671b", ["0-2 mla + dense", "3-60 mla + moe"]),
        ("v4-flash", ["0-1 swa + hash", "2 csa + hash", "3-42 hca/csa in turn + moe"]),
        ("v4-pro", ["0-1 hca + hash", "2 csa + hash", "3-60 hca/csa in turn + moe"]),
        ("classic", ["0-3 mha + dense"]),
    ],
)
def test_layers_of_presets(preset, layers):
    config = FathomConfig.preset(preset)
    assert list(map(str, layer_runs(config, range(config.num_hidden_layers)))) == layers


def test_a_preset_has_tensors_but_no_files():
    found = inspect_checkpoint("v3-small")
    assert (found.files, found.formats, found.memory.stored, found.problems) == (0, [], None, [])
    assert found.shape["hidden_size"] == 768
    experts = [each for each in found.tensors if each.name == "layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
    assert [(each.count, each.shape) for each in experts] == [(16 * 16, (768, 384))]  # 15 layers and the MTP layer


def deepseek_v4_folder(folder: Path) -> dict[str, torch.Tensor]:
    """A folder as DeepSeek publishes V4: its names, FP8 matrices, FP4 experts, one MTP layer (SPEC of the release)."""
    folder.mkdir()
    width, heads, experts, inner, streams = 32, 4, 4, 32, 4
    bf16 = {"embed.weight": (67, width), "head.weight": (67, width), "norm.weight": (width,)}
    fp32 = {"hc_head_fn": (streams, streams * width), "hc_head_base": (streams,), "hc_head_scale": (1,)}
    fp8: dict[str, tuple[int, int]] = {}
    fp4: dict[str, tuple[int, int]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for layer in ("layers.0", "layers.1", "layers.2", "mtp.0"):
        attn = f"{layer}.attn"
        fp8 |= {f"{attn}.wq_a": (20, width), f"{attn}.wq_b": (heads * 16, 20), f"{attn}.wkv": (16, width)}
        fp8 |= {f"{attn}.wo_a": (2 * 12, 2 * 16), f"{attn}.wo_b": (width, 2 * 12)}
        bf16 |= {f"{attn}.q_norm.weight": (20,), f"{attn}.kv_norm.weight": (16,)}
        bf16 |= {f"{layer}.attn_norm.weight": (width,), f"{layer}.ffn_norm.weight": (width,)}
        fp32 |= {f"{attn}.attn_sink": (heads,)}
        for part in ("attn", "ffn"):
            fp32 |= {f"{layer}.hc_{part}_fn": (6 * streams, streams * width), f"{layer}.hc_{part}_base": (6 * streams,)}
            fp32 |= {f"{layer}.hc_{part}_scale": (3,)}
        bf16 |= {f"{layer}.ffn.gate.weight": (experts, width)}
        fp8 |= {f"{layer}.ffn.shared_experts.w{n}": (inner, width) for n in (1, 2, 3)}
        fp4 |= {f"{layer}.ffn.experts.{e}.w{n}": (inner, width) for e in range(experts) for n in (1, 2, 3)}
        if layer == "layers.0":
            tensors[f"{layer}.ffn.gate.tid2eid"] = torch.zeros(67, 2, dtype=torch.int64)
        else:
            fp32 |= {f"{layer}.ffn.gate.bias": (experts,)}
    compressors = [("layers.1.attn.compressor", 4, 2, 16), ("layers.2.attn.compressor", 16, 1, 16)]
    for name, block, halves, out in [*compressors, ("layers.1.attn.indexer.compressor", 4, 2, 8)]:
        fp32 |= {f"{name}.ape": (block, halves * out)}
        bf16 |= {f"{name}.wkv.weight": (halves * out, width), f"{name}.wgate.weight": (halves * out, width)}
        bf16 |= {f"{name}.norm.weight": (out,)}
    fp8 |= {"layers.1.attn.indexer.wq_b": (4 * 8, 20)}
    bf16 |= {"layers.1.attn.indexer.weights_proj.weight": (4, width)}
    fp8 |= {"mtp.0.e_proj": (width, width), "mtp.0.h_proj": (width, width)}
    bf16 |= {f"mtp.0.{name}.weight": (width,) for name in ("enorm", "hnorm", "norm")}
    fp32 |= {f"mtp.0.{name}": shape for name, shape in list(fp32.items())[:3]}
    bf16 |= {"mtp.0.head.weight": (67, width), "mtp.0.emb.tok_emb.weight": (67, width)}

    tensors |= {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in bf16.items()}
    tensors |= {name: torch.zeros(shape) for name, shape in fp32.items()}
    for name, (rows, columns) in fp8.items():
        tensors[f"{name}.weight"] = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
        scales = math.ceil(rows / 16), math.ceil(columns / 16)
        tensors[f"{name}.scale"] = torch.zeros(scales, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    for name, (rows, columns) in fp4.items():
        tensors[f"{name}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.int8)
        tensors[f"{name}.scale"] = torch.zeros(rows, columns // 16, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors, folder / "model.safetensors")
    config = {name: value for name, value in V4.items() if name not in ("layer_types", "mlp_layer_types")}
    config |= {"compress_ratios": [0, 4, 16, 0], "compress_rate_hca": 16, "num_nextn_predict_layers": 1}
    del config["compress_rates"]
    config |= {"num_hash_layers": 1, "scoring_func": "sqrtsoftplus", "hc_mult": 4, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", **config}))
    return tensors


def test_deepseeks_own_files(tmp_path: Path):
    tensors = deepseek_v4_folder(tmp_path / "v4")
    found = inspect_checkpoint(str(tmp_path / "v4"))
    assert found.problems == []
    assert (found.generation, found.dtype) == ("v4", "bfloat16")
    assert (found.layers, found.mtp_layers) == (STOCK["v4"][3], ["3 swa + moe"])
    formats = {each.format: each for each in found.formats}
    assert set(formats) == {"bf16", "fp32", "int64", "FP8 e4m3", "FP4 e2m1, two in a byte"}
    fp4, fp8 = formats["FP4 e2m1, two in a byte"], formats["FP8 e4m3"]
    assert (fp4.tensors, fp4.numbers, fp4.bytes) == (48, 48 * 32 * 32, 48 * 32 * 16)
    assert fp4.scales == "one ue8m0 per 1 x 16"
    assert fp8.scales == "one ue8m0 per 16 x 16"
    assert found.memory.stored == sum(tensor.nbytes for tensor in tensors.values())
    assert found.parameters["total"] == DeepseekV4ForCausalLM(DeepseekV4Config(**V4)).num_parameters()
    groups = {each.name: each for each in found.tensors}
    assert groups["layers.{layer}.ffn.experts.{expert}.w1.weight"].count == 12
    assert groups["mtp.{layer}.ffn.experts.{expert}.w1.weight"].shape == (32, 16)


def test_names_of_fp8_v3_files(tmp_path: Path):
    """Of DeepSeek-V3: `weight_scale_inv`, and copies of embedding and head in the MTP layer."""
    model = FathomForCausalLM(FathomConfig.preset("v3", vocab_size=99, hidden_size=128))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    tensors["model.layers.4.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    found = inspect_checkpoint(str(tmp_path))
    assert found.problems == []
    assert ("FP8 e4m3", 1, "one fp32 per 128 x 128") in [(e.format, e.tensors, e.scales) for e in found.formats]


def test_no_tensor_is_read(tmp_path: Path):
    """V2-Lite as a file of 31 GB that has no content: its header alone lies on the disk."""
    config = FathomConfig.preset("v2-lite")
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = FathomForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        size = 2 * tensor.numel()
        # Experts fused, as in memory: the other form in which a file may hold them.
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    found = inspect_checkpoint(str(tmp_path))
    assert found.problems == []
    assert found.memory.stored == found.memory.bf16 == 2 * 15_706_484_224


@pytest.fixture
def sharded(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    FathomForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path, max_shard_size="300KB")
    return tmp_path


def test_faults_of_files_are_reported_together(sharded: Path):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[0].unlink()
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-10])
    found = inspect_checkpoint(str(sharded))
    assert found.problems[0].startswith(f"{shards[0].name} is missing, with ")
    assert (
        f"{shards[1].name} is truncated: {len(content)} bytes expected, {len(content) - 10} found" in found.problems[1]
    )
    assert re.match(r"\d+ tensors are missing that the config expects: ", found.problems[2])


def test_a_shard_without_a_tensor_of_the_index(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    content["weight_map"]["model.layers.0.extra"] = shard
    index.write_text(json.dumps(content))
    assert inspect_checkpoint(str(sharded)).problems == [
        f"{shard} lacks 1 of its tensors in model.safetensors.index.json, first model.layers.0.extra"
    ]


def test_tensors_that_do_not_fit_the_config(tiny_checkpoint: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(3)
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, folder / "model.safetensors")
    assert inspect_checkpoint(str(folder)).problems == [
        "1 tensor is missing that the config expects: layers.1.mlp.experts.3.up_proj.weight",
        "1 tensor is there that the config does not expect: model.layers.0.self_attn.q_norm.weight",
        "1 tensor does not have the shape that the config says: model.norm.weight is [63], should be [64]",
    ]


def test_a_header_that_does_not_say_a_shape(tiny_checkpoint: Path, tmp_path: Path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    text = json.dumps({"lm_head.weight": {"dtype": "F32", "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "its header is no safetensors header" in inspect_checkpoint(str(tmp_path)).problems[0]


def test_a_folder_without_weights(tiny_checkpoint: Path, tmp_path: Path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    found = inspect_checkpoint(str(tmp_path))
    assert found.problems == [
        f"{tmp_path} has neither model.safetensors nor model.safetensors.index.json: the weights are missing"
    ]
    assert found.parameters["total"] > 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no config.json: it holds no model"),
        ({"model_type": "llama"}, "model_type 'llama'; Fathom knows fathom, deepseek, deepseek_v2"),
        ({"model_type": "deepseek_v3", "hidden_size": 0}, "describes no model that can be built: hidden_size=0"),
    ],
)
def test_no_model_of_deepseeks(content, says, tmp_path: Path):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(says)):
        inspect_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("v3-671", "unknown size '671' of v3; did you mean 671b?"),
        ("v4-flesh", "unknown size 'flesh' of v4; did you mean flash?"),
        ("v33", "there is no folder v33 and no preset of that name; did you mean v3"),
        ("nothing/of/the/kind", "there is no folder nothing/of/the/kind"),
        ("someone/model", "cannot reach"),  # tests are offline
    ],
)
def test_no_such_source(source, says):
    with pytest.raises(UserError, match=re.escape(says)):
        inspect_checkpoint(source)


def test_on_the_hub_only_headers_are_fetched(hub, client, tiny_checkpoint: Path, tmp_path: Path):
    upload = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("tester/tiny")
HfApi().upload_folder(repo_id="tester/tiny", folder_path=sys.argv[1])
"""
    assert client(upload, tiny_checkpoint).returncode == 0
    show = """
import json
from fathom.training.inspection import inspect_checkpoint
print(inspect_checkpoint("tester/tiny").as_json())
"""
    done = client(show)
    assert done.returncode == 0, done.stderr
    remote, local = json.loads(done.stdout), json.loads(inspect_checkpoint(str(tiny_checkpoint)).as_json())
    of_folders = {"source": "", "tokenizer": "", "values_read": False}
    assert {**remote, **of_folders} == {**local, **of_folders}
    assert not list(tmp_path.rglob("model.safetensors"))


def test_names_of_one_tensor_by_its_three_writers():
    """DeepSeek's name, transformers' on disk and transformers' in memory (SPEC of the V4 release)."""
    for official, written, memory in [
        ("embed.weight", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("head.weight", "head.weight", "lm_head.weight"),
        ("hc_head_fn", "model.hc_head.hc_fn", "model.hc_head.hc_fn"),
        ("layers.2.attn.kv_norm.weight", "model.layers.2.attn.norm.weight", "model.layers.2.self_attn.kv_norm.weight"),
        ("layers.2.hc_ffn_scale", "model.layers.2.hc_ffn_scale", "model.layers.2.ffn_hc.scale"),
        ("mtp.0.norm.weight", "mtp.0.norm.weight", "model.layers.3.shared_head.norm.weight"),
        ("mtp.1.hc_head_base", "mtp.1.hc_head_base", "model.layers.4.hc_head.hc_base"),
    ]:
        assert len({canonical_name(name, 3) for name in (official, written, memory)}) == 1
