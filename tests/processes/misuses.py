"""What callers and files do to models: each does one thing wrong, or unusual, and returns what the model makes of it.

All take a model, which they may spoil, and a seed.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from fathom.modeling.cache import adopt_cache
from fathom.modeling.experts import HashRouter, RoutedExperts

VOCABULARY = 97


def is_exact(model: Any) -> bool:
    """Whether numbers can be compared: in fp32, and nothing is chosen by scores that may be equal."""
    config = model.config
    chooses = (config.uses("dsa") or config.uses("csa")) and config.index_topk < 4096 and not config.index_dense
    return model.dtype is torch.float32 and not chooses


def tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return model(*args, **kwargs).logits


def filled(model: Any, rows: int, length: int, static: bool = False) -> Any:
    """A cache that has read a prompt."""
    cache = StaticCache(model.config, max_cache_len=length + 20) if static else DynamicCache(config=model.config)
    adopt_cache(cache, model.config)
    logits(model, tokens(rows, length, 1), cache=cache, use_cache=True)
    return cache


def no_tokens(model: Any, seed: int) -> torch.Tensor:
    rows, length = random.Random(seed).choice([(1, 0), (3, 0), (0, 5), (0, 0)])
    return logits(model, tokens(rows, length, seed), use_cache=random.Random(seed).choice([True, False]))


def a_step_of_no_tokens(model: Any, seed: int) -> torch.Tensor:
    cache = filled(model, 2, 20)
    return logits(model, tokens(2, 0, seed), cache=cache, use_cache=True)


def ids_of_other_dtypes(model: Any, seed: int) -> torch.Tensor:
    dtype = random.Random(seed).choice([torch.int32, torch.int16, torch.uint8, torch.float32, torch.bool])
    return logits(model, tokens(2, random.Random(seed).choice([1, 9, 200]), seed).to(dtype))


def ids_that_are_not_in_the_vocabulary(model: Any, seed: int) -> torch.Tensor:
    ids = tokens(2, random.Random(seed).choice([1, 9, 150]), seed)
    ids[-1, -1] = random.Random(seed).choice([VOCABULARY, -1, -VOCABULARY - 1, 10**12, -(2**63)])
    return logits(model, ids)


def other_ids_beside_embeddings(model: Any, seed: int) -> torch.Tensor:
    """Where tokens are routed by id, ids come beside embeddings, and no embedding looks at them."""
    pick = random.Random(seed).choice
    embeds = model.get_input_embeddings()(tokens(2, 9, seed))
    ids = tokens(*pick([(2, 9), (2, 8), (1, 9), (2, 0)]), seed)
    if ids.numel():
        ids[0, 0] = pick([5, VOCABULARY, -1, -VOCABULARY, -VOCABULARY - 1, 10**12])
    ids = ids.to(pick([torch.int64, torch.int64, torch.int32]))
    return logits(model, ids, inputs_embeds=embeds)


def a_cache_of_other_rows(model: Any, seed: int) -> torch.Tensor:
    pick = random.Random(seed).choice
    before, now = pick([(1, 3), (3, 1), (2, 3), (3, 2)])
    cache = filled(model, before, pick([3, 20, 60]), static=pick([True, False]))
    return logits(model, tokens(now, pick([1, 2, 7]), seed), cache=cache, use_cache=True)


def a_cache_of_another_dtype(model: Any, seed: int) -> torch.Tensor:
    cache = filled(model, 2, 20)
    other = torch.bfloat16 if model.dtype is torch.float32 else torch.float32
    return logits(model.to(other), tokens(2, 1, seed), cache=cache, use_cache=True)


def spoiled_caches(model: Any, seed: int) -> torch.Tensor:
    pick = random.Random(seed).choice
    cache = filled(model, 2, 20, static=pick([True, False]))
    store = pick([store for store in pick(cache.layers).stores() if store] or [{}])
    for name in list(store):
        rows = store[name]
        if pick([True, False]):
            continue
        cut = rows.shape[-1] // 2 if rows.dim() > 2 else rows.shape[-1] - 1
        store[name] = pick([rows[:1], rows[:, :1], rows[..., :cut], rows[:0], rows.to(torch.float64), rows.mT])
    return logits(model, tokens(2, pick([1, 3]), seed), cache=cache, use_cache=True)


def other_lengths_of_caches(model: Any, seed: int) -> torch.Tensor:
    pick = random.Random(seed).choice
    cache = filled(model, 2, 20)
    for layer in cache.layers:
        # How much room there is beyond what was read may differ.
        layer.length = pick([-5, 0, 3, 19, 500, 2**40])
    return logits(model, tokens(2, 1, seed), cache=cache, use_cache=True)


def embeddings_of_other_widths(model: Any, seed: int) -> torch.Tensor:
    pick, width = random.Random(seed).choice, model.config.hidden_size
    shape = 2, pick([1, 9, 140]), pick([1, width - 1, width + 1, 2 * width, 0])
    ids = {"input_ids": tokens(*shape[:2], seed)} if model.config.uses("hash") else {}
    return logits(model, inputs_embeds=torch.ones(shape, dtype=model.dtype), **ids)


def embeddings_of_other_kinds(model: Any, seed: int) -> torch.Tensor:
    pick = random.Random(seed).choice
    ids = tokens(2, pick([1, 9, 140]), seed)
    embeds = model.get_input_embeddings()(ids).detach()
    embeds = pick(
        [
            embeds.mT.contiguous().mT,
            embeds[:1].expand(2, -1, -1),
            embeds.float(),
            embeds.double(),
            embeds * float("nan"),
            embeds * float("inf"),
            embeds * 1e30,
            embeds * 0,
            embeds[:, :, :, None],
            embeds[0],
        ]
    )
    ids = {"input_ids": ids} if model.config.uses("hash") else {}
    return logits(model, inputs_embeds=embeds, **ids)


def masks_of_any_kind(model: Any, seed: int) -> torch.Tensor:
    pick = random.Random(seed).choice
    length, past = pick([1, 3, 40, 150]), pick([0, 20])
    generator = torch.Generator().manual_seed(seed)
    cache = filled(model, 2, past, static=pick([True, False])) if past else None
    whole = past + length
    heads = model.config.num_attention_heads
    shape = pick(
        [
            *[(2, whole), (2, length), (1, whole), (3, whole), (2, whole + 1), (2, whole - 1), (2, 0), (whole,)],
            *[(2, 1, length, whole), (1, 1, length, whole), (2, heads, length, whole), (2, 1, length, whole + 7)],
            *[(2, 1, 1, whole), (3, 1, length, whole), (2, 1, length, max(whole - 1, 0))],
        ]
    )
    mask = torch.randint(2, shape, generator=generator)
    mask[..., :1] = 1
    mask = mask.to(pick([torch.int64, torch.bool, torch.float32, torch.uint8, torch.int32]))
    return logits(model, tokens(2, length, seed), attention_mask=mask, cache=cache)


def positions_of_any_kind(model: Any, seed: int) -> torch.Tensor:
    pick = random.Random(seed).choice
    length = pick([1, 5, 70])
    shape = pick([(2, length), (1, length), (3, length), (2, length + 1), (2, 1), (length,), (2, 0)])
    positions = torch.arange(shape[-1]).expand(shape).clone()
    if positions.numel():
        positions[..., -1] += pick([0, 0, -1, -1000, 10**6, 2**40, 2**62, -(2**63)])
    positions = positions.to(pick([torch.int64, torch.int64, torch.int32, torch.float32]))
    cache = filled(model, 2, 10) if pick([True, False]) else None
    return logits(model, tokens(2, length, seed), position_ids=positions, cache=cache)


def spoiled_weights(model: Any, seed: int) -> torch.Tensor:
    """A parameter or buffer of another shape, dtype or layout, before or between steps."""
    pick = random.Random(seed).choice
    cache = filled(model, 2, 20) if pick([True, False]) else None
    named = [*model.named_parameters(), *model.named_buffers()]
    _, tensor = pick(named)
    data, length = tensor.data, tensor.shape[0]
    data = pick(
        [
            data[: length // 2],
            data[:-1].clone(),
            data[:0],
            data[..., : data.shape[-1] // 2],
            torch.cat((data, data)),
            data.mT if data.dim() > 1 else data.flip(0),
            data.mT.contiguous() if data.dim() > 1 else data[None],
            data[:1].expand_as(data),
            data.double(),
            data.half() if data.is_floating_point() else data.int(),
            data.flatten(),
            data[None],
            data.to("meta"),
            torch.full_like(data, float("nan")) if data.is_floating_point() else data,
            torch.full_like(data, float("inf")) if data.is_floating_point() else data,
        ]
    )
    tensor.data = data
    return logits(model, tokens(2, pick([1, 4]) if cache is not None else pick([1, 30, 140]), seed), cache=cache)


def weights_in_the_same_place(model: Any, seed: int) -> torch.Tensor:
    """Freed and made anew, and shorter: often at the same address, where more stood before."""
    cache = filled(model, 2, 20)
    parameters = [each for each in model.parameters() if each.dim() > 1]
    parameter = random.Random(seed).choice(parameters)
    shape, dtype = parameter.shape, parameter.dtype
    parameter.data = torch.empty(0, dtype=dtype)
    parameter.data = torch.zeros(max(shape[0] // 2, 1), *shape[1:], dtype=dtype)
    return logits(model, tokens(2, 1, seed), cache=cache)


def tables_of_any_kind(model: Any, seed: int) -> torch.Tensor:
    pick = random.Random(seed).choice
    for module in model.modules():
        if not isinstance(module, HashRouter):
            continue
        table = module.tid2eid.clone()
        wrong = pick([-1, module.num_experts, 100, 100_000, 10**12, -(2**63), 0, module.num_experts - 1])
        table[pick([slice(None), slice(5, 9), slice(-1, None)])] = wrong
        module.tid2eid = pick(
            [
                *[table, table, table, table.to(torch.int32), table.float(), table[: len(table) // 2], table[:, :1]],
                *[torch.cat((table, table), 1), table.mT, table.float() * float("nan"), table[:, :0]],
            ]
        )
    return logits(model, tokens(2, pick([1, 9, 300]), seed))


def tables_changed_in_place(model: Any, seed: int) -> torch.Tensor:
    """After a layer was looked at; also where no version counter tells."""
    pick = random.Random(seed).choice
    cache = filled(model, 2, 20)
    for module in model.modules():
        if isinstance(module, HashRouter):
            module.tid2eid.data[:] = pick([-1, module.num_experts, 10**12, 0])
    return logits(model, tokens(2, pick([1, 3, 200]), seed), cache=cache)


def numbers_of_modules(model: Any, seed: int) -> torch.Tensor:
    """What is no tensor: sizes, numbers of choices, steps."""
    pick = random.Random(seed).choice
    numbers = [0, -1, 1, 3, 10**6, 2**31, 2**63 - 1, 2**64 + 1, 10**30]
    reals = [0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e300]
    names = dict.fromkeys(["top_k", "n_group", "topk_group", "group_top", "num_experts", "index_topk"], numbers)
    # -1 is "whatever fits" where PyTorch reshapes.
    sizes = [number for number in numbers if number != -1]
    names |= dict.fromkeys(["num_heads", "head_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "q_rank"], sizes)
    names |= dict.fromkeys(["eps", "norm_eps", "hc_eps", "routed_scaling_factor", "scaling", "swiglu_limit"], reals)
    names |= {"sinkhorn_iters": [0, -1, 1, 2, 1001, 3000], "hc_mult": sizes, "o_groups": sizes, "window": numbers}
    there = [(module, name) for module in model.modules() for name in names if hasattr(module, name)]
    module, name = pick(there)
    setattr(module, name, pick(names[name]))
    return logits(model, tokens(2, pick([1, 9, 140]), seed))


def experts_alone(model: Any, seed: int) -> torch.Tensor:
    """Choices that no router of ours makes."""
    pick = random.Random(seed).choice
    found = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    if not found:
        return torch.zeros(1)
    experts, count = pick(found), pick([1, 5, 140, 600])
    generator = torch.Generator().manual_seed(seed)
    choices = pick([1, 2, 7])
    x = torch.randn(count, model.config.hidden_size, generator=generator).to(model.dtype)
    indices = torch.randint(experts.num_experts, (count, choices), generator=generator)
    weights = torch.rand(count, choices, generator=generator)
    indices = pick([indices, indices * 0, indices[:, :1].expand(-1, choices), indices.mT.contiguous().mT])
    with torch.no_grad():
        return experts(x, indices, weights)


ALL: list[Callable[[Any, int], torch.Tensor]] = [
    no_tokens,
    a_step_of_no_tokens,
    ids_of_other_dtypes,
    ids_that_are_not_in_the_vocabulary,
    other_ids_beside_embeddings,
    a_cache_of_other_rows,
    a_cache_of_another_dtype,
    spoiled_caches,
    other_lengths_of_caches,
    embeddings_of_other_widths,
    embeddings_of_other_kinds,
    masks_of_any_kind,
    positions_of_any_kind,
    spoiled_weights,
    weights_in_the_same_place,
    tables_of_any_kind,
    tables_changed_in_place,
    numbers_of_modules,
    experts_alone,
]
