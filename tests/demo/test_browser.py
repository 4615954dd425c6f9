"""The page in a real browser: English on a light desktop, Chinese on a dark phone.

With FATHOM_SCREENSHOT_DIR set, pictures of the page are saved there; with FATHOM_SCREENSHOT_CHECKPOINT as well, also
of a conversation with that model.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VIEWS = {
    "en": {"locale": "en-US", "color_scheme": "light", "viewport": {"width": 1280, "height": 800}},
    "zh": {"locale": "zh-CN", "color_scheme": "dark", "viewport": {"width": 390, "height": 844}, "has_touch": True},
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api.expect.set_options(timeout=30_000)  # machines may be busy
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET_FLAGS)
        yield chromium
        chromium.close()


class Talk:
    """What a person does on the page."""

    def __init__(self, page: Any, name: str) -> None:
        self.page = page
        self.name = name
        self.box = page.locator("#fathom-message textarea")
        self.stop_button = page.locator("#fathom-message .stop-button")
        self.send_button = page.locator("#fathom-message .submit-button")
        self.figures = page.locator("#fathom-figures")
        self.header = page.locator("#fathom-header")
        self.questions = page.locator("#fathom-chat .user.message")
        self.answers = page.locator("#fathom-chat .bot.message")

    def ask(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def wait_until_idle(self) -> None:
        sync_api.expect(self.send_button).to_be_visible(timeout=30_000)
        sync_api.expect(self.box).to_be_enabled()

    def set_number(self, label: str, value: str) -> None:
        field = self.page.get_by_label(re.compile(f"number input for {re.escape(label)}"))
        field.fill(value)
        field.press("Tab")

    def picture(self, moment: str) -> None:
        if folder := os.environ.get("FATHOM_SCREENSHOT_DIR"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(folder) / f"{self.name}-{moment}.png"))


@pytest.fixture
def talk(browser: Any, page_server: Any) -> Iterator[Callable[[str], Talk]]:
    """Opens the page in a view; in the end nothing may have been asked of another host or have failed in the page."""
    problems: list[str] = []
    contexts = []

    def watch(request: Any) -> None:
        if not request.url.startswith((page_server.url, "data:", "blob:")):
            problems.append(f"request to {request.url}")

    def listen(message: Any) -> None:
        if message.type == "error":
            problems.append(f"console: {message.text}")

    def open_page(view: str) -> Talk:
        context = browser.new_context(**VIEWS[view])
        contexts.append(context)
        page = context.new_page()
        page.on("request", watch)
        page.on("console", listen)
        page.on("pageerror", lambda error: problems.append(f"page: {error}"))
        page.goto(page_server.url + ("?__theme=dark" if view == "zh" else ""))
        talking = Talk(page, view)
        sync_api.expect(talking.header).to_contain_text("Fathom")
        return talking

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def test_an_english_desktop(talk: Callable[[str], Talk], page_server: Any) -> None:
    en = talk("en")
    sync_api.expect(en.header).to_contain_text("long · generation v3")
    assert en.box.get_attribute("placeholder") == "Write a message"
    en.picture("empty")
    en.set_number("Temperature (0: greedy)", "0")
    en.set_number("Tokens per answer", "40")

    en.page.get_by_role("button", name=re.compile("textwrap.dedent")).click()
    sync_api.expect(en.figures).to_contain_text("40 tokens")
    sync_api.expect(en.figures).to_contain_text("cut at 40 tokens")
    sync_api.expect(en.figures).to_contain_text("tokens/s")
    en.wait_until_idle()
    sync_api.expect(en.questions).to_contain_text("What does textwrap.dedent(text) do?")
    first = en.answers.last.inner_text()
    en.picture("answered")

    en.page.get_by_role("button", name="Like", exact=True).click()
    row = json.loads(wait_for(lambda: page_server.feedback.exists() and page_server.feedback.read_text()))
    assert row["label"] is True
    assert row["prompt"][-1]["content"] == "What does `textwrap.dedent(text)` do?"

    with page_server.watched(pause=0.05):
        en.page.get_by_role("button", name="Retry").click()
        sync_api.expect(en.stop_button).to_be_visible()
        en.wait_until_idle()
    assert en.answers.last.inner_text() == first, "greedy: the same question has the same answer"
    assert en.answers.count() == 1

    en.page.get_by_role("button", name="Edit").click()
    en.page.locator("#fathom-chat textarea").fill("And `len`?")
    with page_server.watched(pause=0.05):
        en.page.get_by_role("button", name="Submit", exact=True).click()
        sync_api.expect(en.stop_button).to_be_visible()
        sync_api.expect(en.questions).to_contain_text("And len?")
        en.wait_until_idle()

    en.page.get_by_role("button", name="Undo").click()
    sync_api.expect(en.answers).to_have_count(0)
    sync_api.expect(en.box).to_have_value("And `len`?")


def test_stop_ends_the_generation_itself(talk: Callable[[str], Talk], page_server: Any) -> None:
    en = talk("en")
    en.set_number("Temperature (0: greedy)", "0")
    en.set_number("Tokens per answer", "2048")
    en.page.get_by_label("Think first").check()
    with page_server.watched() as seen:
        en.ask("the")
        sync_api.expect(en.page.get_by_text("Thinking", exact=True)).to_be_visible()
        wait_for(lambda: len(seen) > 30)
        en.stop_button.click()
        sync_api.expect(en.figures).to_contain_text("stopped")
        shown = len(seen)
        wait_for(lambda: still(lambda: len(seen)))
    assert len(seen) < shown + 50 < 2048, "it ends within half a second of forwards"
    assert still(en.figures.inner_text)
    sync_api.expect(en.page.get_by_text("Thought", exact=True)).to_be_visible()
    en.wait_until_idle()

    en.page.get_by_label("Think first").uncheck()
    en.set_number("Tokens per answer", "5")
    en.ask("again")
    sync_api.expect(en.figures).to_contain_text("cut at 5 tokens")
    en.wait_until_idle()


def test_clearing_ends_the_generation_too_and_an_empty_message_starts_none(
    talk: Callable[[str], Talk], page_server: Any
) -> None:
    en = talk("en")
    en.set_number("Temperature (0: greedy)", "0")
    en.set_number("Tokens per answer", "2048")
    with page_server.watched() as seen:
        en.ask("  ")
        time.sleep(0.5)
        assert not seen
        en.ask("the")
        wait_for(lambda: len(seen) > 10)
        en.page.get_by_role("button", name="Clear").click()
        wait_for(lambda: still(lambda: len(seen)))
    assert len(seen) < 2048
    sync_api.expect(en.page.locator("#fathom-chat .message")).to_have_count(0)
    en.wait_until_idle()
    en.picture("cleared")


def test_closing_the_tab_ends_the_generation(talk: Callable[[str], Talk], page_server: Any) -> None:
    en = talk("en")
    en.set_number("Temperature (0: greedy)", "0")
    en.set_number("Tokens per answer", "2048")
    with page_server.watched() as seen:
        en.ask("the")
        wait_for(lambda: len(seen) > 10)
        en.page.close()
        wait_for(lambda: still(lambda: len(seen)))
    assert len(seen) < 2048


def test_a_prompt_that_is_too_long_comes_back_with_the_reason(talk: Callable[[str], Talk]) -> None:
    en = talk("en")
    en.ask("z" * 5000)
    sync_api.expect(en.figures.get_by_role("alert")).to_contain_text("context holds 4096")
    sync_api.expect(en.box).to_have_value("z" * 5000)
    sync_api.expect(en.page.locator("#fathom-chat .message")).to_have_count(0)
    en.wait_until_idle()


def test_the_picker_swaps_models_and_survives_a_damaged_one(talk: Callable[[str], Talk]) -> None:
    en = talk("en")
    picker = en.page.get_by_label("Model")
    picker.click()
    en.page.get_by_role("option", name="damaged").click()
    sync_api.expect(en.header.get_by_role("alert")).to_contain_text("tokenizer.json")
    sync_api.expect(picker).to_have_value("long")
    picker.click()
    en.page.get_by_role("option", name="untrained classic nano (random weights)").click()
    sync_api.expect(en.header).to_contain_text("Untrained: the weights are random")
    sync_api.expect(en.header).to_contain_text("generation classic")
    en.set_number("Tokens per answer", "5")
    en.ask("hi")
    sync_api.expect(en.figures).to_contain_text(" of 1024")
    en.wait_until_idle()
    en.picture("untrained")
    picker.click()
    en.page.get_by_role("option", name="long").click()
    sync_api.expect(en.header).to_contain_text("long")
    sync_api.expect(en.header).not_to_contain_text("Untrained")


def test_a_model_chosen_while_another_one_is_loaded(
    talk: Callable[[str], Talk], page_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, begun, read_on = page_server.shelf.load, threading.Event(), threading.Event()

    def load_when_told(source: str) -> Any:
        if source == page_server.damaged:
            begun.set()
            assert read_on.wait(60)
        return load(source)

    monkeypatch.setattr(page_server.shelf, "load", load_when_told)
    en = talk("en")
    picker = en.page.get_by_label("Model")
    picker.click()
    en.page.get_by_role("option", name="damaged").click()
    assert begun.wait(30)
    picker.click()
    en.page.get_by_role("option", name="untrained moe nano (random weights)").click()
    read_on.set()
    sync_api.expect(en.header).to_contain_text("generation moe")
    sync_api.expect(picker).to_have_value("untrained moe nano (random weights)")
    picker.click()
    en.page.get_by_role("option", name="long").click()
    sync_api.expect(en.header).to_contain_text("long · generation v3")


def test_a_chinese_phone(talk: Callable[[str], Talk], page_server: Any) -> None:
    zh = talk("zh")
    assert zh.box.get_attribute("placeholder") == "输入消息"
    sync_api.expect(zh.header).to_contain_text("v3 代")
    sync_api.expect(zh.box).to_be_in_viewport()
    width = zh.page.evaluate("document.documentElement.scrollWidth")
    assert width <= VIEWS["zh"]["viewport"]["width"], "nothing sticks out at the side"
    background = zh.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 64, "dark"
    zh.picture("empty")

    zh.page.locator("#fathom-settings .toggle-button").click()
    zh.page.get_by_label("先思考").check()
    zh.set_number("每次回答的最大词元数", "2048")
    zh.set_number("温度（0：贪心）", "0")
    zh.picture("settings")
    zh.page.locator("#fathom-settings .toggle-button").click()
    with page_server.watched():
        zh.box.fill("你好")
        zh.send_button.click()
        sync_api.expect(zh.page.get_by_text("思考中", exact=True)).to_be_visible()
        sync_api.expect(zh.figures).to_contain_text("词元/秒")
        zh.picture("thinking")
        zh.stop_button.click()
        sync_api.expect(zh.figures).to_contain_text("已停止")
    zh.picture("stopped")


@pytest.mark.skipif("FATHOM_SCREENSHOT_CHECKPOINT" not in os.environ, reason="takes a picture of a trained model")
@pytest.mark.parametrize("view", ["en", "zh"])
def test_picture_of_a_trained_model(
    talk: Callable[[str], Talk], page_server: Any, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    checkpoint = os.environ["FATHOM_SCREENSHOT_CHECKPOINT"]
    monkeypatch.setattr(page_server.shelf, "named", (checkpoint,))
    page_server.shelf.load(checkpoint)
    talking = talk(view)
    talking.page.get_by_role("button", name=re.compile("textwrap.dedent")).click()
    talking.wait_until_idle()
    talking.picture("trained")
    assert talking.answers.last.inner_text().strip()


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first true value of a condition that another thread brings about."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def still(value: Callable[[], Any]) -> bool:
    before = value()
    time.sleep(0.6)
    return value() == before
