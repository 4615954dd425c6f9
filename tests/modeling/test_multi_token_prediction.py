"""Multi-token prediction: stock transformers' MTP layers on the same weights, targets, documents, loss."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.multi_token_prediction import targets_ahead

LAYERS = 2
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
}


def model(depths: int = 1, **overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    settings = {**SHAPE, "initializer_range": 0.15, "num_nextn_predict_layers": depths, **overrides}
    return FathomForCausalLM(FathomConfig(**settings)).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def stock_drafts(ours: FathomForCausalLM, ids: torch.Tensor, depths: int) -> list[torch.Tensor]:
    """Logits of stock's MTP layers with our weights: at depth k, index i predicts token i + k + 1."""
    config = {**SHAPE, "num_nextn_predict_layers": depths}
    main = DeepseekV3ForCausalLM(DeepseekV3Config(**config, attn_implementation="eager")).eval()
    main.load_state_dict(ours.state_dict(), strict=False)
    drafts = MtpModel(main, depths).eval()
    state = {}
    for name, value in ours.state_dict().items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= LAYERS:
            depth, rest = int(name.split(".")[2]) - LAYERS, name.split(".", 3)[3]
            rest = rest.replace("shared_head.norm", "post_norm")
            own = rest.split(".")[0] in ("enorm", "hnorm", "eh_proj", "post_norm")
            state[f"layers.{depth}.{rest}" if own else f"layers.{depth}.mtp_block.{rest}"] = value
    missing, unexpected = drafts.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("layers.")]

    length = ids.shape[1]
    hidden = main.model(ids, use_cache=False).last_hidden_state
    logits = []
    for depth in range(1, depths + 1):
        hidden = hidden[:, : length - depth]
        positions = torch.arange(depth, length)[None]
        cache = MtpCache(config=drafts.config)
        hidden = drafts.forward_layer(depth - 1, hidden, positions, cache, input_ids=ids[:, depth:])
        logits.append(drafts._project_to_logits(hidden))
    return logits


@torch.no_grad()
@pytest.mark.parametrize("depths", [1, 2])
def test_logits_and_loss_equal_stock(depths):
    ours, ids = model(depths), tokens(2, 30)
    hidden: list[torch.Tensor] = []
    for layer in ours.model.mtp_layers:
        layer.register_forward_hook(lambda module, args, output: hidden.append(output.hidden_states))
    loss = ours(ids, labels=ids).mtp_loss

    expected = stock_drafts(ours, ids, depths)
    cross_entropies = []
    for depth, (states, logits) in enumerate(zip(hidden, expected, strict=True), start=1):
        torch.testing.assert_close(ours.lm_head(states)[:, : 30 - depth], logits, atol=1e-4, rtol=0)
        cross_entropies.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, depth + 1 :].flatten()))
    torch.testing.assert_close(loss, torch.stack(cross_entropies).mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_targets_of_packed_rows(depth):
    lengths = [[5, 1, 2, 4], [3, 9]]
    positions = torch.tensor([[p for n in row for p in range(n)] for row in lengths])
    documents = [[d for d, n in enumerate(row) for _ in range(n)] for row in lengths]
    labels = torch.arange(24).view(2, 12)
    labels[0, 3] = labels[1, 7] = -100
    targets = targets_ahead(labels, positions, depth)
    for row in range(2):
        for i in range(12):
            j = i + depth + 1
            same = j < 12 and documents[row][j] == documents[row][i]
            assert targets[row, i] == (labels[row, j] if same else -100), (row, i)


def test_targets_without_packing():
    labels = tokens(3, 8)
    targets = targets_ahead(labels, torch.arange(8)[None], depth=1)
    assert torch.equal(targets[:, :6], labels[:, 2:])
    assert (targets[:, 6:] == -100).all()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("depths", [1, 2])
def test_documents_of_a_packed_row_know_nothing_of_each_other(depths, attn_implementation):
    ours = model(depths, attn_implementation=attn_implementation)
    positions = torch.tensor([[*range(9), *range(11)]])
    first, second = tokens(1, 9), tokens(1, 11)
    other_first, other_second = tokens(1, 9).flip(1), tokens(1, 11).flip(1)
    ignored = {"first": torch.full((1, 9), -100), "second": torch.full((1, 11), -100)}

    def mtp_loss(a, b, labels):
        return ours(torch.cat((a, b), 1), position_ids=positions, labels=torch.cat(labels, 1)).mtp_loss

    with torch.no_grad():
        alone = ours(first, labels=first).mtp_loss
        for later in (second, other_second):
            loss = mtp_loss(first, later, (first, ignored["second"]))
            torch.testing.assert_close(loss, alone, atol=1e-5, rtol=0)
        alone = ours(second, labels=second).mtp_loss
        for earlier in (first, other_first):
            loss = mtp_loss(earlier, second, (ignored["first"], second))
            torch.testing.assert_close(loss, alone, atol=1e-5, rtol=0)


def test_documents_too_short_for_a_target():
    """Mean over nothing: 0, not NaN, which would be the end of a training run."""
    ours = model(2).train()
    ids, positions = tokens(1, 8), torch.tensor([[0, 1] * 4])
    outputs = ours(ids, position_ids=positions, labels=ids)
    assert outputs.mtp_loss.item() == 0.0
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
    assert ours(ids[:, :2], labels=ids[:, :2]).loss.isfinite()


def test_loss_is_main_plus_weighted_mtp_plus_balance_in_training_only():
    ours, ids = model(2, mtp_loss_weight=0.3, seq_aux_loss_coef=0.01), tokens(2, 20)
    evaluated = ours(ids, labels=ids)
    main = F.cross_entropy(evaluated.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(evaluated.loss, main)
    assert evaluated.mtp_loss > 0
    trained = ours.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, main + 0.3 * evaluated.mtp_loss + trained.balance_loss)
    assert trained.balance_loss > 0


def test_gradient_does_not_depend_on_accumulation():
    """One batch of 8 and four of 2, with targets unevenly spread, padding and packed rows, given the total number."""
    ids = tokens(8, 24)
    labels = ids.clone()
    labels[0, :20] = -100
    labels[3, 5:] = -100
    positions = torch.arange(24).repeat(8, 1)
    positions[4:] = torch.tensor([*range(10), *range(14)])
    total = (labels[:, 1:] != -100).sum()
    gradients = []
    for micro_batch in (8, 2):
        # The balance loss is a mean over sequences, so weighed by targets it is left out here.
        ours = model(2, seq_aux_loss_coef=0.0).train()
        for rows in torch.arange(8).split(micro_batch):
            ours(ids[rows], labels=labels[rows], position_ids=positions[rows], num_items_in_batch=total).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_balance_loss_does_not_depend_on_accumulation():
    """With as many targets in every sequence, the balance term too is the mean over all sequences of the step."""
    ids = tokens(8, 24)
    gradients = []
    for micro_batch in (8, 2):
        ours = model(1, seq_aux_loss_coef=0.1).train()
        for rows in torch.arange(8).split(micro_batch):
            ours(ids[rows], labels=ids[rows], num_items_in_batch=8 * 23).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_mtp_learns():
    """Counting modulo 20: the token after next is as easy as the next one."""
    ours = model(1, initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=5e-3)
    starts = torch.randint(0, 20, (64, 8, 1), generator=torch.Generator().manual_seed(0))
    losses = []
    for start in starts[:40]:
        ids = 3 + (start + torch.arange(16)) % 20
        outputs = ours(ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.mtp_loss.item())
    assert losses[0] > 4.0
    assert losses[-1] < 0.5
