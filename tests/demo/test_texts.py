"""Both languages say everything, with the same values in it."""

from string import Formatter

import pytest

from fathom.demo.texts import EN, ZH, language_of, say


def test_the_languages_have_the_same_texts_and_values() -> None:
    assert EN.keys() == ZH.keys()
    for key in EN:
        fields = [sorted(field for _, field, _, _ in Formatter().parse(texts[key]) if field) for texts in (EN, ZH)]
        assert fields[0] == fields[1], key
        assert EN[key].strip(), key
        assert ZH[key].strip(), key


@pytest.mark.parametrize(
    ("header", "language"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("ZH", "zh"), ("en-US,en;q=0.9,zh;q=0.1", "en"), ("", "en"), (None, "en")],
)
def test_the_browser_chooses_the_language(header: str | None, language: str) -> None:
    assert language_of(header) == language
    assert say(language, "tokens", tokens=3) == {"en": "3 tokens", "zh": "3 个词元"}[language]
