"""Weights in int8: the numbers of a model whose weights were rounded, through native functions and without them."""

import copy

import pytest
import torch
from generations import GENERATIONS, model, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import int8, native
from fathom.modeling.attention import MultiHeadLatentAttention
from fathom.modeling.experts import RoutedExperts
from fathom.modeling.int8 import Int8Experts, Int8GroupedLinear, Int8Linear
from fathom.modeling.modeling_fathom import FathomPreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the largest logit: fp32 sums in another order, and bf16 rounds what native functions keep in fp32.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# What stays as it is, by the last parts of names.
KEPT = ["embed_tokens.weight", "kv_b_proj.weight", "norm.weight", "gate.weight", "weights_proj.weight", "sinks", "bias"]
KEPT += ["_hc.fn", "_hc.base", "_hc.scale", ".hc_fn", ".hc_base", ".hc_scale"]


def rounded(quantized: nn.Module, original: FathomPreTrainedModel) -> FathomPreTrainedModel:
    """The original with the weights that the quantised one has, as plain numbers."""
    plain = copy.deepcopy(original)
    for name, module in quantized.named_modules():
        own = plain.get_submodule(name)
        if isinstance(module, Int8Experts):
            for each in ("gate_up_proj", "down_proj"):
                scale = getattr(module, f"{each}_scale")
                getattr(own, each).data = (getattr(module, each).float() * scale[..., None]).to(original.dtype)
        elif isinstance(module, Int8Linear | Int8GroupedLinear):
            own.weight.data = (module.weight.float() * module.scale[:, None]).to(original.dtype)
    return plain


def both(generation: str, dtype: torch.dtype = torch.float32) -> tuple[FathomForCausalLM, FathomForCausalLM]:
    """A model in int8, and one that has its weights as plain numbers."""
    original = model(generation).to(dtype)
    quantized = copy.deepcopy(original).quantize_int8()
    return quantized, rounded(quantized, original)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= CLOSE[found.dtype]


def test_rounding():
    weight = torch.randn(2, 5, 300)
    weight[1, 3] = 0
    numbers, scale = int8.quantize_rows(weight)
    assert numbers.dtype == torch.int8
    assert scale.shape == (2, 5)
    largest = numbers.abs().amax(dim=-1)
    assert largest[1, 3] == 0
    largest[1, 3] = 127
    assert (largest == 127).all()
    restored = numbers.double() * scale[..., None].double()
    assert ((restored - weight).abs() <= 0.5001 * scale[..., None]).all()
    # More numbers than are restored at a time.
    numbers, scale = torch.randint(-127, 128, (3, 800, 900), dtype=torch.int8), torch.rand(3, 800)
    expected = (numbers.double() * scale[..., None].double()).bfloat16()
    assert torch.equal(int8.restore_rows(numbers, scale, torch.float32).bfloat16(), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [64, 128, 200, 37], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 16, 17], ids=str)
def test_linear_maps_of_any_width(dtype, width, batch):
    """Widths of whole blocks and not, with a bias, few tokens and many."""
    native.wait()
    torch.manual_seed(0)
    linear = nn.Linear(width, 50).to(dtype)
    quantized = Int8Linear(linear).eval()
    x = torch.randn(batch, 1, width).to(dtype)
    weight = quantized.weight.double() * quantized.scale.double()[:, None]
    expected = x.double() @ weight.T + linear.bias.double()
    with torch.no_grad():
        assert_close(quantized(x), expected)
        assert_close(quantized(x.transpose(0, 1)), expected.transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("inner", [32, 64, 200], ids=str)
@pytest.mark.parametrize("count", [1, 5, 40], ids=str)
def test_experts_of_any_width(dtype, inner, count):
    """Few tokens and many, with a clamp, against a loop in fp64."""
    native.wait()
    torch.manual_seed(0)
    sizes = {"hidden_size": 136, "moe_intermediate_size": inner, "n_routed_experts": 8, "swiglu_limit": 1.5}
    experts = RoutedExperts(FathomConfig.preset("v4", **sizes)).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    quantized = Int8Experts(experts).eval()
    x, weights = torch.randn(count, 136).to(dtype), torch.rand(count, 3)
    indices = torch.rand(count, 8).topk(3).indices
    gate_up = quantized.gate_up_proj.double() * quantized.gate_up_proj_scale.double()[..., None]
    down = quantized.down_proj.double() * quantized.down_proj_scale.double()[..., None]
    expected = torch.zeros(count, 136, dtype=torch.float64)
    for token in range(count):
        for weight, expert in zip(weights[token], indices[token], strict=True):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            inside = nn.functional.silu(gate.clamp(max=1.5)) * up.clamp(-1.5, 1.5)
            expected[token] += weight.double() * (down[expert] @ inside)
    with torch.no_grad():
        assert_close(quantized(x, indices, weights), expected)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_many_tokens_at_once(generation):
    quantized, expected = both(generation)
    ids = tokens()
    with torch.no_grad():
        assert_close(quantized(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("compiler", [True, False], ids=["native", "without-compiler"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_token_by_token(generation, compiler, monkeypatch):
    """A prompt, then single tokens and a few at a time, as drafting reads them."""
    if compiler and not native.wait():
        pytest.skip("there is no C++ compiler")
    if not compiler:
        monkeypatch.setattr(int8, "kernels_for", lambda *_: None)
    restored, restore = [], int8.restore_rows
    monkeypatch.setattr(int8, "restore_rows", lambda *each: restored.append(each) or restore(*each))
    quantized, expected = both(generation)
    ids = tokens()
    with torch.no_grad():
        caches = [each(ids[:, :10], use_cache=True).cache for each in (quantized, expected)]
        for start, end in ((10, 11), (11, 12), (12, 16), (16, 17), (17, 24)):
            restored.clear()
            part = [
                each(ids[:, start:end], cache=cache).logits
                for each, cache in zip((quantized, expected), caches, strict=True)
            ]
            assert_close(*part)
            assert bool(restored) is not compiler


@pytest.mark.parametrize("generation", GENERATIONS)
def test_bf16_beside_int8(generation):
    """For the median token: between functions both round alike, but here and there another expert is chosen."""
    if not native.wait():
        pytest.skip("there is no C++ compiler")
    quantized, expected = both(generation, torch.bfloat16)
    ids = tokens(batch=1, length=6)
    caches: list = [None, None]
    errors = []
    with torch.no_grad():
        for i in range(6):
            outputs = [
                each(ids[:, i : i + 1], cache=cache, use_cache=True)
                for each, cache in zip((quantized, expected), caches, strict=True)
            ]
            caches = [each.cache for each in outputs]
            found, wanted = (each.logits.float() for each in outputs)
            errors.append((found - wanted).norm() / wanted.norm())
    assert torch.stack(errors).median() < CLOSE[torch.bfloat16]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_is_kept_and_how_far_logits_move(generation):
    original = model(generation)
    ids = tokens(batch=8)
    with torch.no_grad():
        expected = original(ids).logits
        counts = original.parameter_counts()
        quantized = original.quantize_int8()
        found = quantized(ids).logits
    assert quantized is original
    for name, parameter in quantized.named_parameters():
        kept = name.endswith(tuple(KEPT))
        assert (parameter.dtype == torch.int8) is not kept, name
        assert not parameter.requires_grad
    assert quantized.parameter_counts() == counts
    # Of the median token: for some, another expert or key is chosen, and the logits are others.
    moved = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 1e-4 < moved.median() < 0.05


def test_half_the_bytes():
    ours = FathomForCausalLM(FathomConfig.preset("v3", "nano")).to(torch.bfloat16)
    before = ours.get_memory_footprint()
    assert ours.quantize_int8().get_memory_footprint() < 0.6 * before


@pytest.mark.parametrize("generation", ["v3", "v4"])
def test_generates_and_drafts_what_plain_numbers_do(generation):
    quantized, expected = both(generation)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 24)}
    plain = expected.generate(tokens(), **settings)
    assert torch.equal(quantized.generate(tokens(), **settings), plain)
    assert torch.equal(quantized.generate(tokens(), use_mtp=True, **settings), plain)


def test_attention_stays_absorbed():
    """With a weight that it cannot take apart, every step would expand the whole cache again."""
    quantized, _ = both("v3")
    layers = [module for module in quantized.modules() if isinstance(module, MultiHeadLatentAttention)]
    assert layers
    assert all(each.knows_expansion() for each in layers)


def test_foreign_quantised_weights_are_not_taken_apart():
    """Those of libraries are tensors of their own class inside an `nn.Linear`."""

    class Packed(torch.Tensor):
        pass

    attention = MultiHeadLatentAttention(FathomConfig.preset("v3"), 0)
    assert attention.knows_expansion()
    packed = attention.kv_b_proj.weight.detach().as_subclass(Packed)
    attention.kv_b_proj.weight = nn.Parameter(packed, requires_grad=False)
    assert not attention.knows_expansion()


def test_a_head_that_is_the_embedding_stays():
    tied = model("v3", tie_word_embeddings=True).quantize_int8()
    assert type(tied.lm_head) is nn.Linear
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert type(model("v3").quantize_int8().lm_head) is Int8Linear


def test_scales_stay_in_fp32():
    quantized = model("v4").quantize_int8().to(torch.bfloat16)
    scales = [each for name, each in quantized.named_buffers() if name.endswith("scale")]
    assert scales
    assert all(each.dtype == torch.float32 for each in scales)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_does_not_train(generation):
    quantized = model(generation).quantize_int8()
    with pytest.raises(RuntimeError, match="train the model that this one was made of"):
        quantized.train()(tokens(), labels=tokens())


def test_is_not_saved(tmp_path):
    ours = model("v3")
    ours.save_pretrained(tmp_path / "plain")
    ours.quantize_int8()
    with pytest.raises(ValueError, match="before quantize_int8"):
        ours.save_pretrained(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").quantize_int8()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, ours(tokens()).logits)


def test_weights_on_disk_are_refused():
    with torch.device("meta"):
        ours = FathomForCausalLM(FathomConfig.preset("v3"))
    with pytest.raises(ValueError, match=r"layers\.0\..* is not in memory; load the model without device_map"):
        ours.quantize_int8()
