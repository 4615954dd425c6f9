"""Labels that ask for nothing: a loss of exactly 0 and gradients of 0 for every parameter, in every generation.

And where some ask for something: every term against float64 sums that are written out here.
"""

import pytest
import torch
from generations import GENERATIONS, config, model, tokens

from fathom import FathomForCausalLM, FathomForSequenceClassification, FathomForTokenClassification
from fathom.modeling import modeling_fathom
from fathom.modeling.losses import IGNORED, divisor, share_of_batch
from fathom.modeling.multi_token_prediction import look_ahead

LENGTH = 24
NUMBERS = {"unsaid": None, "0": 0, "tensor(0)": torch.tensor(0), "7": 7, "tensor(7.)": torch.tensor(7.0)}
every_generation = pytest.mark.parametrize("generation", GENERATIONS)


def learner(generation: str, **overrides) -> FathomForCausalLM:
    """In training, with all terms: balance losses by sequence and by batch, MTP layers and a loss of the indexers."""
    losses = {"aux_loss_alpha": 0.1, "seq_aux_loss_coef": 0.1, "indexer_loss_coef": 0.5}
    depths = {"num_nextn_predict_layers": 2 if generation in ("v3", "v3.2") else 1} if generation[:2] > "v2" else {}
    return model(generation, **{**losses, **depths, **overrides}).train()


def kinds(length: int) -> dict[str, dict[str, torch.Tensor]]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 2] = 0
    return {
        "plain": {},
        "packed": {"position_ids": (torch.arange(length) % 9).expand(2, -1)},
        "padded": {"attention_mask": mask},
        "all padding": {"attention_mask": torch.zeros_like(mask)},
    }


def assert_nothing_is_learned(ours: torch.nn.Module, loss: torch.Tensor) -> None:
    assert loss.item() == 0
    loss.backward()
    learning = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert [name for name, gradient in learning.items() if gradient is None] == []
    assert [name for name, gradient in learning.items() if gradient.any() or not gradient.isfinite().all()] == []


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", kinds(LENGTH))
@every_generation
def test_nothing_is_learned_of_ignored_labels(generation, kind, number, skip_logits):
    ours, ids = learner(generation), tokens(2, LENGTH)
    labels = torch.full_like(ids, IGNORED)
    output = ours(
        ids, labels=labels, num_items_in_batch=NUMBERS[number], skip_logits=skip_logits, **kinds(LENGTH)[kind]
    )
    assert_nothing_is_learned(ours, output.loss)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("number", NUMBERS)
@every_generation
def test_texts_too_short_for_targets(generation, number, length):
    """Of one token nothing can be learned; with two, MTP layers have no target, and a second depth none with three."""
    ours, ids = learner(generation), tokens(2, length)
    output = ours(ids, labels=ids, num_items_in_batch=NUMBERS[number])
    if length == 1:
        assert_nothing_is_learned(ours, output.loss)
        return
    output.loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert output.loss > 0
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    if ours.config.num_nextn_predict_layers:
        assert (output.mtp_loss == 0) == (length == 2)


@pytest.mark.parametrize("number", [None, 40, torch.tensor(40)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@every_generation
def test_terms_of_few_targets_by_definition(generation, kind, number, monkeypatch):
    """The first row has some targets, the second none."""
    heads, cross_entropy = [], modeling_fathom.head_cross_entropy

    def spy(head, hidden_states, targets, num_items=None):
        heads.append((head(hidden_states).double(), targets))
        return cross_entropy(head, hidden_states, targets, num_items)

    monkeypatch.setattr(modeling_fathom, "head_cross_entropy", spy)
    ours, ids, inputs = learner(generation), tokens(2, LENGTH), kinds(LENGTH)[kind]
    labels = torch.full_like(ids, IGNORED)
    labels[0, 3:7], labels[0, 15:17] = ids[0, 3:7], ids[0, 15:17]
    output = ours(ids, labels=labels, num_items_in_batch=number, skip_logits=True, **inputs)

    positions = inputs.get("position_ids", torch.arange(LENGTH).expand(2, -1))
    terms = []
    for depth, (logits, _) in enumerate(heads):
        total, count = 0.0, 0
        for t in range(LENGTH):
            ahead = t + depth + 1
            # At depth 0 the label alone says what is foretold, beyond a document's end too.
            same = depth == 0 or (ahead < LENGTH and positions[0, ahead] - positions[0, t] == depth + 1)
            if ahead < LENGTH and labels[0, ahead] != IGNORED and same:
                total -= logits[0, t].log_softmax(dim=-1)[labels[0, ahead]].item()
                count += 1
        terms.append(total / (count if number is None else 40))
    assert output.loss.dtype == torch.float32
    expected = terms[0]
    if len(terms) > 1:
        drafts = sum(terms[1:]) / len(terms[1:])
        assert output.mtp_loss.item() == pytest.approx(drafts, rel=1e-5)
        expected += ours.config.mtp_loss_weight * drafts
    share = 1.0 if number is None else 6 / 40
    if output.balance_loss is not None:
        expected += share * output.balance_loss.item()
    if output.indexer_figures is not None:
        expected += 0.5 * output.indexer_figures["loss"].item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("generation", ["v3.2", "v4"])
def test_the_indexers_term_is_a_sum_over_queries_with_a_target(generation):
    ours, ids = learner(generation), tokens(3, LENGTH)
    labels = ids.clone()
    labels[1], labels[2, :20] = IGNORED, IGNORED
    count = int((labels[:, 1:] != IGNORED).sum())
    whole = ours(ids, labels=labels).indexer_figures["loss"].double()
    rows = [ours(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=1) for row in range(3)]
    parts = [output.indexer_figures["loss"].double() for output in rows]
    assert parts[1] == 0
    torch.testing.assert_close(sum(parts) / count, whole, rtol=1e-5, atol=0)


@every_generation
def test_a_micro_batch_without_targets_changes_no_sum(generation):
    """Under accumulation: the gradient is that of the micro-batch with targets, bit by bit."""
    ours, ids = learner(generation), tokens(4, LENGTH)
    labels = ids.clone()
    labels[2:] = IGNORED
    gradients = []
    for batches in ([slice(0, 2)], [slice(2, 4), slice(0, 2), slice(2, 4)]):
        ours.zero_grad()
        for rows in batches:
            ours(ids[rows], labels=labels[rows], num_items_in_batch=torch.tensor(46)).loss.backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


@torch.no_grad()
@every_generation
def test_evaluation_of_nothing(generation):
    ours, ids = learner(generation).eval(), tokens(2, LENGTH)
    for number in NUMBERS.values():
        output = ours(ids, labels=torch.full_like(ids, IGNORED), num_items_in_batch=number)
        assert output.loss.item() == 0
        assert output.mtp_loss is None or output.mtp_loss.item() == 0
        assert output.indexer_figures is None or all(value.item() == 0 for value in output.indexer_figures.values())


@pytest.mark.parametrize("kind", [FathomForSequenceClassification, FathomForTokenClassification])
@every_generation
def test_classifiers(generation, kind):
    """transformers' means: of no labels NaN, of some those of its own function."""
    ours, ids = kind(config(generation, num_labels=3)).train(), tokens(4, LENGTH)
    labels = ids % 3 if kind is FathomForTokenClassification else ids[:, 0] % 3
    nothing = ours(ids, labels=torch.full_like(labels, IGNORED)).loss
    learns = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert nothing.item() == 0
    nothing.backward()
    assert all(p.grad is not None and not p.grad.any() for p in learns.values())
    labels[1:3] = IGNORED
    output = ours.eval()(ids, labels=labels)
    logits, real = output.logits.double().flatten(0, -2), labels.flatten() != IGNORED
    by_hand = -logits.log_softmax(dim=-1)[real].gather(1, labels.flatten()[real, None]).mean()
    assert output.loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    ours.loss_function = lambda **_: torch.tensor(5.0)
    if kind is FathomForSequenceClassification:
        assert ours(ids, labels=labels).loss == 5


@pytest.mark.parametrize("labels", [1, 3])
def test_classifiers_of_numbers_and_of_several_labels(labels):
    """-100 is a number like any other there."""
    ours, ids = FathomForSequenceClassification(config("v3", num_labels=labels)).eval(), tokens(4, LENGTH)
    wanted = torch.tensor([[-100.0] * labels] * 4) if labels == 1 else torch.eye(4, labels)
    output = ours(ids, labels=wanted)
    difference = output.logits.double() - wanted
    losses = difference.square() if labels == 1 else -torch.nn.functional.logsigmoid(output.logits * (2 * wanted - 1))
    assert output.loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)


def test_divisors():
    some, none = torch.tensor([[1, IGNORED, 2]]), torch.full((1, 3), IGNORED)
    assert divisor(some, None) == 2
    assert divisor(none, None) == 1
    for nothing in (0, torch.tensor(0), torch.tensor(0.0), torch.tensor([0])):
        assert divisor(some, nothing) == 1
    assert divisor(some, torch.tensor(0.25)) == 0.25
    assert share_of_batch(none, None) == share_of_batch(none, 0) == share_of_batch(none, 9) == 0
    assert share_of_batch(some, None) == 1
    assert share_of_batch(some, 8) == 0.25


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_looking_beyond_the_end(length, steps):
    values = torch.arange(1, length + 1)[None]
    expected = [[values[0, t + steps].item() if t + steps < length else -1 for t in range(length)]]
    assert look_ahead(values, steps, fill=-1).tolist() == expected
    assert look_ahead(values[..., None].expand(-1, -1, 2), steps).shape == (1, length, 2)
