"""Rows of equal length from documents of any length, and back to documents for the model.

    document 1        document 2   document 3 ...
    BOS a b c d e EOS BOS f g EOS  BOS h | i j ...          tokens, cut into rows of `sequence_length`
    0   1 2 3 4 5 6   0   1 2 3    0   1 | 0 1 ...          position ids: restart at a document and at a row
    -   a b c d e EOS -   f g EOS  -   h | - j ...          labels: no document has to foretell the next one's BOS

Restarted position ids are all that the model needs: without an attention mask it lets no document see another
(see `FathomModel.forward`), so a packed document has the logits that it has alone. DeepSeek-V4 packs this way
(sample-level masks, arXiv 2606.19348 section 4.2), DeepSeek-V3 packed without masks.
"""

from itertools import chain

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

IGNORED = -100
DOCUMENTS_AT_ONCE = 1000


def pack_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerFast, sequence_length: int, text_column: str = "text"
) -> Dataset:
    """Tokenizes documents and packs them into rows.

    Args:
        documents: one document per row, in `text_column`.
        tokenizer: with BOS, EOS and pad tokens; must not add BOS by itself.
        sequence_length: tokens per row.

    Returns:
        Rows of `input_ids`, `position_ids` and `labels`, each [sequence_length]. Every token of every document is
        in exactly one row; the last row of each batch of documents is filled with padding that is no target.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id

    def pack(batch: dict[str, list]) -> dict[str, list]:
        # The backend: transformers would warn of every document that is longer than the context.
        encoded = tokenizer.backend_tokenizer.encode_batch(batch[text_column], add_special_tokens=False)
        tokens = list(chain.from_iterable([bos, *document.ids, eos] for document in encoded))
        positions = list(chain.from_iterable(range(len(document.ids) + 2) for document in encoded))
        missing = -len(tokens) % sequence_length
        tokens += [pad] * missing
        positions += list(range(missing))

        rows: dict[str, list] = {"input_ids": [], "position_ids": [], "labels": []}
        for start in range(0, len(tokens), sequence_length):
            row = tokens[start : start + sequence_length]
            row_positions = positions[start : start + sequence_length]
            rows["input_ids"].append(row)
            rows["position_ids"].append(_restarted(row_positions))
            rows["labels"].append([IGNORED if token in (bos, pad) else token for token in row])
        return rows

    return documents.map(
        pack,
        batched=True,
        batch_size=DOCUMENTS_AT_ONCE,
        remove_columns=documents.column_names,
        desc="Packing",
    )


def _restarted(positions: list[int]) -> list[int]:
    """Positions of one row, counted from the row's start until the first document starts within it."""
    first_document = next((i for i, position in enumerate(positions) if position == 0), len(positions))
    return [*range(first_document), *positions[first_document:]]


def collate_rows(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of equal length -> `input_ids`, `position_ids`, `labels`, each [B, T]. No attention mask: see above."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "position_ids", "labels")}


def pad_conversations(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of `input_ids` and `labels` of different lengths -> right-padded [B, T], with an attention mask."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORED),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
    }
