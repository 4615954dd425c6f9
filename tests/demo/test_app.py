"""The page over HTTP, as `gradio_client` and curl see it."""

import time
from typing import Any

import pytest
from gradio_client import Client

from fathom.demo.app import in_words, label_of


@pytest.fixture(scope="module")
def client(page_server: Any) -> Client:
    return Client(page_server.url, verbose=False)


def test_the_api_is_one_typed_documented_endpoint(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/chat"]
    chat = endpoints["/chat"]
    assert "Answers a message" in chat["description"]
    types = {parameter["parameter_name"]: parameter["python_type"]["type"] for parameter in chat["parameters"]}
    assert types["message"] == "str"
    assert types["max_new_tokens"] == "int"
    assert types["temperature"] == "float"
    assert "list[dict" in types["history"]
    assert [output["python_type"]["type"][:4] for output in chat["returns"]] == ["str", "dict"]


def test_an_answer_is_streamed_and_equals_the_model_called_directly(client: Client, page_server: Any) -> None:
    from fathom.demo.generation import stream_reply
    from fathom.demo.sampling import Sampling

    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
    job = client.submit("the?", history=history, max_new_tokens=120, temperature=0.0, api_name="/chat")
    text, details = job.result()
    loaded = page_server.shelf.in_use()
    messages = [*history, {"role": "user", "content": "the?"}]
    *_, expected = stream_reply(loaded.model, loaded.tokenizer, messages, Sampling(120, temperature=0))
    assert text == expected.text
    assert (details["new_tokens"], details["finish"], details["model"]) == (120, "length", page_server.checkpoint)
    outputs = job.outputs()
    assert len(outputs) > 1, "streamed"
    assert all(text.startswith(earlier) for earlier, _ in outputs)


def test_cancelling_ends_the_forward_passes(client: Client, page_server: Any) -> None:
    with page_server.watched() as seen:
        job = client.submit("the", max_new_tokens=4000, temperature=0.0, api_name="/chat")
        deadline = time.monotonic() + 30
        while len(seen) < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        job.cancel()
        cancelled, before = len(seen), 0
        while before < len(seen) and time.monotonic() < deadline:
            before = len(seen)
            time.sleep(0.5)
    assert 20 <= before == len(seen) < cancelled + 50, "it ends within half a second of forwards"


def test_several_users_share_forwards_and_disturb_each_other_in_nothing(client: Client, page_server: Any) -> None:
    model = page_server.shelf.in_use().model
    alone, _ = client.predict("the?", max_new_tokens=60, temperature=0.0, api_name="/chat")
    rows: list[int] = []

    def slowly(module: Any, inputs: Any, options: dict) -> None:
        rows.append(len(options["input_ids"]))
        time.sleep(0.02)  # else an answer ends before the next one is asked for

    hook = model.register_forward_pre_hook(slowly, with_kwargs=True)
    # Of one candidate, which is no end: an answer that ended early would share nothing.
    endless = {"max_new_tokens": 4000, "temperature": 0.9, "top_k": 1, "api_name": "/chat"}
    others = [client.submit("x" * n, **endless) for n in (1, 30)]
    deadline = time.monotonic() + 30
    while max(rows, default=0) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    text, details = client.predict("the?", max_new_tokens=60, temperature=0.0, api_name="/chat")
    for other in others:
        other.cancel()
    hook.remove()
    assert (text, details["new_tokens"]) == (alone, 60)
    assert max(rows) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"message": "the " * 4096}, r"context holds 4096"),
        ({"message": "the", "model": "/etc"}, r"on offer"),
        ({"message": "the", "temperature": -1.0}, r"temperature=-1.0"),
        ({"message": "the", "history": [{"role": "nobody", "content": "x"}]}, r"refuses"),
    ],
)
def test_bad_input_is_answered_in_one_line(client: Client, arguments: dict, message: str) -> None:
    with pytest.raises(Exception, match=message) as raised:
        client.predict(**arguments, api_name="/chat")
    assert "\n" not in str(raised.value).strip()


def test_the_page_goes_on_after_bad_input(client: Client) -> None:
    _, details = client.predict("the", max_new_tokens=3, api_name="/chat")
    assert details["new_tokens"] <= 3


def test_names_and_numbers(page_server: Any) -> None:
    assert label_of(page_server.checkpoint, page_server.models_dir, "en") == "long"
    assert label_of("random:classic", page_server.models_dir, "en") == "untrained classic nano (random weights)"
    words = [in_words(n).replace("\N{NO-BREAK SPACE}", " ") for n in (7, 4_210, 3_226_496, 671_000_000_000)]
    assert words == ["7", "4.21 k", "3.23 M", "671 B"]
