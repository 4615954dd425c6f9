"""Encodings: what is sure is decoded as it was encoded, what is not is None, and never another text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.training.encodings import detect_encoding, detect_encoding_of

TEXTS = {
    "French": "Le cœur a ses raisons que la raison ne connaît point. Où êtes-vous né, à Nîmes ? « Ça va », l’été.",
    "German": "Die Straße führt über die Brücke, und die Bäume blühen schön. „Guten Tag“, sagte er. Übrigens: Ärger!",
    "Spanish": "¿Dónde está el niño? El año próximo será mejor, ¡qué alegría! Corazón, pingüino, 1º de mayo.",
    "Portuguese": "A população não é pequena; São Paulo tem milhões de pessoas. Às vezes, a ação e a reação. Órgãos.",
    "Italian": "Perché la città è così bella? Più tardi andrò là. Però, cioè, virtù.",
    "Swedish": "Älven är djup och ån är grund. Året går fort, sköna sommar. Å nej!",
    "Danish": "Rødgrød med fløde. Jeg spiser æbler på øen i går.",
    "Finnish": "Tämä on hyvä päivä; yötön yö ja älykäs poika.",
    "Icelandic": "Það er gott að búa á Íslandi. Þórður á bæ í sveit. Ég veit það ekki, ýmislegt.",
    "Dutch": "De coördinatie van de reünie is één probleem; Daniël en Zoë.",
    "Turkish": "Türkçe öğreniyorum çünkü güzel bir dil. İstanbul'da yaşıyor, ağaç, ışık, şeker.",
    "Polish": "Zażółć gęślą jaźń. Być może, że będę w Łodzi. Miał coś, który był źle.",
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy. Byl čtvrtek, děti šly domů.",
    "Hungarian": "Árvíztűrő tükörfúrógép. Az erdő mélyén élő állatok, nő, fű, szőlő.",
    "Croatian": "Čovjek je došao kući, veće kuće, đak, žena, šuma, ćevapi.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. В начале было слово.",
    "Russian comments": "def f(x):  # возвращает число\n    return x  # конец\n" * 3,
    "Greek": "Η γρήγορη καφέ αλεπού πηδάει πάνω από το σκυλί. Καλημέρα κόσμε.",
    "Hebrew": "שלום עולם, מה שלומך היום?",
    "Korean": "안녕하세요 세계. 오늘은 날씨가 좋습니다. 나는 학교에 갑니다. 한국어 문장을 읽을 수 있는 사람이 많다.",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。今日は天気がいいです。",
    "Japanese names": "東京都議会議員選挙結果発表会場案内図面",
    "Traditional Chinese": "深度學習是機器學習的一個分支，它用神經網路來學習資料。你好，世界。",
    "Chinese": "深度学习是机器学习的一个分支，它用神经网络来学习数据。你好，世界。“引号”——还有《书名》。",
    "Chinese poem": "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "Chinese comments": "# 计算两个数的和\ndef add(a, b):\n    return a + b  # 返回结果\n",
    "Vietnamese": "Tiếng Việt rất khó học nhưng đẹp.",
    "Thai": "สวัสดีชาวโลก วันนี้อากาศดี",
    "Lithuanian": "Ąžuolas, šiandien gražus oras, mėlynas dangus, žąsis.",
}
WESTERN = ("French", "German", "Spanish", "Portuguese", "Italian", "Swedish", "Danish", "Finnish", "Icelandic", "Dutch")
CHINESE = ("Chinese", "Chinese poem", "Chinese comments")
SURE = [
    *(("cp1252", language) for language in WESTERN),
    *(("latin-1", language) for language in WESTERN),
    *((codec, language) for codec in ("gbk", "gb18030") for language in CHINESE),
    *((codec, language) for codec in ("utf-8", "utf-8-sig", "utf-16", "utf-32") for language in TEXTS),
    *((codec, "French") for codec in ("utf-16-le", "utf-16-be")),
    *((codec, language) for codec in ("utf-16-le", "utf-16-be") for language in CHINESE),
]
UNSURE = [
    *((codec, "Russian") for codec in ("cp1251", "koi8-r", "iso8859-5", "cp866", "mac_cyrillic")),
    *((codec, "Russian comments") for codec in ("cp1251", "koi8-r", "cp866")),
    *(
        (codec, language)
        for codec in ("cp1250", "iso8859-2")
        for language in ("Polish", "Czech", "Hungarian", "Croatian")
    ),
    *(("cp1254", "Turkish"), ("cp1253", "Greek"), ("cp1255", "Hebrew"), ("cp1258", "Vietnamese"), ("tis_620", "Thai")),
    *(("cp1257", "Lithuanian"), ("euc_kr", "Korean"), ("shift_jis", "Japanese"), ("euc_jp", "Japanese")),
    *(("shift_jis", "Japanese names"), ("euc_jp", "Japanese names"), ("big5", "Traditional Chinese")),
    *((codec, language) for codec in ("cp850", "mac_roman") for language in ("French", "German", "Spanish", "Swedish")),
]


PLAIN = "Plain ASCII for the first 1.7 MB.\n" * 50_000


def encoded(codec: str, language: str) -> bytes:
    return TEXTS[language].encode(codec, errors="ignore")


@pytest.mark.parametrize(
    ("codec", "language", "start"),
    [
        *((codec, language, "") for codec, language in SURE),
        *((codec, language, PLAIN) for codec, language in SURE if codec in ("cp1252", "latin-1", "gbk", "gb18030")),
        *((codec, "Chinese", PLAIN) for codec in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")),
    ],
)
def test_sure_ones_are_decoded(codec, language, start):
    text = (start + TEXTS[language]).encode(codec, errors="ignore").decode(codec)
    data = text.encode(codec)
    found = detect_encoding_of(data)
    assert found is not None
    assert data.decode(found) == text


@pytest.mark.parametrize("times", [1, 300])
@pytest.mark.parametrize(("codec", "language"), UNSURE)
def test_others_are_not_guessed(codec, language, times):
    assert detect_encoding_of(encoded(codec, language) * times) is None


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_utf8_is_utf8(text):
    found = detect_encoding_of(text.encode())
    assert found in ("utf-8", "utf-8-sig")
    assert text.encode().decode(found).removeprefix("\ufeff") == text.removeprefix("\ufeff")


@pytest.mark.parametrize("size", [40, 1000, 100_000])
def test_binary_data_is_none(size):
    for seed in range(100 if size < 100_000 else 3):
        assert detect_encoding_of(random.Random(seed).randbytes(size)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"text\0and NUL",
        b"\x89PNG\r\n\xff\xfe",
        b"\xff\xfe\x00",
        "Grüße aus Köln. ".encode() * 400 + b"\xff and more",
        b"Plain text. " * 400 + "né à Nîmes".encode()[:-6] + b"\xc3",
        encoded("cp1252", "French") * 9000 + b"\0",
        encoded("gbk", "Chinese") * 9000 + b"\xff\xff",
        encoded("cp1252", "German") + encoded("gbk", "Chinese"),
    ],
)
def test_damaged_and_mixed_text_is_none(data):
    assert detect_encoding_of(data) is None


def test_a_file_is_read_in_chunks():
    sizes: list[int] = []

    class File:
        def __init__(self):
            self.left = 40 << 20

        def read(self, size):
            sizes.append(size)
            size = min(size, self.left)
            self.left -= size
            return b"x" * size

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    assert detect_encoding(File) == "utf-8"
    assert max(sizes) <= 1 << 20
