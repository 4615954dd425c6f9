"""Whatever a caller, a file or a config hands to the native functions: what PyTorch makes of it, or what it raises.

`tests/processes/fuzz_kernels.py` does the same with drawn models for as long as one likes, and with sanitizers.
"""

import collections
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from generations import GENERATIONS, model, tokens
from processes import misuses
from processes.fuzz_kernels import Case, pytorch_alone

from fathom.modeling import decoder_layer, fused, int8, native
from fathom.modeling.experts import HashRouter

FUZZER = Path(__file__).parents[1] / "processes" / "fuzz_kernels.py"

pytestmark = pytest.mark.skipif(not native.wait(), reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def texts_of_any_length(monkeypatch) -> None:
    monkeypatch.setattr(fused, "multiplies_texts", lambda dtype: True)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {generation: model(generation, num_nextn_predict_layers=0) for generation in GENERATIONS}


@pytest.mark.parametrize("misuse", misuses.ALL, ids=lambda misuse: misuse.__name__)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_misuse(generation, misuse, models):
    case = Case(0, collections.Counter())
    case.strict = misuses.is_exact(models[generation])
    for seed in range(4):
        different = case.compare(f"seed {seed}", lambda given, seed=seed: misuse(given, seed), models[generation])
        assert not different, different[0]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (0, 4), (0, 0)])
def test_no_tokens_are_pytorchs(generation, shape, models):
    """What was the end of the process: a division by the number of tokens."""
    results = []
    for serves in (mock.MagicMock, pytorch_alone):
        with serves(), torch.no_grad():
            try:
                results.append(models[generation](torch.zeros(shape, dtype=torch.long)).logits.shape)
            except Exception as error:
                results.append(type(error))
    assert results[0] == results[1]


TABLES = {
    "zeros, as transformers makes it": lambda table, experts: table.zero_(),
    "the last expert alone": lambda table, experts: table.fill_(experts - 1),
    "some twice": lambda table, experts: table.random_(0, 2),
    "one token's alone": lambda table, experts: table[7].zero_(),
}


@pytest.mark.parametrize("length", [1, 16, 128, 129, 700, 2100])
@pytest.mark.parametrize("kind", list(TABLES))
@pytest.mark.parametrize("in_int8", [False, True])
def test_every_table_of_experts_is_served(kind, length, in_int8, monkeypatch):
    ours = model("v4", num_nextn_predict_layers=0, n_routed_experts=8, num_experts_per_tok=4, index_dense=True)
    if in_int8:
        int8.quantize(ours)
    for module in ours.modules():
        if isinstance(module, HashRouter):
            TABLES[kind](module.tid2eid, module.num_experts)
    served = []
    original = decoder_layer.decode_channels

    def spy(*args):
        served.append(original(*args) is not None)
        return original(*args)

    monkeypatch.setattr(decoder_layer, "decode_channels", spy)
    ids = tokens(1, length)
    with torch.no_grad():
        found = ours(ids)
        if length > 16 and not in_int8:
            assert served == [True] * 4
        with pytorch_alone():
            expected = ours(ids)
    assert torch.equal(found.expert_counts, expected.expert_counts)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", list(native.NUMBERS))
def test_what_is_not_finite_stays_so_in_int8(number, dtype):
    """A vector's bytes have one scale, and a NaN is larger than nothing."""
    layer = int8.Int8Linear(torch.nn.Linear(70, 33)).eval()
    x = torch.ones(1, 3, 70, dtype=dtype)
    x[0, 1, 5] = number
    layer.bias = None
    with torch.no_grad():
        output = layer(x)
    assert output[0, [0, 2]].isfinite().all()
    assert not output[0, 1].isfinite().any()


@pytest.mark.parametrize("iterations", [0, 1001, 10**9])
def test_steps_without_end_can_be_interrupted(iterations, monkeypatch):
    """Any number may stand in a config. Native functions hear no interrupt, so they take none of these."""
    ours = model("v4", num_nextn_predict_layers=0)
    taken = []
    for module in ours.modules():
        if hasattr(module, "sinkhorn_iters"):
            module.sinkhorn_iters = iterations
    monkeypatch.setattr("fathom.modeling.hyper_connections.sinkhorn", lambda *args: taken.append(args[1]) or args[0])
    with torch.no_grad():
        ours(tokens(1, 3))
    assert taken == [iterations] * 8


@pytest.mark.parametrize("wrong", [-1, 8, 100_000, 10**12, -(2**63)])
def test_a_table_that_names_other_experts_is_refused(tmp_path, wrong):
    ours = model("v4")
    ours.model.layers[0].mlp.gate.tid2eid[3, 1] = wrong
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.gate\.tid2eid names expert {wrong}; .*0 to 7"):
        type(ours).from_pretrained(tmp_path)
    # A trainer that goes on from a checkpoint.
    with pytest.raises(ValueError, match=f"tid2eid names expert {wrong}"):
        model("v4").load_state_dict(ours.state_dict())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_a_table_of_smaller_integers_is_one_of_int64(dtype):
    router = model("v4").model.layers[0].mlp.gate
    expected = router.tid2eid.clone()
    router.tid2eid = expected.to(dtype)
    router.check_table("gate")
    assert torch.equal(router.tid2eid, expected)
    for other, says in ((expected.float(), "float32"), (expected[:, :1], "a row must have"), (expected > 0, "bool")):
        router.tid2eid = other
        with pytest.raises(ValueError, match=f"gate.tid2eid is .*{says}"):
            router.check_table("gate")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers are gcc's")
@pytest.mark.parametrize("generic", [False, True], ids=["native", "generic"])
def test_with_sanitizers(generic):
    command = [sys.executable, str(FUZZER), "--seconds", "25", "--sanitize"]
    done = subprocess.run(command + ["--generic"] * generic, capture_output=True, text=True, timeout=600, check=False)
    if "cannot be preloaded" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert "0 differences" in done.stdout
