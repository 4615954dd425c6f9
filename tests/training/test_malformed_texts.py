"""Tokenizers, chat templates and generation configs that cannot be used (`malformed`)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from malformed import changed, same_verdict, write_json

from fathom.training import chat_templates
from fathom.training.chat_templates import render_chat
from fathom.training.errors import UserError
from fathom.training.loading import load_tokenizer


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def vocabulary(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return apply


TOKENIZERS = {
    "an id beyond the vocabulary": vocabulary(lambda t: t["model"]["vocab"].update(zzz=5000)),
    "an added token beyond it": vocabulary(
        lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "zz"})
    ),
    "a vocabulary of the model that is smaller": write_json("config.json", vocab_size=288 - 1),
    "no model": vocabulary(lambda t: t.pop("model")),
    "negative ids": vocabulary(lambda t: t["model"]["vocab"].update(zzz=-5)),
    "merges of nothing": vocabulary(lambda t: t["model"].update(merges=[["qq", "zz"]])),
    "a pattern that is none": vocabulary(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")),
    "a decoder of no kind": vocabulary(lambda t: t.update(decoder={"type": "Nothing"})),
    "no JSON": text("tokenizer.json", "{"),
    "a list": text("tokenizer.json", "[]"),
    "empty": text("tokenizer.json", ""),
    "deep": text("tokenizer.json", '{"a":' * 100_000),
    "not UTF-8": text("tokenizer.json", b'{"\xff": 1}'),
    "config is no JSON": text("tokenizer_config.json", "{"),
    "config is a list": text("tokenizer_config.json", "[1]"),
    "bos is a number": write_json("tokenizer_config.json", bos_token=5),
    "added tokens of no kind": write_json("tokenizer_config.json", added_tokens_decoder={"x": "y"}),
    "added tokens beyond": write_json(
        "tokenizer_config.json", added_tokens_decoder={"90000": {"content": "zz", "special": True}}
    ),
    "extra tokens are a number": write_json("tokenizer_config.json", extra_special_tokens=7),
    "template is a number": lambda folder: [
        (folder / "chat_template.jinja").unlink(),
        write_json("tokenizer_config.json", chat_template=5)(folder),
    ],
}


@pytest.mark.parametrize("slip", TOKENIZERS)
def test_tokenizers(slip: str, whole: dict[str, Path], tmp_path: Path):
    with changed(whole["v3"], tmp_path / "model", TOKENIZERS[slip]) as folder:
        same_verdict(folder)


TEMPLATES = {
    "{{ messages[0].content }}": True,
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}": True,
    "": False,
    "{# nothing #}": False,
    "{% bad": False,
    "{{ 1 / 0 }}": False,
    "{{ raise_exception('no') }}": False,
    "{{ messages[7].content }}": False,
    "{{ nothing.of.that }}": False,
    "{{ 'a' * 20000000 }}": False,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": False,
    "{{ '%4000000000d' % 1 }}": False,
    "{{ messages.append(1) }}": False,
    "{{ ''.__class__.__mro__ }}": False,
    "{% include '/etc/hostname' %}": False,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(template: str, whole: dict[str, Path], tmp_path: Path):
    with changed(whole["v3"], tmp_path / "model", text("chat_template.jinja", template)) as folder:
        assert (same_verdict(folder) == "") == TEMPLATES[template]


ENDLESS = [
    "{{ 'a' * 10000000000 }}",
    "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_endless_templates(template: str, whole: dict[str, Path]):
    """Ended by the system, in a process of their own; the next template is rendered as ever."""
    tokenizer = load_tokenizer(str(whole["v3"]))
    messages = [{"role": "user", "content": "the"}]
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"the chat template .* GB of memory"):
        render_chat(tokenizer, messages)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}{{ name }}"
    assert render_chat(tokenizer, messages, name="fox", tokenize=False) == f"{tokenizer.bos_token}thefox"


def test_a_template_costs_a_process_only_where_it_is_of_others(whole: dict[str, Path], monkeypatch):
    monkeypatch.setattr(chat_templates._renderer, "ask", lambda request: pytest.fail("asked"))
    tokenizer = load_tokenizer(str(whole["v3"]))
    messages = [{"role": "user", "content": "the"}]
    assert dict(render_chat(tokenizer, messages)) == dict(tokenizer.apply_chat_template(messages))


GENERATION = {
    "max_new_tokens": [256, -1, "x", 10**30, math.nan],
    "eos_token_id": [None, 1, [1, 2], [], "x", -1, 288, 10**12, [1, 288], 0.5, True],
    "bos_token_id": [-1, 10**6, "<s>"],
    "pad_token_id": [-1, 288, [2]],
    "num_beams": [4, 10**9, "x", -1],
    "num_return_sequences": [3, 10**9],
    "do_sample": ["x", 5, None],
    "temperature": ["hot", -1, 0, math.nan, [1]],
    "stop_strings": ["a", [1]],
    "suppress_tokens": [[10**9], "x", 5],
    "bad_words_ids": [[[10**9]], "x"],
    "sequence_bias": [{"x": 1}, 5],
    "cache_implementation": ["static", "quantized", "x", 5],
    "watermarking_config": [{"greenlist_ratio": 0.5}, 5, {"x": 1}],
    "compile_config": [5, {"x": 1}],
    "use_cache": [False],
    "return_dict_in_generate": [True],
    "guidance_scale": [2.0, "x"],
    "prompt_lookup_num_tokens": [3, "x"],
    "token_healing": [True],
    "max_time": [0, "x"],
    "save_pretrained": [5],
    "validate": [5],
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_configs(name: str, whole: dict[str, Path], tmp_path: Path):
    for value in GENERATION[name]:
        with changed(whole["v3"], tmp_path / "model", write_json("generation_config.json", **{name: value})) as folder:
            same_verdict(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "5", "", '{"a": ' * 100_000, b"\xff"], ids=lambda value: repr(value)[:12]
)
def test_files_of_json(content: str | bytes, whole: dict[str, Path], tmp_path: Path):
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        with changed(whole["v3"], tmp_path / "model", text(file, content)) as folder:
            assert file in same_verdict(folder)
