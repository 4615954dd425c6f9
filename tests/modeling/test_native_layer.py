"""Decoder layers by one native call against the same layers module by module, and when they are called that way."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import DynamicCache, StaticCache

from fathom.modeling import (
    attention,
    decoder_layer,
    fused,
    int8,
    layer_operator,
    native,
    native_compressed,
    native_layer,
    native_step,
)
from fathom.modeling.cache import adopt_cache
from fathom.modeling.configuration_fathom import FathomConfig
from fathom.modeling.experts import RoutedExperts
from fathom.modeling.modeling_fathom import FathomForCausalLM

pytestmark = [
    pytest.mark.skipif(not native.wait(), reason="there is no C++ compiler"),
    pytest.mark.usefixtures("long_texts"),  # calls of steps are counted
]

# Of the largest logit. Experts and shared experts are rounded apart from each other in modules, together in a layer.
CLOSE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
KINDS = {
    "moe": {},
    "v2": {},
    "v2-without-query-latent": {"q_lora_rank": None},
    "v3": {},
    "v3-without-shared-experts": {"n_shared_experts": 0},
    "v3-groups": {"n_group": 4, "topk_group": 2},
    "v3.2": {"index_topk": 20},
    "v3.2-dense": {"index_topk": 20, "index_dense": True},
    "v4": {},
    "v4-choosing": {"index_topk": 4},
    "v4-dense": {"index_topk": 4, "index_dense": True},
    "v4-one-stream": {"hc_mult": 1},
}
# Rounding to bf16 would change what is chosen.
EVERYTHING = {"num_experts_per_tok": 16, "topk_group": 4, "n_group": 4, "index_topk": 4096}


def model(kind: str, dtype: torch.dtype = torch.float32, **settings) -> FathomForCausalLM:
    torch.manual_seed(0)
    overrides = {"num_nextn_predict_layers": 0, **KINDS[kind], **settings}
    return FathomForCausalLM(FathomConfig.preset(kind.split("-")[0], **overrides)).eval().to(dtype)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which of the two functions did something."""
    found: list[str] = []
    for name in ("decode_layer", "decode_compressed", "decode_channels"):
        original = getattr(decoder_layer, name)

        def spy(*args, name=name, original=original):
            output = original(*args)
            if output is not None:
                found.append(name)
            return output

        monkeypatch.setattr(decoder_layer, name, spy)
    return found


@pytest.fixture
def module_by_module(monkeypatch):
    """Switches native layers off (and on again)."""

    def switch(off: bool) -> None:
        for module in (native_step, native_compressed):
            monkeypatch.setattr(module, "native_layer", NOTHING if off else FOUND)

    class Nothing:
        decodes = None

    FOUND, NOTHING = native_layer.native_layer, lambda layer: Nothing
    return switch


def read(network: FathomForCausalLM, static: bool, rows: int = 2):
    """Steps of one and of several tokens after a prompt whose rows are padded on the left."""
    torch.manual_seed(1)
    ids, mask = torch.randint(5, 4000, (rows, 70)), torch.ones(rows, 70, dtype=torch.int64)
    mask[1:, :9] = 0
    at = 50
    cache = None
    if static:
        cache = StaticCache(network.config, max_cache_len=80)
        adopt_cache(cache, network.config)
    with torch.no_grad():
        output = network(ids[:, :at], attention_mask=mask[:, :at], cache=cache, use_cache=True)
        cache, logits, counts = output.cache, [], []
        for count in (1, 1, 3, 1, 5, 2):
            seen, at = slice(at, at + count), at + count
            output = network(ids[:, seen], attention_mask=mask[:, :at], cache=cache, use_cache=True)
            logits.append(output.logits)
            counts.append(output.expert_counts)
    return torch.cat(logits, 1), counts, cache


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_layer_in_one_call(kind, dtype, calls, module_by_module):
    network = model(kind, dtype, **(EVERYTHING if dtype is torch.bfloat16 else {}))
    found, counts, cache = read(network, static=False)
    whole = {"v4": "compressed", "moe": "channels"}.get(kind.split("-")[0], "layer")
    assert calls == [f"decode_{whole}"] * (6 * network.config.num_hidden_layers)
    module_by_module(True)
    calls.clear()
    expected, expected_counts, expected_cache = read(network, static=False)
    assert not calls
    scale = expected.float().abs().max()
    torch.testing.assert_close(found.float() / scale, expected.float() / scale, atol=CLOSE[dtype], rtol=0)
    for one, other in zip(counts, expected_counts, strict=True):
        assert torch.equal(one, other)
    assert cache.nbytes() == expected_cache.nbytes()
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["v2-without-query-latent", "v3", "v3.2", "v4", "v4-choosing"])
def test_weights_in_int8(kind, dtype, calls, module_by_module):
    network = model(kind, dtype, **(EVERYTHING if dtype is torch.bfloat16 else {})).quantize_int8()
    found, counts, _ = read(network, static=False)
    whole = "compressed" if kind.startswith("v4") else "layer"
    assert calls == [f"decode_{whole}"] * (6 * network.config.num_hidden_layers)
    module_by_module(True)
    expected, expected_counts, _ = read(network, static=False)
    scale = expected.float().abs().max()
    torch.testing.assert_close(found.float() / scale, expected.float() / scale, atol=CLOSE[dtype], rtol=0)
    for one, other in zip(counts, expected_counts, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("length", [90, 1201])
def test_channels_of_a_text_in_one_call(kind, length, dtype, calls, module_by_module, monkeypatch):
    """Of texts of any length; of long ones each thread takes some tokens, and counts those of their experts."""
    monkeypatch.setattr(fused, "multiplies_texts", lambda dtype: True)
    # Of many tokens some have two choices that are equal but for rounding.
    network = model(kind, dtype, **(EVERYTHING if dtype is torch.bfloat16 or length > 1000 else {}))
    monkeypatch.setattr(decoder_layer, "decode_layer", lambda *_: None)
    ids, mask = torch.randint(5, 4000, (2, length)), torch.ones(2, length, dtype=torch.int64)
    mask[1:, : length // 4] = 0
    found = network(ids, attention_mask=mask)
    assert calls == ["decode_channels"] * network.config.num_hidden_layers
    module_by_module(True)
    expected = network(ids, attention_mask=mask)
    scale = expected.logits.float().abs().max()
    real = mask.bool()
    one, other = (each.logits[real].float() / scale for each in (found, expected))
    torch.testing.assert_close(one, other, atol=CLOSE[dtype], rtol=0)
    assert torch.equal(found.expert_counts, expected.expert_counts)


# Texts in a fresh cache, without padding (where there is no mask) and with it, and after another text.
@torch.no_grad()
@pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["v2-without-query-latent", "v3", "v3.2-dense"])
@pytest.mark.parametrize("lengths", [(2,), (90,), (1201,), (40, 1161)], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_text_in_one_call(kind, lengths, static, padded, dtype, calls, module_by_module, monkeypatch):
    monkeypatch.setattr(fused, "multiplies_texts", lambda dtype: True)
    network = model(kind, dtype, max_position_embeddings=2048, **EVERYTHING)
    all_ids, real = torch.randint(5, 4000, (2, sum(lengths) + 1)), torch.ones(2, sum(lengths) + 1, dtype=torch.int64)
    real[1:, : lengths[0] // 4 if padded else 0] = 0

    def read_all():
        cache = None
        if static:
            cache = StaticCache(network.config, max_cache_len=1210)
            adopt_cache(cache, network.config)
        logits, counts, at = [], [], 0
        for length in (*lengths, 1):
            ids, at = all_ids[:, at : at + length], at + length
            mask = real[:, :at] if padded else None
            output = network(ids, attention_mask=mask, cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits)
            counts.append(output.expert_counts)
        return torch.cat(logits, dim=1)[real.bool()].float(), counts, cache

    found, counts, cache = read_all()
    assert calls == ["decode_layer"] * ((1 + len(lengths)) * network.config.num_hidden_layers)
    module_by_module(True)
    expected, expected_counts, expected_cache = read_all()
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=CLOSE[dtype], rtol=0)
    for one, other in zip(counts, expected_counts, strict=True):
        assert torch.equal(one, other)
    assert int(cache.get_seq_length()) == int(expected_cache.get_seq_length()) == sum(lengths) + 1
    assert cache.nbytes() == expected_cache.nbytes()


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["v2-without-query-latent", "v3", "v3.2"])
@pytest.mark.parametrize("length", [90, 1201])
def test_what_a_last_layer_remembers(kind, length, dtype, module_by_module, monkeypatch):
    """Latents and the indexer's keys of all tokens but the last."""
    monkeypatch.setattr(fused, "multiplies_texts", lambda dtype: True)
    layer = model(kind, dtype).model.layers[0]
    hidden, position = (
        torch.randn(2, length, 256).to(dtype),
        torch.randn(2, 1, length, layer.self_attn.qk_rope_head_dim),
    )
    rotation = tuple(position[..., : position.shape[-1] // 2].to(dtype).contiguous())
    found = []
    for by_modules in (False, True):
        module_by_module(by_modules)
        cache = DynamicCache(config=layer.self_attn.config)
        adopt_cache(cache, layer.self_attn.config)
        inputs = {"position_embeddings": rotation, "cache": cache}
        assert decoder_layer.remember_but_last(layer, hidden, **inputs) is not by_modules
        if by_modules:
            layer.remember_but_last(hidden, **inputs)
        found.append(cache.layers[0])
    one, other = found
    assert one.get_seq_length() == other.get_seq_length() == length - 1
    torch.testing.assert_close(one.keys, other.keys, atol=CLOSE[dtype] * one.keys.abs().max().item(), rtol=0)
    if one.values.numel() or other.values.numel():
        torch.testing.assert_close(one.values, other.values, atol=CLOSE[dtype] * one.values.abs().max().item(), rtol=0)


@torch.no_grad()
def test_which_texts_are_read_otherwise(calls, monkeypatch):
    """Those that an indexer chooses keys for, those for which absorbing is cheaper, long ones, what is not causal."""
    monkeypatch.setattr(fused, "multiplies_texts", lambda dtype: True)
    network = model("v3.2", index_topk=200)
    first = network(torch.randint(5, 4000, (1, 200)), use_cache=True)
    whole = ["decode_layer"] * network.config.num_hidden_layers
    assert calls == whole
    calls.clear()
    network(torch.randint(5, 4000, (1, 201)))
    network(torch.randint(5, 4000, (1, 100)), cache=first.cache)
    assert "decode_layer" not in calls
    network = model("v3", max_position_embeddings=10_000)
    first = network(torch.randint(5, 4000, (1, 200)), use_cache=True)
    calls.clear()
    network(torch.randint(5, 4000, (1, 130)), cache=first.cache)
    network(torch.randint(5, 4000, (1, 20)), is_causal=False)
    monkeypatch.setattr(attention, "TOKENS_OF_ALL_HEADS", 29)
    network(torch.randint(5, 4000, (1, 30)))
    assert "decode_layer" not in calls


@torch.no_grad()
def test_int8_is_not_made_for_long_texts(calls, monkeypatch):
    monkeypatch.setattr(fused, "multiplies_texts", lambda dtype: True)
    network = model("v3").quantize_int8()
    network(torch.randint(5, 4000, (1, fused.SHORT_TEXT + 1)))
    assert not calls
    network(torch.randint(5, 4000, (1, fused.SHORT_TEXT)))
    assert calls == ["decode_layer"] * network.config.num_hidden_layers


def test_some_weights_in_int8(calls, module_by_module):
    """As of a model whose experts alone were put into int8, or all else."""
    for kinds in ((RoutedExperts,), (nn.Linear,)):
        network = model("v3")
        for name, module in list(network.model.layers.named_modules()):
            if type(module) in kinds and not name.endswith(int8.KEPT):
                network.model.layers.set_submodule(name, int8.KINDS[type(module)](module).eval())
        calls.clear()
        found, _, _ = read(network, static=False)
        assert calls
        module_by_module(True)
        torch.testing.assert_close(found, read(network, static=False)[0], atol=2e-5, rtol=0)
        module_by_module(False)


@pytest.mark.parametrize("kind", ["v3", "v3.2", "v4"])
def test_with_a_static_cache(kind, calls):
    network = model(kind)
    found, _, cache = read(network, static=True)
    assert calls
    assert int(cache.get_seq_length()) == 63
    torch.testing.assert_close(found, read(network, static=False)[0], atol=5e-6, rtol=0)


@pytest.mark.parametrize("kind", ["v3", "v3.2"])
def test_a_row_alone_and_beside_others(kind):
    """What a token comes out as does not depend on the rows beside it, to the last bit."""
    network = model(kind, torch.bfloat16)
    alone, _, _ = read(network, static=False, rows=1)
    assert torch.equal(read(network, static=False, rows=3)[0][:1], alone)


def test_a_full_static_cache_says_so_itself():
    network, ids = model("v3"), torch.arange(5, 15).unsqueeze(0)
    cache = StaticCache(network.config, max_cache_len=11)
    with torch.no_grad():
        network(ids, cache=cache, use_cache=True)
        network(ids[:, :1], cache=cache, use_cache=True)
        with pytest.raises((IndexError, RuntimeError)):
            network(ids[:, :1], cache=cache, use_cache=True)


def step(network: FathomForCausalLM, **settings):
    """One step of a sequence that always begins alike."""
    torch.manual_seed(2)
    ids = torch.randint(5, 4000, (1, 31))
    with torch.no_grad():
        cache = network(ids[:, :30], use_cache=True).cache
        return network(ids[:, 30:], cache=cache, use_cache=True, **settings)


class Doubled(nn.Module):
    """Stands in another module's place, as an adapter does, and has its weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    weight = property(lambda self: self.base.weight)

    def forward(self, *args):
        return 2 * self.base(*args)


def replace_module(layer):
    layer.self_attn.o_proj = Doubled(layer.self_attn.o_proj)


class Wrapped(nn.Module):
    """Has nothing of what it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        output = self.base(*args, **kwargs)
        return output._replace(hidden_states=2 * output.hidden_states)


def wrap_attention(layer):
    layer.self_attn = Wrapped(layer.self_attn)


def replace_parameter(layer):
    layer.self_attn.o_proj.weight = nn.Parameter(2 * layer.self_attn.o_proj.weight)


def replace_data(layer):
    layer.self_attn.o_proj.weight.data = 2 * layer.self_attn.o_proj.weight.data


def change_in_place(layer):
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(2)


def add_hook(layer):
    layer.self_attn.o_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def add_bias(layer):
    layer.self_attn.o_proj.bias = nn.Parameter(torch.ones(layer.self_attn.o_proj.out_features))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrise(layer):
    """Of the layer's last parameter: one dictionary loses what another, empty until then, gains."""
    parametrize.register_parametrization(layer.post_attention_layernorm, "weight", Twice())


CHANGES = [
    *(replace_module, wrap_attention, replace_parameter, replace_data, change_in_place),
    *(add_hook, add_bias, parametrise),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_are_heard(change, calls, module_by_module):
    network = model("v3")
    before = step(network).logits
    layers = network.config.num_hidden_layers
    assert len(calls) == layers
    change(network.model.layers[1])
    calls.clear()
    found = step(network).logits
    served = change in (replace_parameter, replace_data, change_in_place)
    # Where only attention has changed, the other half of the layer is still one call.
    assert calls == ["decode_layer"] * layers if served else "decode_layer" in calls
    assert calls.count("decode_layer") == layers - (not served)
    module_by_module(True)
    torch.testing.assert_close(found, step(network).logits, atol=5e-6, rtol=0)
    assert (found - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    "setting", [{"attn_implementation": "eager"}, {"experts_implementation": "eager"}, {"hidden_act": "relu"}]
)
def test_other_implementations_and_activations_are_left_to_themselves(setting, calls):
    kind = "v3"
    network = model(kind, **{name: each for name, each in setting.items() if name == "hidden_act"})
    if "attn_implementation" in setting:
        network.set_attn_implementation("eager")
    if "experts_implementation" in setting:
        network.set_experts_implementation("eager")
    step(network)
    dense = network.config.first_k_dense_replace if "experts_implementation" in setting else 0
    assert calls == ["decode_layer"] * dense


def test_what_is_recorded_is_recorded_and_afterwards_layers_are_whole_again(calls, module_by_module):
    network = model("v3")
    plain = step(network).logits
    calls.clear()
    output = step(network, output_hidden_states=True, output_router_logits=True)
    routed = network.config.num_hidden_layers - network.config.first_k_dense_replace
    assert len(output.hidden_states) == network.config.num_hidden_layers + 1
    assert len(output.router_logits) == routed
    torch.testing.assert_close(output.logits, plain, atol=5e-6, rtol=0)
    calls.clear()
    assert torch.equal(step(network).logits, plain)
    assert calls == ["decode_layer"] * network.config.num_hidden_layers


def test_a_copy_has_layers_of_its_own():
    network = model("v3")
    step(network)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.model.layers[0].self_attn.o_proj.weight.zero_()
    assert (step(other).logits - step(network).logits).abs().max() > 1e-4
    assert torch.equal(step(copy.deepcopy(network)).logits, step(network).logits)


def test_mtp_layers_too(calls):
    """A draft's layer is a decoder layer, and reads its own cache."""
    network = model("v3", num_nextn_predict_layers=1)
    ids = torch.arange(5, 25).unsqueeze(0)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = network.generate(ids, **settings)
    calls.clear()
    assert torch.equal(network.generate(ids, use_mtp=True, **settings), plain)
    assert calls


def compiled_steps(network: FathomForCausalLM) -> torch.Tensor:
    """Logits of some steps with a static cache, by one graph."""
    torch.manual_seed(3)
    ids, mask = torch.randint(5, 4000, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = StaticCache(network.config, max_cache_len=48)
    torch._dynamo.reset()
    forward, logits = torch.compile(network.forward, fullgraph=True, backend="aot_eager"), []
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        network(ids[:, :36], attention_mask=mask[:, :36], cache=cache, use_cache=True)
        for t in range(36, 40):
            inputs = network.prepare_inputs_for_generation(
                ids[:, : t + 1],
                next_sequence_length=1,
                cache=cache,
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, : t + 1],
            )
            logits.append(forward(**inputs).logits)
    assert int(cache.get_seq_length()) == 40
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", ["v2", "v3", "v3.2"])
def test_a_graph_has_layers_as_operators(kind, calls, monkeypatch):
    network = model(kind)
    found = compiled_steps(network)
    assert calls == ["decode_layer"] * (4 * network.config.num_hidden_layers)
    monkeypatch.setattr(layer_operator, "is_ready", lambda dtype: False)
    calls.clear()
    torch.testing.assert_close(found, compiled_steps(network), atol=5e-6, rtol=0)
    assert not calls


def test_an_operators_layer_may_be_any(calls):
    """A hook or an adapter is heard there, too."""
    network = model("v3")
    before = compiled_steps(network)
    network.model.layers[1].self_attn.o_proj = Doubled(network.model.layers[1].self_attn.o_proj)
    calls.clear()
    after = compiled_steps(network)
    assert calls.count("decode_layer") == 4 * (network.config.num_hidden_layers - 1)
    assert (after - before).abs().max() > 1e-4
    other = copy.deepcopy(network)
    assert torch.equal(compiled_steps(other), after)


def test_replaced_weights_are_let_go():
    """What is remembered of a layer keeps neither its old weights nor a deleted model."""
    network = model("v3")
    step(network)
    weight = weakref.ref(network.model.layers[0].self_attn.o_proj.weight)
    network.quantize_int8()
    gc.collect()
    assert weight() is None
    step(network)
    layer = weakref.ref(network.model.layers[0])
    del network
    gc.collect()
    assert layer() is None
