"""DeepSeek's FP8 and FP4 weights become plain ones: the same numbers as by hand, and no copy too many."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import stock_model

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.quantized_weights import block_size, dequantize

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def quantize_fp8(weight: torch.Tensor, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight -> e4m3, scales, and what they mean, by a loop over blocks of 128 x 128."""
    rows, columns = weight.shape
    numbers, meaning = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    scales = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            scale = weight[block].abs().max().clamp(min=1e-4) / 448
            scales[i, j] = 2 ** torch.ceil(torch.log2(scale)) if ue8m0 else scale
            numbers[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meaning[block] = numbers[block].float() * scales[i, j]
    return numbers, scales.to(torch.float8_e8m0fnu) if ue8m0 else scales, meaning


def quantize_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight -> two e2m1 codes per byte, ue8m0 scales of 32 columns, and what they mean."""
    rows, columns = weight.shape
    scales, meaning = torch.empty(rows, math.ceil(columns / 32)), torch.empty(rows, columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for group, values in enumerate(weight.split(32, dim=1)):
        part = slice(32 * group, 32 * group + values.shape[1])
        scales[:, group] = 2 ** torch.ceil(torch.log2(values.abs().amax(dim=1) / 6))
        distances = ((values / scales[:, group, None]).abs().unsqueeze(-1) - torch.tensor(E2M1)).abs()
        sizes, signs = distances.argmin(dim=-1), values.sign()
        codes[:, part] = (sizes + 8 * (signs < 0)).to(torch.uint8)
        meaning[:, part] = signs * torch.tensor(E2M1)[sizes] * scales[:, group, None]
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    return packed.view(torch.int8), scales.to(torch.float8_e8m0fnu), meaning


@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32 scales", "ue8m0 scales"])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (576, 200), (130, 7), (1, 129), (24, 16)], ids=str)
def test_fp8(shape, ue8m0):
    """Also where the last block of a row or column is smaller: 576 rows are 4.5 blocks."""
    torch.manual_seed(0)
    numbers, scales, meaning = quantize_fp8(torch.randn(shape) * torch.rand(shape[0], 1) * 9, ue8m0)
    assert torch.equal(dequantize(numbers, scales), meaning)
    if ue8m0:
        assert torch.equal(dequantize(numbers, scales.view(torch.uint8)), meaning)


@pytest.mark.parametrize("shape", [(3, 64), (5, 32), (2, 80), (4, 16)], ids=str)
def test_fp4(shape):
    torch.manual_seed(0)
    packed, scales, meaning = quantize_fp4(torch.randn(shape) * torch.rand(shape[0], 1) * 9)
    assert torch.equal(dequantize(packed, scales), meaning)


@pytest.mark.parametrize("block", [1, 32, 64, 128])
def test_the_block_size_follows_from_the_shapes(block):
    for size in range(block + 1, 6 * block + 2):
        assert block_size(size, math.ceil(size / block)) == block


def quantize_folder(folder: Path, scale_name: str, ue8m0: bool, fp4_experts: bool) -> dict[str, torch.Tensor]:
    """Replaces the matrices of the layers by quantised ones; returns what the tensors of the folder mean."""
    meanings, index = {}, {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        written = {}
        for name, tensor in load_file(file).items():
            matrix = tensor.dim() == 2 and (name.endswith("_proj.weight") or name.split(".")[-2].startswith("w"))
            if not matrix or "compressor" in name or "weights_proj" in name:
                written[name] = meanings[name] = tensor
                continue
            fp4 = fp4_experts and ".experts." in name
            numbers, scales, meanings[name] = quantize_fp4(tensor) if fp4 else quantize_fp8(tensor, ue8m0)
            written[name] = numbers
            written[name.removesuffix("weight") + scale_name] = scales
        save_file(written, file, metadata={"format": "pt"})
        index |= dict.fromkeys(written, file.name)
    if len(files) > 1:
        # A scale may lie in another file than its weight.
        content = {"metadata": {"total_size": 1}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FP8_CONFIG | ({"scale_fmt": "ue8m0"} if ue8m0 else {})
    if fp4_experts:
        config["expert_dtype"] = "fp4"
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert len(written) > len(load_file(files[-1]).keys() & meanings.keys())
    return meanings


FORMATS = {
    "v3": ("v3", "weight_scale_inv", False, False),
    "v3.1": ("v3", "weight_scale_inv", True, False),
    "v3.2": ("v3.2", "weight_scale_inv", True, False),
    "v4 fp8": ("v4", "scale", True, False),
    "v4 fp4": ("v4", "scale", True, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_checkpoint_loads_as_what_it_means(tmp_path, kind, dtype):
    """Equal, bit by bit, to a checkpoint that holds the dequantised numbers; and no longer called quantised."""
    generation, scale_name, ue8m0, fp4 = FORMATS[kind]
    stock = stock_model(generation, seed=1, hidden_size=160, moe_intermediate_size=48, tie_word_embeddings=False)
    stock.save_pretrained(tmp_path / "quantised", max_shard_size="300KB")
    stock.save_pretrained(tmp_path / "plain")
    meanings = quantize_folder(tmp_path / "quantised", scale_name, ue8m0, fp4)
    save_file(meanings, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})

    loaded, report = FathomForCausalLM.from_pretrained(tmp_path / "quantised", dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    expected = FathomForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16 if dtype == "auto" else dtype
    ).state_dict()
    for name, value in loaded.state_dict().items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name

    assert not getattr(loaded, "is_quantized", False)
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in written
    assert "expert_dtype" not in written
    again = FathomForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_a_weight_without_its_scale_is_refused(tmp_path):
    stock_model("v3", seed=1).save_pretrained(tmp_path)
    quantize_folder(tmp_path, "weight_scale_inv", ue8m0=False, fp4_experts=False)
    tensors = load_file(tmp_path / "model.safetensors")
    scale = next(name for name in tensors if name.endswith("_scale_inv"))
    misfit = {**tensors, scale: torch.ones(3, 5)}
    save_file(misfit, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not divide it into equal blocks"):
        FathomForCausalLM.from_pretrained(tmp_path)
    del tensors[scale]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{scale.removesuffix('_scale_inv')} is F8_E4M3, but there is no"):
        FathomForCausalLM.from_pretrained(tmp_path)


PEAK = """
import re, sys, torch
from pathlib import Path
from fathom import FathomForCausalLM

def memory(what):
    return 1024 * int(re.search(rf"{what}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

FathomForCausalLM.from_pretrained(sys.argv[1])  # what loading any model costs
before = memory("VmRSS")
model = FathomForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
print(sum(parameter.nbytes for parameter in model.parameters()), memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_about_the_models_own(tmp_path):
    """Many layers in shards: what is read is dequantised, placed and forgotten tensor by tensor."""
    stock_model("v3").save_pretrained(tmp_path / "tiny")
    config = FathomConfig.preset(
        "v3",
        hidden_size=512,
        num_hidden_layers=12,
        num_nextn_predict_layers=0,
        vocab_size=512,
        n_routed_experts=16,
        moe_intermediate_size=128,
    )
    FathomForCausalLM(config).save_pretrained(tmp_path / "large", max_shard_size="15MB")
    content = json.loads((tmp_path / "large" / "config.json").read_text())
    index = json.loads((tmp_path / "large" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    for file in (tmp_path / "large").glob("*.safetensors"):
        written = {}
        for name, tensor in load_file(file).items():
            written[name] = tensor
            if name.endswith("_proj.weight"):
                numbers, scales, _ = quantize_fp8(tensor, ue8m0=False)
                written |= {name: numbers, f"{name}_scale_inv": scales}
                index["weight_map"][f"{name}_scale_inv"] = file.name
        save_file(written, file, metadata={"format": "pt"})
    (tmp_path / "large" / "model.safetensors.index.json").write_text(json.dumps(index))
    v3 = {"model_type": "deepseek_v3", "quantization_config": FP8_CONFIG, "num_nextn_predict_layers": 0}
    (tmp_path / "large" / "config.json").write_text(json.dumps({**content, **v3}))

    command = [sys.executable, "-c", PEAK, str(tmp_path / "tiny"), str(tmp_path / "large")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    size, added = map(int, process.stdout.split())
    assert size > 150e6
    # Beside the model: the files, a quarter of it, mapped into memory, and the experts of one layer.
    assert added < 1.5 * size
