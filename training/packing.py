"""Rows of equal length from documents of any length, and back to documents for the model.

    document 1        document 2   document 3 ...
    BOS a b c d e EOS BOS f g EOS  BOS h | i j ...          tokens, cut into rows of `sequence_length`
    0   1 2 3 4 5 6   0   1 2 3    0   1 | 0 1 ...          position ids: restart at a document and at a row
    -   a b c d e EOS -   f g EOS  -   h | - j ...          labels: no document has to foretell the next one's BOS

Restarted position ids are all that the model needs: without an attention mask it lets no document see another
(see `FathomModel.forward`), so a packed document has the logits that it has alone. DeepSeek-V4 packs this way
(sample-level masks, arXiv 2606.19348 section 4.2), DeepSeek-V3 packed without masks.
"""

from collections.abc import Collection
from itertools import chain
from typing import Any, TypeVar

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from ..tokenizer import encode_texts
from ..tokenizer.plain_text import check_allowed
from .errors import UserError

IGNORED = -100
DOCUMENTS_AT_ONCE = 1000
BYTES_AT_ONCE = 1 << 24  # of text; its ids take 60 bytes each until they are written

Rows = TypeVar("Rows", bound=Dataset | IterableDataset)


def pack_documents(
    documents: Rows,
    tokenizer: PreTrainedTokenizerFast,
    sequence_length: int,
    text_column: str = "text",
    allowed_special: Collection[str] = (),
) -> Rows:
    """Tokenizes documents and packs them into rows.

    Args:
        documents: one document per row, in `text_column`; streamed ones are packed while they are read.
        tokenizer: with BOS, EOS and pad tokens.
        sequence_length: tokens per row.
        allowed_special: control tokens that are meant where a document holds them (marks of fill-in-the-middle, say).
            All others in a document are text.

    Returns:
        Rows of `input_ids`, `position_ids` and `labels`, each [sequence_length]. Every token of every document is
        in exactly one row; the last row of each batch of documents is filled with padding that is no target.

    Raises:
        UserError: no such column, a tokenizer without one of the tokens, or a name that is no control token.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if None in (bos, eos, pad):
        raise UserError("packing needs a tokenizer with bos_token, eos_token and pad_token; this one lacks one")
    try:
        check_allowed(tokenizer, allowed_special)
    except ValueError as error:
        raise UserError(str(error)) from error
    columns = column_names(documents)
    if text_column not in columns:
        raise UserError(f"the documents have no column {text_column!r}, only {', '.join(columns) or 'none'}")

    def pack(batch: dict[str, list]) -> dict[str, list]:
        encoded = encode_texts(tokenizer, [text or "" for text in batch[text_column]], allowed_special)
        tokens = list(chain.from_iterable([bos, *document, eos] for document in encoded))
        positions = list(chain.from_iterable(range(len(document) + 2) for document in encoded))
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

    return mapped(documents, pack, columns, "Packing", batched=True, batch_size=_documents_at_once(documents))


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a stream that was opened without them is asked for its first row.

    Raises:
        UserError: a dictionary of splits, or a stream without rows.
    """
    if not isinstance(rows, Dataset | IterableDataset):
        raise UserError(f"{type(rows).__name__} is no dataset of rows; give one split of it: data['train']")
    if rows.column_names is None:
        first = next(iter(rows.take(1)), None)
        if first is None:
            raise UserError("the streamed dataset holds no rows")
        return list(first)
    return list(rows.column_names)


def mapped(rows: Rows, function: Any, columns: list[str], title: str, **options: Any) -> Rows:
    """`rows.map` that leaves only the new columns; a progress bar where the number of rows is known."""
    if isinstance(rows, Dataset):
        options["desc"] = title
    return rows.map(function, remove_columns=columns, **options)


def _documents_at_once(documents: Dataset | IterableDataset) -> int:
    if not isinstance(documents, Dataset) or not documents.data.num_rows:
        return DOCUMENTS_AT_ONCE
    mean = documents.data.nbytes // documents.data.num_rows + 1
    return max(1, min(DOCUMENTS_AT_ONCE, BYTES_AT_ONCE // mean))


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
