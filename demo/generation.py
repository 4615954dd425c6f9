"""One streamed answer of a causal language model, for the terminal and for the browser.

    prompt ids --> thread: model.generate(streamer, stopping criterion)
                        |  text as it is decoded
    caller     <-- stream(): one `Progress` per piece of text, and at least every `TICK` seconds

Whatever ends the caller (a stop button, a closed tab, Ctrl-C, an exception) closes the generator, which sets the
stop event and cancels the text: no forward pass runs for nobody. A row of a shared batch ends at once, also while it
waits or its prompt is being read; a text that is generated apart ends after its next token. Only the transformers
interface is needed: `generate()` and `config.max_position_embeddings`.

Chat format: DeepSeek-V3.1, where the prompt ends in `<think>` (reasoning first) or `</think>` (answer at once).
"""

import queue
import threading
import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

from ..modeling.batch_rows import Cancellation, SharedBatchFull
from ..tokenizer import check_text, encode_chat, encode_text
from ..training.chat_templates import check_template
from ..training.errors import UserError, reason
from .sampling import Sampling

TICK = 0.1  # seconds between two looks at a silent model; bounds how long a closed consumer goes unnoticed
JOIN = 2.0  # seconds to wait for the last forward pass; bounded, since gradio closes generators on its event loop

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Progress:
    """A reply so far. Times are in seconds; tokens include the end-of-sentence token."""

    text: str
    prompt_tokens: int
    new_tokens: int
    limit: int  # tokens this reply may have: `max_new_tokens`, or less where the context has less room
    clipped: bool  # whether the context, and not `max_new_tokens`, set the limit
    first_token_seconds: float | None
    decode_seconds: float  # from the first to the latest token
    finish: Literal["eos", "length", "stopped"] | None = None  # None while it is being generated

    @property
    def seconds(self) -> float:
        """Time from the start to the latest token."""
        return (self.first_token_seconds or 0.0) + self.decode_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding, without the prompt's share; None until two tokens are there."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else None


class _Watch(StoppingCriteria):
    """Sees every new token: counts and clocks it, and ends generation once the event is set."""

    def __init__(self, prompt_tokens: int, stop: threading.Event) -> None:
        self.prompt_tokens = prompt_tokens
        self.stop = stop
        self.new_tokens = 0
        self.latest_token: int | None = None
        self.started = time.perf_counter()
        self.first: float | None = None
        self.latest = self.started

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        self.latest = time.perf_counter()
        if self.first is None:
            self.first = self.latest
        self.new_tokens = input_ids.shape[1] - self.prompt_tokens  # input_ids: [1, T]
        self.latest_token = int(input_ids[0, -1])
        return torch.full((1,), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


def raw_prompt(tokenizer: PreTrainedTokenizerBase, text: str, allowed_special: Collection[str] = ()) -> list[int]:
    """Token ids of plain text to be continued, with the BOS that every document of the corpus began with.

    Fathom's tokenizers add no BOS by themselves (the chat template writes it), so it is put here.

    Args:
        tokenizer: with a byte-level BPE.
        text: its control tokens are text too (`encode_text`).
        allowed_special: control tokens that are meant where the text holds them.

    Raises:
        UserError: no token to start from, text that is not valid Unicode, or a name that is no control token.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    try:
        prompt = [*bos, *encode_text(tokenizer, check_text(text), allowed_special)]
    except ValueError as error:
        raise UserError(str(error)) from error
    if not prompt:
        raise UserError(
            "the prompt is empty and this tokenizer has no begin-of-sentence token; write a word to start from"
        )
    return prompt


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    thinking: bool = False,
    allowed_special: Collection[str] = (),
) -> list[int]:
    """Token ids of a conversation up to where the assistant's turn begins.

    Args:
        tokenizer: one with a chat template.
        messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first. Control tokens in them,
            also in what the model said, are text (`encode_chat`).
        thinking: whether the reply opens with reasoning.
        allowed_special: control tokens that are meant where a message holds them.

    Raises:
        UserError: no chat template, a conversation the template refuses, text that is not valid Unicode, or a name
            that is no control token.
    """
    for message in messages:
        _checked(message["content"])
    options: dict[str, Any] = {"add_generation_prompt": True, "thinking": thinking}
    check_template(tokenizer, messages, **options)
    try:
        encoded = encode_chat(tokenizer, messages, allowed_special=allowed_special, **options)
    except Exception as error:
        raise UserError(f"the chat template refuses this conversation: {reason(error)}") from error
    if not encoded.input_ids:
        raise UserError("the chat template renders no token from this conversation; mend chat_template.jinja")
    return encoded.input_ids


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    stop: threading.Event | None = None,
    draft: bool = False,
) -> Generator[Progress]:
    """Generates a continuation of `prompt` in a thread and yields it as it grows.

    Args:
        model: any causal language model in eval mode.
        tokenizer: decodes the new tokens.
        prompt: token ids, the model's whole input.
        sampling: how tokens are chosen, and how many at most.
        stop: set it from anywhere to end generation within `TICK` seconds, or after the token in work. It is always
            set in the end.
        draft: let the model's MTP layers draft.

    Yields:
        Progress: at least one; the last one, and only that one, has `finish`. Between them at most `TICK` seconds
            pass, with or without new text, so that the caller can be closed while a prompt is being read.

    Raises:
        UserError: the prompt is empty or fills the context, too many texts wait, or there are no MTP layers to draft.
        Exception: whatever `generate()` raised in its thread.
    """
    if not prompt:
        raise UserError("the prompt is empty; write a word to start from")
    if draft and not getattr(model.config, "num_nextn_predict_layers", 0):
        raise UserError("the model has no MTP layers to draft with (num_nextn_predict_layers is 0); leave --draft out")
    context = model.config.max_position_embeddings
    room = context - len(prompt)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, but the model's context holds {context} and the answer needs room; "
            f"shorten the prompt or start a new conversation"
        )
    limit = min(sampling.max_new_tokens, room)
    stop = stop or threading.Event()
    watch, cancellation = _Watch(len(prompt), stop), Cancellation()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=TICK, skip_special_tokens=True)
    eos = _eos_ids(model, tokenizer)
    failures: list[BaseException] = []

    def generate() -> None:
        input_ids = torch.tensor([list(prompt)], device=model.device)  # [1, T]
        try:
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=limit,
                eos_token_id=eos or None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(eos), None),
                stopping_criteria=[watch, cancellation],
                streamer=streamer,
                use_mtp=draft or None,
                num_beams=1,  # whatever the checkpoint says: beams cannot be streamed
                **sampling.generate_kwargs(),
            )
        # Panics of Rust extensions are no `Exception`; without this the caller would wait for ever.
        except BaseException as error:
            failures.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    def progress(finish: Literal["eos", "length", "stopped"] | None = None) -> Progress:
        return Progress(
            text=text,
            prompt_tokens=len(prompt),
            new_tokens=watch.new_tokens,
            limit=limit,
            clipped=room < sampling.max_new_tokens,
            first_token_seconds=None if watch.first is None else watch.first - watch.started,
            decode_seconds=0.0 if watch.first is None else watch.latest - watch.first,
            finish=finish,
        )

    text = ""
    worker = threading.Thread(target=generate, name="fathom-generate", daemon=True)
    worker.start()
    try:
        while True:
            try:
                text += next(streamer)
            except queue.Empty:
                pass
            except StopIteration:
                break
            if stop.is_set():
                cancellation.cancel()
            yield progress()
        if failures:
            raise failure_of(failures[0])
        if watch.latest_token in eos:
            yield progress("eos")
        else:
            yield progress("length" if watch.new_tokens >= limit else "stopped")
    finally:
        stop.set()
        cancellation.cancel()
        worker.join(JOIN)


def failure_of(error: BaseException) -> Exception:
    """What a caller is told of an error in the thread of `generate()`: an `Exception`, which ends nobody else."""
    if isinstance(error, SharedBatchFull):
        return UserError("as many answers are being given or wait as may; try again later")
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    sampling: Sampling,
    *,
    thinking: bool = False,
    stop: threading.Event | None = None,
) -> Generator[Progress]:
    """`stream` for a conversation: the assistant's next turn. Arguments and errors of `chat_prompt` and `stream`."""
    return stream(model, tokenizer, chat_prompt(tokenizer, messages, thinking), sampling, stop)


@dataclass(frozen=True)
class Reply:
    """A reply's text in its two parts."""

    reasoning: str | None  # None where the model did not reason
    answer: str
    reasoning_ended: bool = True


def split_reasoning(text: str, thinking: bool) -> Reply:
    """Parts a reply at `</think>`.

    The think tokens are ordinary ones (DeepSeek marks them `special: false`), so decoded text still holds them. With
    `thinking` the prompt already opened the reasoning; without it a model may still open one itself.
    """
    if not thinking and not text.startswith(THINK):
        return Reply(None, text)
    reasoning, end, answer = text.removeprefix(THINK).partition(END_THINK)
    return Reply(reasoning.strip(), answer.lstrip(), reasoning_ended=bool(end))


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sentence ids: the generation config's, else the tokenizer's."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _checked(text: str) -> str:
    try:
        return check_text(text)
    except ValueError as error:
        raise UserError(str(error)) from error
