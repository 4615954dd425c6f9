"""Windows, compressed entries and their cache: padding, documents, rollback, reordering, ties, and float64 definitions.

A row alone, read at once and without a cache, is the oracle here; that it is right is shown by the parity with stock
transformers (`test_parity_deepseek_v4`), whose own padding and packing are wrong.
"""

import pytest
import torch
from device import forbid_reading
from torch import nn

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import host
from fathom.modeling.compressed_cache import DOCUMENT, NOWHERE, token_places
from fathom.modeling.compressor import Compressor, blocks

SHAPE = {
    "hidden_size": 64,
    "vocab_size": 97,
    "num_hidden_layers": 4,
    "token_mixers": ["swa", "csa", "hca", "csa", "swa"],
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 7,
    "compress_rate_hca": 12,
    "index_head_dim": 8,
    "index_topk": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LENGTH = 60  # 8 windows, 15 small blocks, 5 large blocks, 3 times more entries than are selected


def model(**overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    created = FathomForCausalLM(FathomConfig.preset("v4", **{**SHAPE, **overrides})).eval()
    for name, parameter in created.named_parameters():
        if name.endswith(("sinks", "position_bias")):
            nn.init.normal_(parameter, std=0.5)
    return created


def tokens(batch: int = 1, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def left_padded(paddings: list[int], length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(len(paddings), length)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    return ids.masked_fill(mask == 0, 2), mask


def in_chunks(ours: FathomForCausalLM, ids: torch.Tensor, chunks: list[int], mask: torch.Tensor | None = None):
    """Logits of all tokens, read chunk by chunk, and the cache."""
    cache, logits, seen = None, [], 0
    for piece in ids.split(chunks, dim=1):
        seen += piece.shape[1]
        options = {} if mask is None else {"attention_mask": mask[:, :seen]}
        output = ours(piece, cache=cache, use_cache=True, **options)
        cache = output.cache
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [25, 1, 1, 20, 13], [5] * 12], ids=str)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.usefixtures("host_reads")
def test_left_padding(chunks, attn_implementation):
    """Rows finish their blocks at different times, and yet have the logits they have alone."""
    ours = model(attn_implementation=attn_implementation)
    paddings = [0, 3, 30, 17]
    ids, mask = left_padded(paddings)
    logits, _ = in_chunks(ours, ids, chunks, mask)
    for row, padding in enumerate(paddings):
        alone = ours(ids[row : row + 1, padding:], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, padding:], alone, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.usefixtures("host_reads")
def test_padding_does_not_see_other_rows():
    """A row has as many entries as the longest; padding, which stands where the missing ones do, must not read them."""
    ours = model()
    ids, mask = tokens(2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 9:] = 0
    together, alone = ours(ids, attention_mask=mask), ours(ids[1:], attention_mask=mask[1:])
    torch.testing.assert_close(together.logits[1], alone.logits[0], atol=1e-4, rtol=0)


@pytest.mark.usefixtures("host_reads")
def test_generation_of_a_left_padded_batch():
    ours = model()
    ids, mask = left_padded([0, 5, 21], length=30)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    batch = ours.generate(ids, attention_mask=mask, **settings)
    for row, padding in enumerate([0, 5, 21]):
        alone = ours.generate(ids[row : row + 1, padding:], **settings)
        assert torch.equal(batch[row, 30:], alone[0, 30 - padding :])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.usefixtures("host_reads")
def test_packed_documents(use_cache):
    """Windows, entries and indexers end with the document; with a cache too, and the last document can go on."""
    ours = model()
    rows = [[13, 1, 24, 22], [60], [4, 5, 51]]
    ids = tokens(3)
    positions = torch.tensor([[p for length in row for p in range(length)] for row in rows])
    output = ours(ids, position_ids=positions, use_cache=use_cache)
    for row, lengths in enumerate(rows):
        for document, logits in zip(ids[row].split(lengths), output.logits[row].split(lengths), strict=True):
            torch.testing.assert_close(logits, ours(document[None], use_cache=False).logits[0], atol=1e-4, rtol=0)
    if use_cache:
        more = tokens(3, 9)
        follow = positions[:, -1:] + 1 + torch.arange(9)
        logits = ours(more, position_ids=follow, cache=output.cache).logits
        for row, lengths in enumerate(rows):
            whole = torch.cat((ids[row, -lengths[-1] :], more[row]))
            expected = ours(whole[None], use_cache=False).logits[0, -9:]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("recorded", "removed"), [(1, 1), (5, 1), (5, 4), (13, 1), (13, 11), (30, 1), (30, 4), (30, 11), (30, 29), (50, 50)]
)
@pytest.mark.usefixtures("host_reads")
def test_crop_is_exact(recorded, removed):
    """Wrong tokens are read and removed again: what follows is as if they had never been there."""
    ours, kept = model(), LENGTH - recorded
    ids, mask = left_padded([0, 9])
    _, cache = in_chunks(ours, ids[:, :kept], [kept], mask[:, :kept])
    cache.activate_past_recording()
    drafts = ids[:, kept:].clone()
    drafts[:, recorded - removed :] = 50
    ours(drafts, attention_mask=mask, cache=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == LENGTH - removed
    logits = ours(ids[:, LENGTH - removed :], attention_mask=mask, cache=cache).logits
    expected = ours(ids, attention_mask=mask, use_cache=False).logits[:, LENGTH - removed :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.usefixtures("host_reads")
def test_crop_without_recording():
    ours = model()
    _, cache = in_chunks(ours, tokens(), [LENGTH])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    # Nothing has left the window yet: no recording is needed.
    _, cache = in_chunks(ours, tokens(1, 6), [6])
    cache.crop(-2)
    logits = ours(tokens(1, 6)[:, 4:], cache=cache).logits
    torch.testing.assert_close(logits, ours(tokens(1, 6), use_cache=False).logits[:, 4:], atol=1e-4, rtol=0)
    cache.crop(-6)
    assert cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.usefixtures("host_reads")
def test_batch_operations_and_reset():
    ours = model()
    ids, mask = left_padded([0, 9, 14])
    more = tokens(3, 8)
    full = torch.cat((mask, torch.ones_like(more)), 1)
    rows = torch.tensor([2, 0, 0])

    def continued(cache, order):
        return ours(more, attention_mask=full[order], cache=cache).logits

    expected = ours(torch.cat((ids[rows], more), 1), attention_mask=full[rows], use_cache=False).logits[:, -8:]
    for operation in ("reorder_cache", "batch_select_indices"):
        _, cache = in_chunks(ours, ids, [LENGTH], mask)
        getattr(cache, operation)(rows)
        torch.testing.assert_close(continued(cache, rows), expected, atol=1e-4, rtol=0)
    _, cache = in_chunks(ours, ids[:1], [LENGTH], mask[:1])
    cache.batch_repeat_interleave(3)
    zeros = torch.zeros(3, dtype=torch.long)
    expected = ours(torch.cat((ids[zeros], more), 1), use_cache=False).logits[:, -8:]
    torch.testing.assert_close(continued(cache, zeros), expected, atol=1e-4, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(ours(more, cache=cache).logits, ours(more, use_cache=False).logits, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("host_reads")
def test_prompt_lookup_equals_greedy():
    """Drafts are read and cropped by transformers' own assisted decoding."""
    ours = model()
    ids = tokens(1, 10).repeat(1, 3)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, prompt_lookup_num_tokens=4, **settings), ours.generate(ids, **settings))


@torch.no_grad()
@pytest.mark.usefixtures("host_reads")
def test_equal_scores_choose_the_same_entries_in_prefill_and_decode():
    """One indexer head whose scores are nearly all 0: the choice is by age alone, and must not depend on the length."""
    ours = model(index_n_heads=1, index_topk=3)
    ids = tokens(2, LENGTH)
    logits, _ = in_chunks(ours, ids, [1] * LENGTH)
    torch.testing.assert_close(logits, ours(ids, use_cache=False).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.usefixtures("host_reads")
def test_entries_by_definition(overlap):
    """SPEC of the release's `Compressor`, channel by channel in float64."""
    width, m, length = 6, 4, 15
    config = FathomConfig.preset("v4", hidden_size=64)
    torch.manual_seed(0)
    compressor = Compressor(config, width, m, overlap)
    for parameter in compressor.parameters():
        nn.init.normal_(parameter, std=0.5)
    hidden = torch.randn(1, length, 64)
    places = torch.arange(length)[None]
    entries, entry_places = compressor(compressor.project(hidden), places, torch.tensor([[NOWHERE]]))
    assert entry_places[0].tolist() == [3, 7, 11]

    values, gates = (
        layer.weight.double() @ hidden[0].double().T for layer in (compressor.kv_proj, compressor.gate_proj)
    )
    for i in range(3):
        expected = torch.zeros(width, dtype=torch.float64)
        for channel in range(width):
            read = [(i * m + j, channel + width * overlap, j) for j in range(m)]
            if overlap and i:
                read += [((i - 1) * m + j, channel, j) for j in range(m)]
            weights = torch.stack([gates[c, t] + compressor.position_bias[j, c].double() for t, c, j in read]).softmax(
                0
            )
            expected[channel] = sum(w * values[c, t] for w, (t, c, _) in zip(weights, read, strict=True))
        expected = expected * torch.rsqrt(expected.square().mean() + 1e-6) * compressor.kv_norm.weight.double()
        torch.testing.assert_close(entries[0, i].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("host_reads")
def test_blocks_skip_padding_and_end_with_documents():
    """And are whole: the first row's blocks of 2, of 3 and 4, and of its second document are not."""
    places = torch.tensor([[NOWHERE, 2, 3, 4, DOCUMENT, DOCUMENT + 1, DOCUMENT + 2], [NOWHERE, 0, 1, 2, 3, 4, 5]])
    grid, found = blocks(torch.arange(1.0, 15.0).view(2, 7, 1), places, 3)
    empty, whole = (0, 1) if host.host_can_read(places) else (1, 0)
    assert (found[0, empty] == NOWHERE).all()
    assert found[0, whole].tolist() == [DOCUMENT, DOCUMENT + 1, DOCUMENT + 2]
    assert found[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert grid[0, empty, :, 0].tolist() == [0, 0, 0]
    assert grid[0, whole, :, 0].tolist() == [5, 6, 7]
    assert grid[1, ..., 0].tolist() == [[9, 10, 11], [12, 13, 14]]


@pytest.mark.parametrize("block", [1, 2, 4, 7])
def test_blocks_are_the_same_unread(block, monkeypatch):
    """Random documents, which begin anywhere, and padding: all whole blocks, in as many places as there can be."""
    generator = torch.Generator().manual_seed(block)
    for _ in range(30):
        rows = []
        for _ in range(3):
            row, lengths, firsts = [], *torch.randint(0, 12, (2, 9), generator=generator).tolist()
            for document, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
                row += [document * DOCUMENT + p for p in range(first, first + length)]
            for at in torch.randint(0, 20, (5,), generator=generator).tolist():
                row.insert(at, NOWHERE)
            rows.append(([NOWHERE] * 40 + row)[-40:])
        places, tokens = torch.tensor(rows), torch.randn(3, 40, 2, generator=generator)
        read = blocks(tokens, places, block)
        with monkeypatch.context() as patch:
            forbid_reading(patch)
            unread = blocks(tokens, places, block)
        assert unread[0].shape[1] == 40 // block
        for row in range(3):
            there = {place for place in rows[row] if place != NOWHERE}
            begins = sorted(place for place in there if place % DOCUMENT % block == 0)
            whole = [[first + i for i in range(block)] for first in begins]
            whole = [each for each in whole if there.issuperset(each)]
            for grid, found in (read, unread):
                ended = found[row, :, -1] != NOWHERE
                assert found[row][ended].tolist() == whole
                assert (grid[row][~ended] == 0).all()
                columns = [rows[row].index(place) for each in whole for place in each]
                assert torch.equal(grid[row][ended].flatten(0, 1), tokens[row][columns])


def test_places():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    places = token_places(positions, mask)
    assert places.tolist() == [[0, 1, 2, DOCUMENT, DOCUMENT + 1], [NOWHERE, NOWHERE, 0, 1, 2]]
    later = token_places(torch.tensor([[2, 3], [0, 1]]), None, places.amax(dim=1))
    assert later.tolist() == [[DOCUMENT + 2, DOCUMENT + 3], [DOCUMENT, DOCUMENT + 1]]


@torch.no_grad()
def test_a_mask_of_four_dimensions():
    with pytest.raises(ValueError, match="2-D attention_mask"):
        model()(tokens(1, 8), attention_mask=torch.zeros(1, 1, 8, 8))


@torch.no_grad()
@pytest.mark.usefixtures("host_reads")
def test_a_row_of_padding_is_no_trouble():
    ids, mask = left_padded([0, LENGTH])
    logits = model()(ids, attention_mask=mask).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.usefixtures("host_reads")
def test_gradients_reach_every_parameter(checkpointing, depths):
    ours = model(num_nextn_predict_layers=depths, token_mixers=["swa", "csa", "hca", "csa", *["swa"] * depths]).train()
    if checkpointing:
        ours.activation_checkpointing_enable()
    ids = tokens(4)
    ours(ids, labels=ids).loss.backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.usefixtures("host_reads")
def test_no_gradient_crosses_documents_or_the_future():
    ours = model().train()
    ids = tokens(1, 40)
    embeds = ours.get_input_embeddings()(ids).detach().requires_grad_()
    positions = torch.tensor([[*range(17), *range(23)]])
    ours(ids, inputs_embeds=embeds, position_ids=positions).logits[:, 17:30].square().sum().backward()
    seen = embeds.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [False] * 17 + [True] * 13 + [False] * 10


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_does_not_copy_the_past(rows):
    """Entries get a buffer with room at the first that is added; those after it are written behind them."""
    ours, ids = model(), tokens(rows, 60)
    cache = ours(ids[:, :16], use_cache=True).cache
    layer = next(layer for layer in cache.layers if "indexer" in layer.entries)
    buffers = []
    for t in range(16, 32):
        ours(ids[:, t : t + 1], cache=cache, use_cache=True)
        buffers.append((layer.entries["indexer"].shape[1], layer.entries["indexer"].data_ptr()))
    assert [count for count, _ in buffers] == [(t + 1) // 4 for t in range(16, 32)]
    assert len({pointer for count, pointer in buffers if 5 <= count <= 7}) == 1
    assert cache.allocated_nbytes() > cache.nbytes()
