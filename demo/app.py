"""The page: which model, how it samples, and a panel to talk to it. Runs offline, on this machine only by default."""

import html
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TypedDict

import gradio as gr

from ..training.errors import UserError
from .chat import ANSWER_QUEUE, Controls, chat_panel, language_for, to_messages
from .generation import split_reasoning, stream_reply
from .sampling import Sampling
from .shelf import RANDOM, Shelf, is_untrained
from .texts import LOCALES, say

QUEUE_SIZE = 32  # waiting requests; later ones are told that the queue is full
STYLE = Path(__file__).with_name("style.css")
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]
MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono", "monospace"]
TRANSLATED = gr.I18n(**LOCALES)


class AnswerDetails(TypedDict):
    """What the API says about an answer, beside its text."""

    model: str
    reasoning: str
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    finish: str  # eos, length, stopped; empty while the answer grows


def build_app(shelf: Shelf, feedback: Path) -> gr.Blocks:
    """The page for the models of a shelf.

    Args:
        shelf: its current model, which must be loaded, is the one chosen at first.
        feedback: JSON-lines file that thumbs up and down are appended to.
    """
    with gr.Blocks(title="Fathom", analytics_enabled=False, fill_height=True) as app:
        controls = _sidebar(app)
        header = gr.HTML(elem_id="fathom-header")
        chat_panel(shelf, controls, TRANSLATED, feedback)
        _wire_picker(app, shelf, controls.checkpoint, header)
        _add_api(shelf)
    return app.queue(max_size=QUEUE_SIZE)


def launch(app: gr.Blocks, host: str, port: int, mcp: bool = False) -> str:
    """Serves the page in threads of its own and gives its URL; `app.block_thread()` waits for Ctrl-C.

    Args:
        app: from `build_app`.
        host, port: a free address of this machine.
        mcp: also serve the API to MCP clients, at `/gradio_api/mcp/`.
    """
    _, url, _ = app.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        show_error=True,
        mcp_server=mcp,
        prevent_thread_lock=True,
        i18n=TRANSLATED,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONO_FONTS),
        css_paths=STYLE,
        footer_links=["api", "settings"],
    )
    return url


def _sidebar(app: gr.Blocks) -> Controls:
    default, t = Sampling(), TRANSLATED
    with gr.Sidebar(label=t("settings"), open=False, width=350, elem_id="fathom-settings") as sidebar:
        checkpoint = gr.Dropdown(label=t("checkpoint"), info=t("checkpoint_info"), elem_id="fathom-checkpoint")
        system_prompt = gr.Textbox(label=t("system_prompt"), lines=2, max_lines=6)
        thinking = gr.Checkbox(label=t("thinking"), info=t("thinking_info"))
        with gr.Accordion(t("sampling"), open=True):
            new_tokens = gr.Slider(1, 2048, default.max_new_tokens, step=1, label=t("max_new_tokens"))
            temperature = gr.Slider(0, 2, default.temperature, step=0.05, label=t("temperature"))
            top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label=t("top_p"))
            top_k = gr.Slider(0, 200, default.top_k, step=1, label=t("top_k"))
            penalty = gr.Slider(1, 2, default.repetition_penalty, step=0.05, label=t("repetition_penalty"))
    # On a phone the sidebar would cover the chat, so only a wide page opens with it.
    app.load(None, None, sidebar, js="() => ({__type__: 'update', open: window.innerWidth > 900})")
    return Controls(checkpoint, system_prompt, thinking, new_tokens, temperature, top_p, top_k, penalty)


def _wire_picker(app: gr.Blocks, shelf: Shelf, picker: gr.Dropdown, header: gr.HTML) -> None:
    """Fills the picker when a page opens, and swaps the model when another one is chosen."""

    def opened(request: gr.Request) -> tuple[gr.Dropdown, str]:
        language = language_for(request)
        choices = [(label_of(source, shelf.models_dir, language), source) for source in shelf.sources()]
        return gr.Dropdown(choices=choices, value=shelf.in_use().source), describe(shelf, language)

    def chosen(source: str, request: gr.Request) -> tuple[str, str]:
        language = language_for(request)
        try:
            shelf.load(source)
            problem = ""
        except UserError as error:
            problem = str(error)
        return shelf.in_use().source, describe(shelf, language, problem)

    app.load(opened, None, [picker, header], api_visibility="private", show_progress="hidden", queue=False)
    # Gradio drops what is chosen while an earlier choice is being answered, unless an event may be multiple.
    picker.input(
        chosen,
        picker,
        [picker, header],
        api_visibility="private",
        show_progress_on=header,
        concurrency_limit=1,
        trigger_mode="multiple",
    )


def label_of(source: str, models_dir: Path, language: str) -> str:
    """How the page names a source: an untrained model as such, a checkpoint by its folder below `models_dir`."""
    if is_untrained(source):
        return say(language, "untrained_choice", generation=source.removeprefix(RANDOM))
    return source.removeprefix(f"{models_dir}/")


def describe(shelf: Shelf, language: str, problem: str = "") -> str:
    """The lines above the chat, as HTML: the model in use, its size, what is wrong."""
    loaded = shelf.in_use()
    total, active = loaded.parameters()
    facts = [
        say(language, "generation", generation=loaded.generation),
        say(language, "parameters", total=in_words(total)),
        say(language, "active", active=in_words(active)),
    ]
    name = html.escape(label_of(loaded.source, shelf.models_dir, language))
    lines = ["<h1>Fathom</h1>", f"<p><strong>{name}</strong> · {html.escape(' · '.join(facts))}</p>"]
    if is_untrained(loaded.source):
        lines.append(f"<p class='fathom-notice'>{html.escape(say(language, 'untrained'))}</p>")
    if problem:
        lines.append(f"<p class='fathom-error' role='alert'>{html.escape(problem)}</p>")
    return "".join(lines)


def in_words(count: int) -> str:
    """A count to three digits: 4.21 M, 671 B; the space does not break."""
    for unit, letter in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if count >= unit:
            return f"{count / unit:.3g}\N{NO-BREAK SPACE}{letter}"
    return str(count)


def _add_api(shelf: Shelf) -> None:
    """Adds the typed endpoint `/chat`, which waits in the same queue as the page's own answers."""

    def chat(
        message: str,
        history: list[dict[str, str]] | None = None,
        model: str | None = None,
        system_prompt: str = "",
        thinking: bool = False,
        max_new_tokens: int = Sampling.max_new_tokens,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        repetition_penalty: float = Sampling.repetition_penalty,
    ) -> Iterator[tuple[str, AnswerDetails]]:
        """Answers a message with a Fathom model, streamed: each output holds the whole answer so far.

        Args:
            message: What the user says now.
            history: Earlier turns, oldest first, as {"role": "user" or "assistant", "content": text}.
            model: One of the models on the page; the one in memory if left out.
            system_prompt: Instruction that stands before the conversation.
            thinking: Whether the model reasons first. The reasoning is in the details.
            max_new_tokens: Most tokens of the answer, reasoning included.
            temperature: 0 takes the most likely token each time.
            top_p: Sample from the tokens that together hold this probability.
            top_k: Sample from this many most likely tokens; 0 is off.
            repetition_penalty: Above 1 makes used tokens less likely.

        Returns:
            The answer, and details: reasoning, tokens, tokens per second, and how it ended.
        """
        try:
            sampling = Sampling(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                repetition_penalty=repetition_penalty,
            )
            messages = to_messages([*(history or []), {"role": "user", "content": message}], system_prompt)
            with (
                shelf.borrow(model or shelf.in_use().source) as loaded,
                closing(stream_reply(loaded.model, loaded.tokenizer, messages, sampling, thinking=thinking)) as replies,
            ):
                for progress in replies:
                    reply = split_reasoning(progress.text, thinking)
                    details = AnswerDetails(
                        model=loaded.source,
                        reasoning=reply.reasoning or "",
                        prompt_tokens=progress.prompt_tokens,
                        new_tokens=progress.new_tokens,
                        tokens_per_second=progress.tokens_per_second or 0.0,
                        finish=progress.finish or "",
                    )
                    yield reply.answer, details
        except UserError as error:
            raise gr.Error(str(error)) from error

    # Gradio types the outputs by this annotation, and takes an Iterator for one output of any type.
    chat.__annotations__["return"] = tuple[str, AnswerDetails]
    gr.api(chat, api_name="chat", **ANSWER_QUEUE)
