"""Text to ids, where a control token that somebody wrote in the text stays text.

    "a<think>b"   the tokenizer itself    a | <think> | b                the control token
                  encode_text             a | < | th | ink | > | b       its characters

A tokenizer matches its added tokens anywhere in a text, so a question, a document or the result of a tool could end a
turn or begin another one. transformers' `split_special_tokens=True` spares only the tokens that are `special`: not
`<｜User｜>`, `<think>` or the marks of tool calls. Here a copy of the backend that has no control tokens encodes the
text. `allowed_special` asks for some of them by name, as in tiktoken.
"""

import json
import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from .pieces import PIECE_LENGTH, pieces
from .special_tokens import SPECIAL_TOKENS

# The form of all DeepSeek's control tokens but <think> and </think>, with their own bars or ASCII's.
_MARK = re.compile(r"<[|｜].*[|｜]>", re.S)
_CHARACTERS_AT_ONCE = 4 * PIECE_LENGTH

# The latest copy of each tokenizer's backend, with what it was made for.
_backends: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[tuple, Tokenizer]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The tokens that text must not turn into, with their ids.

    These are the special tokens, the names in `chat_control_tokens`, DeepSeek's own and whatever has their form. A
    tokenizer without `chat_control_tokens` (not made by Fathom) also has those that its chat template writes. An added
    token of another kind is an ordinary word that the user added: it is not among them.
    """
    named = getattr(tokenizer, "chat_control_tokens", None)
    template = "" if named is not None else str(tokenizer.chat_template or "")

    def is_control(token) -> bool:
        content = token.content
        written = content in template and not content.isspace() and not content.strip().isidentifier()
        known = content in SPECIAL_TOKENS or content in (named or ())
        return token.special or known or written or _MARK.fullmatch(content) is not None

    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if is_control(token)}


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, allowed_special: Collection[str] = ()) -> list[int]:
    """Ids of one text, without BOS; `encode_texts` says more."""
    return encode_texts(tokenizer, [text], allowed_special)[0]


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], allowed_special: Collection[str] = ()
) -> list[list[int]]:
    """Ids of texts, none of which is a control token; they decode to the texts.

    Args:
        tokenizer: with a byte-level BPE.
        texts: of any length; memory is bounded by `pieces`, where the tokenizer is byte-level.
        allowed_special: control tokens that are meant where a text holds them.

    Returns:
        One list per text. No BOS and no EOS: who packs or prompts puts them.

    Raises:
        ValueError: a name in `allowed_special` that is no control token of the tokenizer.
    """
    backend = plain_backend(tokenizer, allowed_special)
    may_cut = is_byte_level(backend)
    ids: list[list[int]] = [[] for _ in texts]
    owners: list[int] = []
    waiting: list[str] = []

    def encode_waiting() -> None:
        for owner, encoding in zip(owners, backend.encode_batch(waiting, add_special_tokens=False), strict=True):
            ids[owner] += encoding.ids
        owners.clear()
        waiting.clear()

    size = 0
    for number, text in enumerate(texts):
        for piece in pieces(text) if may_cut else [text]:
            owners.append(number)
            waiting.append(piece)
            size += len(piece)
            if size >= _CHARACTERS_AT_ONCE:
                encode_waiting()
                size = 0
    encode_waiting()
    return ids


def is_byte_level(backend: Tokenizer) -> bool:
    """Whether a text may be encoded in pieces: other tokenizers may put a blank before each."""
    return isinstance(backend.decoder, decoders.ByteLevel)


def check_allowed(tokenizer: PreTrainedTokenizerFast, allowed_special: Collection[str]) -> None:
    """Raises:
    ValueError: a name that is no control token of the tokenizer, with the nearest ones.
    """
    known = control_tokens(tokenizer)
    for name in allowed_special:
        if name not in known:
            nearest = get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise ValueError(f"{name!r} is no control token of this tokenizer; known are {' '.join(nearest)}")


def plain_backend(tokenizer: PreTrainedTokenizerFast, allowed_special: Collection[str] = ()) -> Tokenizer:
    """The tokenizer's backend without its control tokens; it never gives their ids.

    Raises:
        ValueError: a name in `allowed_special` that is no control token, or a model without a vocabulary by token.
    """
    if isinstance(allowed_special, str):
        raise ValueError(f"allowed_special is the text {allowed_special!r}; give a list of control tokens")
    check_allowed(tokenizer, allowed_special)
    barred = {name: number for name, number in control_tokens(tokenizer).items() if name not in allowed_special}
    made_for = (tuple(barred.items()), len(tokenizer), id(tokenizer.backend_tokenizer))
    known, backend = _backends.get(tokenizer, (None, None))
    if known != made_for or backend is None:
        backend = _without(tokenizer.backend_tokenizer, barred)
        _backends[tokenizer] = made_for, backend
    return backend


def _without(backend: Tokenizer, barred: dict[str, int]) -> Tokenizer:
    """A copy of a backend in which text does not match the tokens `barred`; all other ids stay."""
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if not isinstance(model.get("vocab"), dict):
        raise ValueError(f"a {model.get('type')} tokenizer cannot encode control tokens as text; use a byte-level BPE")
    # All added tokens get their ids from the vocabulary: otherwise those that stay would move up to free ids.
    model["vocab"] |= {token["content"]: token["id"] for token in parts["added_tokens"]}
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in barred]
    if "merges" in model:
        # A control token that is also a learned word (`add_special_tokens` of one) must not come about by merges.
        pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if barred.keys().isdisjoint((*pair, "".join(pair)))]
    for name, number in barred.items():
        # The place is kept under a name that no text becomes: bytes are letters when the model sees them, none is NUL.
        del model["vocab"][name]
        model["vocab"][f"\0{number}"] = number
    parts["post_processor"] = parts["truncation"] = parts["padding"] = None
    return Tokenizer.from_str(json.dumps(parts))
