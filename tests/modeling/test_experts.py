"""DeepSeekMoE: routing against its definition, experts' implementations against each other, and balance."""

import math

import pytest
import torch
import torch.nn.functional as F

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import experts as experts_module
from fathom.modeling import fused
from fathom.modeling.experts import MixtureOfExperts, TopKRouter, sequence_balance_loss

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "num_attention_heads": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}


def mixture(implementation: str = "eager", **overrides) -> MixtureOfExperts:
    """One mixture of experts with random weights and routing bias."""
    config = FathomConfig.preset("v3", **{**TINY, **overrides}, experts_implementation=implementation)
    torch.manual_seed(0)
    module = MixtureOfExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    module.gate.e_score_correction_bias.normal_(std=0.3)
    return module


def model(**overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    return FathomForCausalLM(FathomConfig.preset("v3", **{**TINY, **overrides})).train()


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def biases(model: FathomForCausalLM) -> torch.Tensor:
    """[routers, E]"""
    return torch.stack([m.e_score_correction_bias.clone() for m in model.modules() if isinstance(m, TopKRouter)])


def route_by_definition(router: TopKRouter, x: list[float], bias: list[float]) -> dict[int, float]:
    """One token, expert by expert in plain Python: chosen expert -> weight."""
    logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in router.weight.tolist()]
    score = [1 / (1 + math.exp(-logit)) for logit in logits]
    biased = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(score) // router.n_group
    groups = [range(group * size, (group + 1) * size) for group in range(router.n_group)]
    worth = [sum(sorted((biased[i] for i in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda group: -worth[group])[: router.topk_group]
    allowed = [i for group in kept for i in groups[group]]
    chosen = sorted(allowed, key=lambda i: -biased[i])[: router.top_k]
    total = sum(score[i] for i in chosen) if router.norm_topk_prob else 1.0
    return {i: router.routed_scaling_factor * score[i] / total for i in chosen}


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (2, 1)])
def test_router_by_definition(n_group, topk_group, norm_topk_prob):
    router = mixture(n_group=n_group, topk_group=topk_group, norm_topk_prob=norm_topk_prob).gate
    hidden = torch.randn(40, 64)
    _, weights, indices = router(hidden)
    for token in range(40):
        expected = route_by_definition(router, hidden[token].tolist(), router.e_score_correction_bias.tolist())
        assert set(indices[token].tolist()) == set(expected)
        for expert, weight in zip(indices[token].tolist(), weights[token].tolist(), strict=True):
            assert weight == pytest.approx(expected[expert], abs=1e-5)


def test_bias_steers_the_choice_and_not_the_weights():
    router = mixture().gate
    hidden = torch.randn(50, 64)
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[5] = 10.0
    logits, weights, indices = router(hidden)
    assert (indices == 5).any(dim=1).all()
    scores = logits.sigmoid().gather(1, indices)
    torch.testing.assert_close(weights, 2.5 * scores / scores.sum(1, keepdim=True))


def test_router_computes_in_fp32_under_autocast():
    router, hidden = mixture().gate, torch.randn(20, 64)
    expected = router(hidden)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(hidden)[0], expected)


def outputs_and_gradients(
    module: MixtureOfExperts, hidden: torch.Tensor, direction: torch.Tensor
) -> list[torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    output, _, _ = module(hidden)
    return [output, *torch.autograd.grad((output.float() * direction).sum(), [hidden, *module.parameters()])]


@pytest.mark.parametrize("unused", [False, True], ids=["all experts", "one expert without tokens"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("kernel", ["function", "sorted", "grouped"])
def test_implementations_agree(kernel, shared, autocast, unused, monkeypatch):
    """Outputs and gradients of the fast implementation are those of the readable loop."""
    monkeypatch.setattr(experts_module, "GROUPED_ROWS", 64 if kernel == "grouped" else 0)
    if kernel == "sorted":
        monkeypatch.setattr(experts_module, "fits_functions", lambda: False)
    eager, fast = mixture("eager", n_shared_experts=shared), mixture("sorted_mm", n_shared_experts=shared)
    for module in (eager, fast):
        module.gate.e_score_correction_bias[3] = -100.0 if unused else 0.0
    hidden, direction = torch.randn(2, 30, 64), torch.randn(2, 30, 64)
    expected = outputs_and_gradients(eager, hidden, direction)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        results = outputs_and_gradients(fast, hidden, direction)
    names = ["output", "input", *(name for name, _ in fast.named_parameters())]
    for name, got, wanted in zip(names, results, expected, strict=True):
        # bf16 has 8 bits; a sum of some dozens of products keeps about 1 %.
        error = (got.float() - wanted).norm() / wanted.norm()
        assert error < (0.02 if autocast else 1e-5), f"{name}: {error}"
        if unused and name.startswith("experts."):
            assert torch.equal(got[3], torch.zeros_like(got[3])), name


@pytest.mark.parametrize("frozen", [None, 0, 1, 2, 3], ids=["all learn", "tokens", "weights", "gate_up", "down"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_training_step_is_that_of_the_loop(limit, frozen, monkeypatch):
    """In float64, so that every factor of the gradients is there; expert 7 gets nothing."""
    monkeypatch.setattr(experts_module, "GROUPED_ROWS", 0)
    eager, fast = (mixture(name, swiglu_limit=limit).double().experts for name in ("eager", "sorted_mm"))
    calls, function = [], experts_module.SortedExperts.apply
    monkeypatch.setattr(experts_module.SortedExperts, "apply", lambda *args: calls.append(args) or function(*args))
    indices = torch.stack([torch.randperm(7)[:3] for _ in range(50)])
    tokens, weights, direction = (torch.randn(50, n, dtype=torch.float64) for n in (64, 3, 64))
    results = []
    for module in (eager, fast):
        learning = [tokens.clone(), weights.clone(), module.gate_up_proj, module.down_proj]
        for number, each in enumerate(learning):
            each.requires_grad_(number != frozen)
        output = module(learning[0], indices, learning[1])
        learning = [each for each in learning if each.requires_grad]
        results.append([output, *torch.autograd.grad(output, learning, direction)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_few_tokens_are_computed_one_by_one(autocast, monkeypatch):
    """As long as they choose at most half as many experts as there are, and no gradient is kept."""
    eager, fast = (mixture(name, n_routed_experts=16) for name in ("eager", "sorted_mm"))
    monkeypatch.setattr(fused, "SHORT_TEXT", 0)
    calls, one_by_one = [], experts_module._experts_one_by_one
    monkeypatch.setattr(experts_module, "_experts_one_by_one", lambda *args: calls.append(args) or one_by_one(*args))
    for count, taken in ((1, True), (2, True), (3, False)):
        hidden = torch.randn(1, count, 64)
        calls.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output, counts, _ = fast(hidden)
        assert bool(calls) == taken, count
        expected, expected_counts, _ = eager(hidden)
        assert output.dtype == hidden.dtype
        assert (output.float() - expected).norm() / expected.norm() < (0.02 if autocast else 1e-6)
        assert torch.equal(counts, expected_counts)
        calls.clear()
        fast(hidden)
        assert not calls


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "sorted_mm"])
def test_experts_run_by_a_module_call(implementation):
    """PEFT wraps the experts, tensor and expert parallelism hang hooks on them: a way around would lose both."""
    module, calls = mixture(implementation), []
    module.experts.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    module(torch.randn(2, 5, 64))
    assert calls == [(10, 64)]


@pytest.mark.parametrize("gradient", [False, True])
def test_the_kernel_is_chosen_by_rows_per_expert(gradient, monkeypatch):
    """64 rows on average of 8 experts are 512 slots, or 256 tokens. Autocast does not reach a grouped product."""
    calls, grouped = [], experts_module.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        experts_module.ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", lambda *a: calls.append(a) or grouped(*a)
    )
    module, odd = mixture("sorted_mm").experts, mixture("sorted_mm", moe_intermediate_size=25).experts

    def groups(module, tokens):
        calls.clear()
        hidden, weights = (torch.rand(tokens, n) for n in (64, 2))
        with torch.set_grad_enabled(gradient):
            module(hidden, torch.arange(2 * tokens).view(tokens, 2) % 8, weights)
        return bool(calls)

    assert groups(module, 256)
    assert not groups(module, 257)
    assert not groups(odd, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not groups(module, 256)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [40, 700])
def test_products_in_bf16_are_of_few_lengths(tokens, monkeypatch):
    """Every number of rows that is new costs a CPU about a millisecond and 0.7 MB."""
    monkeypatch.setattr(experts_module, "GROUPED_ROWS", 0)
    rows, multiply = [], F.linear
    module = mixture("sorted_mm").to(torch.bfloat16)
    indices = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda x, weight: rows.append(x.shape[0]) or multiply(x, weight))
        module.experts(torch.randn(tokens, 64, dtype=torch.bfloat16), indices, torch.rand(tokens, 3))
    counts = indices.flatten().bincount()
    multiple = 16 if tokens == 40 else 64
    assert rows == [-(-int(count) // multiple) * multiple for count in counts for _ in range(2)]


@torch.no_grad()
@pytest.mark.usefixtures("long_texts")
@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_texts_are_mixed_in_parts(kind, dtype, monkeypatch):
    """Without gradients, so that nothing in between is there for all tokens."""
    module = mixture("sorted_mm").to(dtype).eval()
    module = module if kind == "moe" else module.shared_experts
    monkeypatch.setattr(experts_module, "GROUPED_ROWS", 0)
    hidden, held, multiply = torch.randn(2, 50, 64, dtype=dtype), [], F.linear
    expected = module(hidden)

    def spy(x, weight, *bias):
        held.append(x[..., 0].numel())
        return multiply(x, weight, *bias)

    monkeypatch.setattr("fathom.modeling.memory.TOKENS_AT_ONCE", 8)
    monkeypatch.setattr("fathom.modeling.experts.F.linear", spy)
    found = module(hidden)
    if kind == "moe":
        assert max(held[1:]) <= 16  # after the router, 8 tokens or what they are filled up to
        found, expected = found[0], expected[0]
    else:
        assert len(held) == 7 * 3
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)
    with torch.enable_grad():
        held.clear()
        module(hidden)
        assert max(held[1:]) > 16, "all that a gradient needs is held anyway"


def test_grouped_product_equals_the_loop():
    hidden, weights = torch.randn(25, 64), torch.rand(25, 3)
    indices = torch.stack([torch.randperm(7)[:3] for _ in range(25)])  # expert 7 gets nothing
    results = []
    for implementation in ("eager", "grouped_mm"):
        experts = mixture(implementation).experts
        output = experts(hidden, indices, weights)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(experts.parameters()))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(results[1][1][7], torch.zeros(64, 64))


def test_experts_by_definition():
    """y = sum_i g_i down(silu(gate x) * up x) + shared(x), token by token."""
    module = mixture(n_shared_experts=1)
    hidden = torch.randn(1, 6, 64)
    output, _, _ = module(hidden)
    _, weights, indices = module.gate(hidden[0])
    gates, ups = module.experts.gate_up_proj.chunk(2, dim=1)
    for token, x in enumerate(hidden[0]):
        expected = module.shared_experts(x)
        for weight, expert in zip(weights[token], indices[token], strict=True):
            inner = F.silu(gates[expert] @ x) * (ups[expert] @ x)
            expected = expected + weight * (module.experts.down_proj[expert] @ inner)
        torch.testing.assert_close(output[0, token], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("widths", [{}, {"hidden_size": 52}, {"moe_intermediate_size": 25}], ids=str)
def test_the_default_implementation(widths, accelerator, monkeypatch):
    """One for all devices and widths; those that grouped products refuse, too, whose rows are whole 16 bytes."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    chosen = model(**widths)
    assert chosen.config._experts_implementation == "sorted_mm"
    loss = chosen.train()(tokens(), labels=tokens()).loss
    loss.backward()
    chosen.set_experts_implementation("eager")
    assert loss.item() == pytest.approx(chosen(tokens(), labels=tokens()).loss.item(), rel=1e-5)
    with torch.no_grad():
        expected = chosen.eval()(tokens()).logits
        chosen.set_experts_implementation("sorted_mm")
        torch.testing.assert_close(chosen(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


def test_counts_exclude_padding():
    module = mixture()
    hidden = torch.randn(2, 9, 64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    _, counts, _ = module(hidden, token_mask=mask)
    _, _, indices = module.gate(hidden.flatten(0, 1))
    expected = [0] * 8
    for position, experts in enumerate(indices.tolist()):
        if mask.flatten()[position]:
            for expert in experts:
                expected[expert] += 1
    assert counts.tolist() == expected
    assert counts.dtype == torch.int64


def test_model_counts_exclude_padding():
    trained = model()
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    counts = trained(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).expert_counts
    assert counts.shape == (3, 8)  # two main layers with experts and the MTP layer
    assert counts.sum(dim=1).tolist() == [16 * 3] * 3


def test_bias_moves_once_per_update_whatever_the_number_of_forwards():
    trained = model(router_bias_update_speed=0.25)
    load = sum(trained(tokens(2, n), labels=tokens(2, n)).expert_counts for n in (10, 20, 30))
    before = biases(trained)
    used = trained.update_router_bias()
    assert torch.equal(used, load)
    expected = before.clone()
    for layer in range(3):
        mean = sum(load[layer].tolist()) / 8
        for expert in range(8):
            count = load[layer, expert].item()
            expected[layer, expert] += 0.25 if count < mean else -0.25 if count > mean else 0.0
    assert torch.equal(biases(trained), expected)
    assert not torch.equal(biases(trained), before)

    trained.update_router_bias()  # nothing was counted since
    assert torch.equal(biases(trained), expected)


def test_evaluation_does_not_count():
    trained = model()
    trained.eval()
    assert trained(tokens(), labels=tokens()).expert_counts is not None
    trained.train()
    with torch.no_grad():
        trained(tokens(), labels=tokens())
    before = biases(trained)
    trained.update_router_bias()
    assert torch.equal(biases(trained), before)


def test_recentred_biases_keep_their_mean_and_the_choice():
    moved = {}
    for recenter in (False, True):
        trained = model(router_bias_update_speed=0.25, router_bias_recenter=recenter)
        before = biases(trained)
        trained(tokens(), labels=tokens())
        trained.update_router_bias()
        moved[recenter] = biases(trained) - before
    torch.testing.assert_close(moved[True].mean(dim=1), torch.zeros(3))
    shift = moved[False] - moved[True]
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))


def test_a_frozen_router_keeps_its_bias():
    trained = model()
    frozen, *others = (module for module in trained.modules() if isinstance(module, TopKRouter))
    frozen.weight.requires_grad_(False)
    before = biases(trained)
    trained(tokens(), labels=tokens())
    trained.update_router_bias()
    assert (biases(trained) != before).any(dim=1).tolist() == [False] + [True] * len(others)


def test_bias_moves_without_labels():
    """A loss outside of the model (label smoothing, preference training) runs no MTP layer; the others still move."""
    trained = model()
    trained(tokens())
    trained.update_router_bias()
    moved = biases(trained).abs().sum(dim=1) > 0
    assert moved.tolist() == [True, True, False]


def test_model_without_router():
    dense = FathomForCausalLM(
        FathomConfig.preset("classic", hidden_size=64, num_hidden_layers=1, vocab_size=97)
    ).train()
    dense(tokens(), labels=tokens()).loss.backward()
    assert dense.update_router_bias() is None


def test_bias_stays_in_fp32(tmp_path):
    trained = model(router_bias_update_speed=0.001)
    for router in trained.modules():
        if isinstance(router, TopKRouter):
            router.e_score_correction_bias.copy_(5 + torch.arange(8) * 0.001)
    expected = biases(trained)
    trained.save_pretrained(tmp_path)
    loaded = FathomForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    created = FathomForCausalLM._from_config(trained.config, dtype=torch.bfloat16)
    assert biases(created).dtype == torch.float32
    for converted in (loaded, trained.to(torch.bfloat16), trained.half(), trained.to(dtype=torch.float64)):
        assert biases(converted).dtype == torch.float32
        assert torch.equal(biases(converted), expected)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    loaded.train()(tokens(), labels=tokens()).loss.backward()
    loaded.update_router_bias()
    steps = (biases(loaded) - expected).abs()
    torch.testing.assert_close(steps[steps > 0], torch.full_like(steps[steps > 0], 0.001), atol=1e-6, rtol=0)


def balance_by_equations(scores: list[list[list[float]]], mask: list[list[int]], top_k: int) -> float:
    """arXiv 2412.19437, eqs 17-20, sequence by sequence."""
    losses = []
    for sequence, real in zip(scores, mask, strict=True):
        rows = [row for row, keep in zip(sequence, real, strict=True) if keep]
        experts = len(rows[0])
        loss = 0.0
        for i in range(experts):
            chosen = sum(i in sorted(range(experts), key=lambda j, r=row: -r[j])[:top_k] for row in rows)
            f = experts / (top_k * len(rows)) * chosen
            p = sum(row[i] / sum(row) for row in rows) / len(rows)
            loss += f * p
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("padded", [False, True])
def test_sequence_balance_loss_by_equations(padded):
    torch.manual_seed(0)
    scores = torch.rand(3, 7, 8)
    mask = torch.ones(3, 7, dtype=torch.bool)
    if padded:
        mask[0, :3] = False
        mask[2, 5:] = False
    loss = sequence_balance_loss(scores, 3, mask if padded else None)
    assert loss.item() == pytest.approx(balance_by_equations(scores.tolist(), mask.tolist(), 3), abs=1e-5)


def test_sequence_balance_loss_of_uniform_load_is_one():
    # Token t prefers experts t and t + 1 (mod 8), so that 8 tokens load every expert twice.
    scores = torch.full((2, 8, 8), 0.25)
    for token in range(8):
        scores[:, token, [token, (token + 1) % 8]] = 0.5
    assert sequence_balance_loss(scores, 2).item() == pytest.approx(1.0)
    collapsed = torch.full((2, 8, 8), 0.01)
    collapsed[..., :2] = 1.0
    assert sequence_balance_loss(collapsed, 2).item() > 3.5


def test_balance_loss_of_the_model_is_the_weighted_sum_over_layers():
    trained = model(seq_aux_loss_coef=0.5)
    outputs = trained(tokens(), labels=tokens(), output_router_logits=True)
    main = sum(
        balance_by_equations(logits.sigmoid().view(2, 20, 8).tolist(), [[1] * 20] * 2, 3)
        for logits in outputs.router_logits
    )
    assert len(outputs.router_logits) == 2
    assert trained.model(tokens()).balance_loss.item() == pytest.approx(0.5 * main, rel=1e-4)
    assert outputs.balance_loss.item() > 0.5 * main  # and the MTP layer's
    assert trained.eval()(tokens(), labels=tokens()).balance_loss is None


@torch.no_grad()
@pytest.mark.parametrize("limit", [None, 0.1])
def test_the_loop_of_a_compiled_step(limit):
    """Experts of a step of a few tokens as one loop over their weights, which is meant for a compiled graph."""
    eager = mixture("eager", n_routed_experts=16, swiglu_limit=limit)
    hidden = torch.randn(5, 64)
    _, weights, indices = eager.gate(hidden)
    expected = eager.experts(hidden, indices, weights)
    torch.testing.assert_close(experts_module._experts_in_one_loop(eager.experts, hidden, indices, weights), expected)
    compiled = mixture("sorted_mm", n_routed_experts=16, swiglu_limit=limit)
    torch._dynamo.reset()
    found = torch.compile(compiled.experts, fullgraph=True, backend="aot_eager")(hidden, indices, weights)
    torch.testing.assert_close(found, expected)
