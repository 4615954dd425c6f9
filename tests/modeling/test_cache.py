"""Every kind of cache, dynamic and static, under everything that is done to caches.

The oracle is one forward over all tokens without a cache. Batches are padded on the left unless said otherwise.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import cache as cache_module
from fathom.modeling.cache import FathomCache, FathomDynamicCache, FathomStaticCache
from fathom.modeling.cache_layers import KeyValueCacheLayer
from fathom.modeling.cache_size import layer_cache_numbers

SHARED = {
    "hidden_size": 32,
    "vocab_size": 61,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 0,
}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
GENERATIONS = {
    "classic": {"num_hidden_layers": 2},
    "moe": {"num_hidden_layers": 2, "head_dim": 8, "num_key_value_heads": 2, **EXPERTS},
    "v2": {"num_hidden_layers": 2, **EXPERTS, **LATENT},
    "v3": {"num_hidden_layers": 2, "q_lora_rank": 16, **EXPERTS, **LATENT, "n_group": 1, "topk_group": 1},
    "v3.2": {"num_hidden_layers": 2, "q_lora_rank": 16, "index_topk": 6, **EXPERTS, **LATENT},
    "v4": {
        "num_hidden_layers": 3,
        "token_mixers": ["swa", "csa", "hca"],
        "head_dim": 12,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 7,
        "compress_rate_csa": 4,
        "compress_rate_hca": 12,
        "index_head_dim": 8,
        "index_topk": 3,
        "hc_sinkhorn_iters": 2,
        **EXPERTS,
    },
}
LENGTH = 40  # 5 windows, 10 small blocks, 3 large ones, and more keys and entries than are chosen
PADDINGS = [0, 5, 14]
FORMS = ["dynamic", "static"]

every_generation = pytest.mark.parametrize("generation", GENERATIONS)
both_forms = pytest.mark.parametrize("form", FORMS)


def model(generation: str, seed: int = 0, **overrides) -> FathomForCausalLM:
    torch.manual_seed(seed)
    settings = {**SHARED, **GENERATIONS[generation], "initializer_range": 0.15, **overrides}
    created = FathomForCausalLM(FathomConfig.preset(generation, **settings)).eval()
    for name, parameter in created.named_parameters():
        if name.endswith(("sinks", "position_bias")):
            nn.init.normal_(parameter, std=0.5)
    return created


def new_cache(ours: FathomForCausalLM, form: str, length: int = LENGTH + 10):
    return DynamicCache(config=ours.config) if form == "dynamic" else StaticCache(ours.config, max_cache_len=length)


def batch(length: int = LENGTH, paddings: list[int] = PADDINGS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 61, (len(paddings), length), generator=torch.Generator().manual_seed(length))
    mask = (torch.arange(length) >= torch.tensor(paddings)[:, None]).long()
    return ids.masked_fill(mask == 0, 2), mask


def read(ours, cache, ids: torch.Tensor, mask: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of the last `sum(sizes)` tokens, read in pieces of these sizes; the ones before are in the cache."""
    seen, logits = ids.shape[1] - sum(sizes), []
    for size in sizes:
        piece, seen = ids[:, seen : seen + size], seen + size
        logits.append(ours(piece, attention_mask=mask[:, :seen], cache=cache).logits)
    return torch.cat(logits, dim=1)


def assert_same(logits: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    real = mask[:, -logits.shape[1] :].bool()
    torch.testing.assert_close(logits[real], expected[:, -logits.shape[1] :][real], atol=1e-5, rtol=1e-5)


def in_pieces(seed: int, total: int) -> list[int]:
    generator, sizes = torch.Generator().manual_seed(seed), []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(1, 12, (), generator=generator)), total - sum(sizes)))
    return sizes


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [LENGTH], in_pieces(1, LENGTH)], ids=["one by one", "at once", "mixed"]
)
@both_forms
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_read_in_any_pieces(generation, form, sizes):
    ours, (ids, mask) = model(generation), batch()
    expected = ours(ids, attention_mask=mask, use_cache=False).logits
    cache = new_cache(ours, form)
    assert_same(read(ours, cache, ids, mask, sizes), expected, mask)
    assert isinstance(cache, FathomCache)
    assert int(cache.get_seq_length()) == LENGTH
    # Without a mask, too: nothing is padded then, and a static cache has more room than tokens.
    cache = new_cache(ours, form)
    logits = torch.cat([ours(piece, cache=cache).logits for piece in ids[:1].split(sizes, 1)], 1)
    assert_same(logits, expected[:1], mask[:1])


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [20, 13, 7], in_pieces(2, LENGTH)], ids=["one by one", "turns", "mixed"]
)
@both_forms
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_padding_between_tokens(generation, form, sizes):
    """As in the second turn of a batched chat: every row is what it is alone, without any padding."""
    ours, (ids, mask) = model(generation), batch()
    mask[0, 20:33] = mask[1, [8, 22, 23, 31]] = mask[2, 16:21] = mask[2, 35:] = 0
    mask[1, 24:31] = 0
    ids = ids.masked_fill(mask == 0, 2)
    logits = read(ours, new_cache(ours, form), ids, mask, sizes)
    for row, real in enumerate(mask.bool()):
        alone = ours(ids[row, real][None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, real], alone, atol=1e-5, rtol=1e-5)


ROWS = torch.tensor([2, 0, 0])
OPERATIONS = {
    "reorder_cache": (lambda cache: cache.reorder_cache(ROWS), ROWS),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@torch.no_grad()
@pytest.mark.parametrize("operation", OPERATIONS)
@both_forms
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_rows_change_in_the_middle(generation, form, operation):
    ours, (ids, mask) = model(generation), batch()
    change, rows = OPERATIONS[operation]
    cache = new_cache(ours, form)
    read(ours, cache, ids[:, :27], mask, [20, *[1] * 7])
    change(cache)
    assert_same(
        read(ours, cache, ids[rows], mask[rows], [1, 1, 5, 6]),
        ours(ids[rows], attention_mask=mask[rows], use_cache=False).logits,
        mask[rows],
    )


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 6, 13])
@both_forms
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_crop_leaves_no_trace(generation, form, kept):
    """Bit for bit: a cache that read wrong tokens and forgot them goes on as one that never did."""
    ours, (ids, mask) = model(generation), batch()
    start = 18
    went = new_cache(ours, form)
    read(ours, went, ids[:, :start], mask, [start])
    went.activate_past_recording()
    stayed = copy.deepcopy(went)
    read(ours, stayed, ids[:, : start + kept], mask, [1] * kept)
    stayed.crop(0)

    wrong = ids.clone()
    wrong[:, start + kept :] = 7
    read(ours, went, wrong[:, : start + 14], mask, [1] * 14)
    went.crop(kept - 14)
    assert int(went.get_seq_length()) == start + kept
    assert went.nbytes() == stayed.nbytes()
    more = [1] * (LENGTH - start - kept)
    logits = read(ours, went, ids, mask, more)
    assert torch.equal(logits, read(ours, stayed, ids, mask, more))
    assert_same(logits, ours(ids, attention_mask=mask, use_cache=False).logits, mask)


@torch.no_grad()
@both_forms
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_crop_of_drafts_read_at_once(generation, form):
    """As draft decoding does it, again and again."""
    ours, (ids, mask) = model(generation), batch()
    expected = ours(ids, attention_mask=mask, use_cache=False).logits
    cache = new_cache(ours, form)
    cut = 12
    read(ours, cache, ids[:, :cut], mask, [cut])
    cache.activate_past_recording()
    for good in (3, 1, 4, 2, 5):
        drafts = ids[:, : cut + 6].clone()
        drafts[:, cut + good :] = 9
        logits = read(ours, cache, drafts, mask, [6])
        assert_same(logits[:, :good], expected[:, : cut + good], mask[:, : cut + good])
        cache.crop(good - 6)
        cut += good
    assert_same(read(ours, cache, ids, mask, [LENGTH - cut]), expected, mask)


@torch.no_grad()
@both_forms
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_crop_of_everything_and_too_much(generation, form):
    ours, (ids, mask) = model(generation), batch()
    cache = new_cache(ours, form)
    first = read(ours, cache, ids[:, :10], mask, [10])
    cache.crop(-11)
    assert int(cache.get_seq_length()) == 0
    assert cache.nbytes() == 0
    torch.testing.assert_close(read(ours, cache, ids[:, :10], mask, [10]), first, atol=0, rtol=0)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    if generation == "v4":
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-5)


# A static cache that was filled has hidden keys before the first, and native functions sum lane by lane.
@torch.no_grad()
@pytest.mark.usefixtures("long_texts")
@both_forms
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_reset_is_a_new_cache(generation, form):
    ours, (ids, mask) = model(generation), batch()
    cache = new_cache(ours, form)
    fresh = read(ours, cache, ids, mask, [21, *[1] * 19])
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert cache.nbytes() == 0
    assert torch.equal(read(ours, cache, ids, mask, [21, *[1] * 19]), fresh)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_forms
@every_generation
def test_bytes_are_those_of_the_formula(generation, form, dtype):
    """Per token and once: see `cache_size`, which is tested against the published figures."""
    ours = model(generation).to(dtype)
    for blocks in (3, 6):
        length = 12 * blocks  # whole blocks of both sizes
        cache = new_cache(ours, form, length=80)
        ours(batch(length)[0], cache=cache)
        for index, layer in enumerate(cache.layers):
            size = layer_cache_numbers(ours.config, index)
            assert layer.nbytes() == 3 * dtype.itemsize * (size.per_token * length + size.window)
            assert layer.allocated_nbytes() >= layer.nbytes()
        assert cache.nbytes() == sum(layer.nbytes() for layer in cache.layers)


@torch.no_grad()
@torch.no_grad()
@both_forms
@pytest.mark.usefixtures("host_reads")
def test_keys_of_a_window_can_be_looked_at(form):
    """As transformers' own tests of generation do, [B, key heads, S, D]; a key is its own value."""
    ours, (ids, mask) = model("v4"), batch()
    cache = new_cache(ours, form)
    read(ours, cache, ids, mask, [LENGTH])
    for layer in cache.layers:
        seen = layer.keys[:, :, -(ours.config.sliding_window - 1) :]
        assert seen.shape == (len(ids), 1, ours.config.sliding_window - 1, ours.config.head_dim)
        assert seen.abs().amin(dim=(0, 1, 3)).gt(0).all()
        assert torch.equal(layer.keys, layer.values)


def test_places_are_the_only_bookkeeping():
    """One int64 for every token of the window or of what blocks need, and one per entry."""
    ours = model("v4")
    cache = ours(batch(36)[0]).cache
    kept = [6 + 0, max(6, 7) + 9, max(6, 11) + 3]
    assert [layer.allocated_nbytes() - layer.nbytes() for layer in cache.layers] == [3 * 8 * n for n in kept]


@torch.no_grad()
def test_growing_seldom_copies():
    layer, buffers = KeyValueCacheLayer(), set()
    written = torch.randn(2, 3, 500, 4)
    for token in written.split(1, dim=2):
        keys, values = layer.update(token, token[..., :2])
        buffers.add(keys.data_ptr())
        assert layer.allocated_nbytes() <= 1.5 * layer.nbytes()
    assert len(buffers) < 20
    assert torch.equal(keys, written)
    assert torch.equal(values, written[..., :2])


@every_generation
@pytest.mark.usefixtures("host_reads")
def test_gradients_through_a_cache(generation):
    """What is read first is learnt from what is read later; writing in place would destroy it."""
    ours, (ids, mask) = model(generation), batch(paddings=[0])
    logits = read(ours, new_cache(ours, "dynamic"), ids, mask, [14, 9, *[1] * 17])
    # Indexers learn by a loss of their own: logits have no gradient to a choice.
    parameters = [parameter for name, parameter in ours.named_parameters() if ".indexer." not in name]
    through = torch.autograd.grad(logits.square().mean(), parameters)
    at_once = torch.autograd.grad(ours(ids, use_cache=False).logits.square().mean(), parameters)
    for ours_, expected in zip(through, at_once, strict=True):
        torch.testing.assert_close(ours_, expected, atol=1e-4 * float(expected.abs().max() + 1), rtol=0)


@every_generation
@pytest.mark.usefixtures("host_reads")
def test_a_cache_from_inference_mode_goes_on_outside(generation):
    ours, (ids, mask) = model(generation), batch()
    cache = new_cache(ours, "dynamic")
    with torch.inference_mode():
        read(ours, cache, ids[:, :20], mask, [18, 1, 1])
    with torch.no_grad():
        expected = ours(ids, attention_mask=mask, use_cache=False).logits
        assert_same(read(ours, cache, ids, mask, [1] * 20), expected, mask)


GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded_static"},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 5, "cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 3, "cache_implementation": "static"},
    ],
    ids=str,
)
@every_generation
def test_generate(generation, settings):
    """Left-padded, greedy and with beams: the same tokens as without a cache."""
    ours, (ids, mask) = model(generation), batch(24)
    beams = {key: value for key, value in settings.items() if key == "num_beams"}
    expected = ours.generate(ids, attention_mask=mask, use_cache=False, **beams, **GREEDY)
    made = ours.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings, **GREEDY)
    assert torch.equal(made.sequences, expected)
    static = "static" in settings.get("cache_implementation", "")
    assert type(made.cache) is (FathomStaticCache if static else FathomDynamicCache)
    assert made.cache.nbytes() > 0


@pytest.mark.parametrize("made", ["by name", "empty", *FORMS])
@every_generation
@pytest.mark.usefixtures("host_reads")
def test_drafts(generation, made):
    """transformers' own draft decoding, with caches that it makes and with the user's."""
    ours, ids = model(generation), batch(8, [0])[0].repeat(1, 3)
    expected = ours.generate(ids, use_cache=False, **GREEDY)
    if made == "by name":
        assistant = model(generation, seed=1)
        assert torch.equal(ours.generate(ids, assistant_model=assistant, **GREEDY), expected)
        return
    cache = DynamicCache() if made == "empty" else new_cache(ours, made, 60)
    drafted = ours.generate(ids, cache=cache, prompt_lookup_num_tokens=4, **GREEDY)
    assert torch.equal(drafted, expected)


@torch.no_grad()
@every_generation
def test_a_decoding_step_is_one_graph(generation):
    """Traced once for all lengths, across the borders of windows, blocks and choices."""
    ours, (ids, mask) = model(generation), batch()
    expected = ours(ids, attention_mask=mask, use_cache=False).logits
    cache = new_cache(ours, "static")
    read(ours, cache, ids[:, :15], mask, [15])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    torch._dynamo.reset()
    step = torch.compile(ours.forward, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(15, LENGTH):
            inputs = ours.prepare_inputs_for_generation(
                ids[:, : t + 1],
                next_sequence_length=1,
                cache=cache,
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, : t + 1],
            )
            logits = step(**inputs).logits
            assert_same(logits, expected[:, : t + 1], mask[:, : t + 1])


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_a_cache_is_not_offloaded_from_nowhere(kind, monkeypatch):
    """A CUDA build of PyTorch on a machine without a driver makes no stream, which transformers asks for."""

    def no_stream(*args, **kwargs):
        raise RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(torch, "Stream", no_stream)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    said = []
    monkeypatch.setattr(cache_module.logger, "warning_once", said.append)
    ours, (ids, _) = model("v3"), batch(24)
    made = ours.generate(ids, cache_implementation=kind, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(made.sequences, ours.generate(ids, **GREEDY))
    assert not made.cache.offloading
    assert said == [f"cache_implementation='{kind}': there is no accelerator, so the cache is on the CPU as it is"]
    assert ours.generation_config.cache_implementation is None
    # Where there is one, transformers makes the cache that was asked for.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="driver"):
        ours.generate(ids, cache_implementation=kind, **GREEDY)


@torch.no_grad()
@both_forms
@every_generation
def test_offloading_moves_everything_but_places(generation, form):
    ours, (ids, mask) = model(generation), batch()
    cache = new_cache(ours, form)
    read(ours, cache, ids[:, :30], mask, [30])
    for layer in cache.layers:
        layer.device = torch.device("meta")
        layer.prefetch()
        for store in layer.stores():
            assert store or generation == "v4"
            assert {name: rows.device.type for name, rows in store.items()} == {
                name: "cpu" if name == "places" else "meta" for name in store
            }


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both_forms
@every_generation
def test_offloading_on_a_gpu(generation, form):
    ours, (ids, mask) = model(generation).cuda(), (tensor.cuda() for tensor in batch())
    expected = ours(ids, attention_mask=mask, use_cache=False).logits
    cache = (
        DynamicCache(config=ours.config, offloading=True)
        if form == "dynamic"
        else StaticCache(ours.config, LENGTH, offloading=True)
    )
    assert_same(read(ours, cache, ids, mask, [20, *[1] * 20]), expected, mask)
    # The window alone may stay: a static cache leaves what has a limit where it is.
    home = [layer for layer in cache.layers if not (layer.is_sliding and form == "static")][1:]
    assert home
    for layer in home:
        devices = {rows.device.type for store in layer.stores() for name, rows in store.items() if name != "places"}
        assert devices == {"cpu"}


@torch.no_grad()
def test_caches_that_do_not_fit():
    v3, v4, ids = model("v3"), model("v4"), batch()[0]
    for first, second in ((v3, v4), (v4, v3)):
        with pytest.raises(ValueError, match="start with a new cache"):
            second(ids, cache=first(ids).cache)
    used = DynamicCache()
    used.update(torch.zeros(3, 1, 3, 4), torch.zeros(3, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="start with a new cache"):
        v4(ids, cache=used)


@torch.no_grad()
def test_a_filled_cache_is_adopted_with_what_is_in_it():
    """Keys that were not read by the model: a tuned prefix."""
    ours, (ids, _) = model("classic"), batch()
    layers = ours(ids[:, :20]).cache.layers
    cache = DynamicCache([(layer.keys, layer.values) for layer in layers])
    logits = ours(ids[:, 20:], cache=cache).logits
    assert isinstance(cache, FathomDynamicCache)
    torch.testing.assert_close(logits, ours(ids, use_cache=False).logits[:, 20:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("generation", "overrides"), [("v3", {}), ("v3.2", {"index_n_heads": 2})])
def test_a_step_copies_no_cache(generation, overrides):
    """No tensor that a step makes is as large as the latents of one layer, for several sequences at once either."""
    (ids, _), ours, made = batch(100), model(generation, **overrides), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not func.is_view:
                made.append((result.numel(), func.name()))
            return result

    cache = ours(ids).cache
    ours(ids[:, :1], cache=cache)  # makes the buffers larger
    with Sizes():
        ours(ids[:, :1], cache=cache)
    assert max(made)[0] < cache.layers[0].keys.numel(), sorted(made)[-3:]
