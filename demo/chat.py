"""The chat panel: a conversation, a line to write in, and a line of figures about the answer.

The Chatbot's value is the only state. Every way to ask (send, example, retry, edit) first writes the conversation
up to the question, then runs `answer`, which all of them share, so that Stop and the figures work for each.
"""

import html
import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..training.errors import UserError
from .generation import Progress, Reply, split_reasoning, stream_reply
from .sampling import Sampling
from .shelf import ANSWERS, Shelf
from .texts import EXAMPLES, language_of, say

ANSWER_QUEUE = {"concurrency_limit": ANSWERS, "concurrency_id": "answers"}
REFRESH = 0.05  # seconds between two updates of the page

Message = dict[str, Any]  # gradio: {"role", "content": text or [{"type": "text", "text"}], "metadata": {"title", ...}}


@dataclass(frozen=True)
class Controls:
    """The components outside the panel that an answer depends on, in the order of `answer`'s arguments."""

    checkpoint: gr.Dropdown
    system_prompt: gr.Textbox
    thinking: gr.Checkbox
    max_new_tokens: gr.Slider
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    repetition_penalty: gr.Slider

    def inputs(self) -> list[gr.components.Component]:
        return list(vars(self).values())


def chat_panel(shelf: Shelf, controls: Controls, translated: gr.I18n, feedback: Path) -> None:
    """Lays out the panel in the current Blocks context and wires its events.

    Args:
        shelf: where the chosen model comes from.
        controls: settings of the answers.
        translated: labels by key.
        feedback: file that thumbs up and down are appended to.
    """
    chatbot = gr.Chatbot(
        elem_id="fathom-chat",
        label=translated("conversation"),
        show_label=False,
        placeholder=translated("welcome"),
        examples=[{"text": question, "display_text": question.replace("`", "")} for question in EXAMPLES],
        buttons=["copy", "copy_all"],
        feedback_options=("Like", "Dislike"),
        editable="user",
        layout="bubble",
        scale=1,
        height="60vh",
        min_height=260,
    )
    figures = gr.HTML(elem_id="fathom-figures", show_label=False)
    box = gr.Textbox(
        elem_id="fathom-message",
        placeholder=translated("message"),
        show_label=False,
        submit_btn=True,
        stop_btn=False,
        max_lines=8,
        autofocus=True,
    )

    def answer(
        history: list[Message],
        checkpoint: str | None,
        system_prompt: str,
        thinking: bool,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        top_k: float,
        repetition_penalty: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any]]:
        if not history or history[-1]["role"] != "user":  # an empty message was sent
            yield gr.skip(), "", gr.skip()
            return
        language = language_for(request)
        try:
            sampling = Sampling(
                max_new_tokens=int(max_new_tokens),
                temperature=temperature,
                top_p=top_p,
                top_k=int(top_k),
                repetition_penalty=repetition_penalty,
            )
            messages = to_messages(history, system_prompt)
            shown = thought = 0.0
            with (
                shelf.borrow(checkpoint or shelf.in_use().source) as loaded,
                closing(stream_reply(loaded.model, loaded.tokenizer, messages, sampling, thinking=thinking)) as replies,
            ):
                context = loaded.model.config.max_position_embeddings
                for progress in replies:
                    if progress.finish is None and time.perf_counter() - shown < REFRESH:
                        continue
                    shown = time.perf_counter()
                    reply = split_reasoning(progress.text, thinking)
                    if not reply.reasoning_ended:
                        thought = progress.seconds
                    turn = to_turn(reply, progress, thought, language)
                    yield [*history, *turn], figures_line(reply, progress, context, language), gr.skip()
        except UserError as error:
            # The question goes back to where it can be shortened; the conversation stays one that can go on.
            question = text_of(history[-1])
            problem = f"<span class='fathom-error' role='alert'>{html.escape(str(error))}</span>"
            yield history[:-1], problem, question

    def sent(text: str, history: list[Message]) -> tuple[str, list[Message]]:
        if not text.strip():
            return text, history
        return "", [*history, {"role": "user", "content": text}]

    def example(chosen: gr.SelectData) -> list[Message]:
        return [{"role": "user", "content": chosen.value["text"]}]

    def again(history: list[Message], retried: gr.RetryData) -> list[Message]:
        return history[: int(retried.index) + 1]

    def edited(history: list[Message], edit: gr.EditData) -> list[Message]:
        index = edit.index[0] if isinstance(edit.index, (list, tuple)) else edit.index
        return [*history[:index], {"role": "user", "content": edit.value}]

    def undone(history: list[Message], undo: gr.UndoData) -> tuple[list[Message], str]:
        return history[: int(undo.index)], text_of(history[int(undo.index)])

    def liked(history: list[Message], like: gr.LikeData, checkpoint: str, system_prompt: str) -> None:
        if isinstance(like.liked, bool):  # not where a thumb was taken back
            write_feedback(feedback, history, like.index, like.liked, checkpoint, system_prompt)

    def stopped(history: list[Message], line: str, request: gr.Request) -> tuple[list[Message], str, gr.Textbox]:
        language = language_for(request)
        return settle(history, language), f"{line} · {say(language, 'stopped')}", ready()

    def busy(request: gr.Request) -> tuple[gr.Textbox, str]:
        return gr.Textbox(interactive=False, submit_btn=False, stop_btn=True), say(language_for(request), "waiting")

    def ready() -> gr.Textbox:
        return gr.Textbox(interactive=True, submit_btn=True, stop_btn=False)

    quiet: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    questions = [
        box.submit(sent, [box, chatbot], [box, chatbot], **quiet),
        chatbot.example_select(example, None, chatbot, **quiet),
        chatbot.retry(again, chatbot, chatbot, **quiet),
        chatbot.edit(edited, chatbot, chatbot, **quiet),
    ]
    answers = []
    for question in questions:
        running = question.success(busy, None, [box, figures], **quiet).success(
            answer,
            [chatbot, *controls.inputs()],
            [chatbot, figures, box],
            api_visibility="private",
            show_progress="hidden",
            **ANSWER_QUEUE,
        )
        running.then(ready, None, box, **quiet)
        answers.append(running)
    halt = box.stop(None, None, None, cancels=answers, api_visibility="private")
    halt.then(stopped, [chatbot, figures], [chatbot, figures, box], **quiet)
    chatbot.undo(undone, chatbot, [chatbot, box], **quiet)
    clear = chatbot.clear(None, None, None, cancels=answers, api_visibility="private")
    clear.then(lambda: ([], "", ready()), None, [chatbot, figures, box], **quiet)
    # Else a thumb is dropped while an earlier one is being written.
    chatbot.like(liked, [chatbot, controls.checkpoint, controls.system_prompt], None, trigger_mode="multiple", **quiet)


def language_for(request: gr.Request) -> str:
    """The language of the browser that asks."""
    return language_of(request.headers.get("accept-language"))


def text_of(message: Message) -> str:
    """The plain text of one message of the Chatbot."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def to_messages(history: list[Message], system_prompt: str) -> list[dict[str, str]]:
    """The Chatbot's conversation as the chat template wants it: roles alternate, reasoning is left out.

    An answer that was stopped while it still reasoned counts as an empty one.
    """
    messages = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    for message in history:
        role = message["role"]
        is_thought = bool((message.get("metadata") or {}).get("title"))
        text = "" if is_thought else text_of(message)
        if role == "assistant":
            text = from_markdown(text)
        if messages and messages[-1]["role"] == role:
            text = "\n\n".join(filter(None, [messages.pop()["content"], text]))
        messages.append({"role": role, "content": text})
    return messages


def to_turn(reply: Reply, progress: Progress, thought: float, language: str) -> list[Message]:
    """The assistant's turn as the Chatbot shows it: the reasoning folded, then the answer.

    Args:
        reply: the text in its two parts.
        progress: how far it is.
        thought: seconds of reasoning.
        language: of the fold's title.
    """
    turn: list[Message] = []
    if reply.reasoning is not None:
        metadata: dict[str, Any] = {"title": say(language, "thought_title"), "status": "done", "duration": thought}
        if not reply.reasoning_ended and progress.finish is None:
            metadata = {"title": say(language, "thinking_title"), "status": "pending"}
        turn.append({"role": "assistant", "content": to_markdown(reply.reasoning), "metadata": metadata})
    if reply.answer or not turn:
        turn.append({"role": "assistant", "content": to_markdown(reply.answer)})
    return turn


def settle(history: list[Message], language: str) -> list[Message]:
    """A stopped conversation, in which no reasoning is shown as still going on."""
    done = {"title": say(language, "thought_title"), "status": "done"}
    return [
        {**message, "metadata": done} if (message.get("metadata") or {}).get("status") == "pending" else message
        for message in history
    ]


# A fenced block (closed or still being written) or a code span: Markdown shows what is inside literally.
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


def to_markdown(text: str) -> str:
    """A model's text such that `<module>` and `__init__` can be read; Markdown would take them for a tag and bold."""
    escaped = [part if i % 2 else html.escape(part, quote=False) for i, part in enumerate(_CODE.split(text))]
    return "".join(part if i % 2 else part.replace("__", "&#95;&#95;") for i, part in enumerate(escaped))


def from_markdown(text: str) -> str:
    """The inverse of `to_markdown`: what the model wrote."""
    return "".join(part if i % 2 else html.unescape(part) for i, part in enumerate(_CODE.split(text)))


def figures_line(reply: Reply, progress: Progress, context: int, language: str) -> str:
    """The line under the chat, as HTML: tokens, speed, and why the answer ended."""
    facts = []
    if progress.new_tokens:
        facts.append(say(language, "tokens", tokens=progress.new_tokens))
    else:
        facts.append(say(language, "reading", prompt=progress.prompt_tokens))
    if progress.tokens_per_second is not None:
        facts.append(say(language, "speed", speed=f"{progress.tokens_per_second:.1f}"))
    if progress.first_token_seconds is not None:
        facts.append(say(language, "first_token", seconds=f"{progress.first_token_seconds:.2f}"))
    facts.append(say(language, "context", used=progress.prompt_tokens + progress.new_tokens, context=context))
    if progress.finish is not None:
        why = "clipped" if progress.finish == "length" and progress.clipped else progress.finish
        facts.append(say(language, why, limit=progress.limit, context=context))
        if not reply.answer and not reply.reasoning:
            facts.append(say(language, "empty"))
    return html.escape(" · ".join(facts))


def write_feedback(
    path: Path, history: list[Message], index: Any, liked: bool, checkpoint: str, system_prompt: str
) -> None:
    """Appends one judged answer as a line of TRL's unpaired preference format, which its KTO trainer reads.

    Args:
        path: JSON-lines file; made with its folder.
        history: the conversation as the Chatbot holds it.
        index: the judged message, as `gr.LikeData.index`.
        liked: thumb up, or down.
        checkpoint, system_prompt: what gave the answer.
    """
    position = index[0] if isinstance(index, (list, tuple)) else index
    end = position + 1
    while end < len(history) and history[end]["role"] == "assistant":  # a thumb on the thought means the answer too
        end += 1
    *prompt, completion = to_messages(history[:end], system_prompt)
    row = {"prompt": prompt, "completion": [completion], "label": liked, "checkpoint": checkpoint}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")
