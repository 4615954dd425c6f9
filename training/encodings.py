"""Which encoding a file's bytes are in, where that is sure: UTF-8, UTF-16, UTF-32, GBK (as GB 18030) or Latin-1.

    a byte order mark          UTF-8, UTF-16, UTF-32
    valid UTF-8                UTF-8: no other encoding's text is valid by chance beyond a few letters
    every other byte is NUL    UTF-16 without its mark
    GBK                        decodes, and the characters are those of Chinese: of its 400 most frequent, which make up
                               two thirds of any text, four of ten; in Korean or Russian text read as GBK hardly any is
    Latin-1 (Windows-1252)     decodes, and the letters beyond ASCII are those of one western language, between ASCII's

All of a file must decode. Central European, Cyrillic, Turkish, Japanese, Korean and traditional Chinese encodings are
not guessed: who gets None names the file.
"""

import codecs
import re
from collections.abc import Callable
from io import BytesIO
from typing import BinaryIO

_CHUNK = 1 << 20  # bytes
_SAMPLE = 1 << 18  # bytes that are judged

# UTF-32 first: its little-endian mark begins with UTF-16's.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_FREQUENT_CHINESE = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法"
    "学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外"
    "将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及"
    "比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区"
    "保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师"
    "观清今切院让识候带导争运深习型模训练语言词句算层网络图码输串参值函列组存测试标准用户示例参考版本支持功能文字符件夹错误方法说明简单注释默认"
    "喜欢春风花月夜雨雪天地玄黄吃喝爱您谢请早晚朋友叫做吗呢吧啊哪谁怎"
)
_CHINESE_PUNCTUATION = re.compile(r"[、。〈-】〔-〗〜！-～￥·—‘’“”…]")
_IDEOGRAPH = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")

# The letters beyond ASCII of languages that Latin-1 was made for.
_WESTERN = (
    "àâçéèêëîïôœùûüÿ",  # French
    "äöüßé",  # German
    "áéíóúüñçàèïò",  # Spanish, Catalan
    "ãõáéíóúâêôçàü",  # Portuguese
    "àèéìíîòóùú",  # Italian
    "åäöæøéüàôêò",  # Danish, Finnish, Norwegian, Swedish
    "áéíóúýðþæöø",  # Faroese, Icelandic
    "ëïéèöüáóê",  # Dutch
    "äöüõšž",  # Estonian
)
_WESTERN_SIGNS = frozenset("\xa0¡¿«»“”‘’–—…€£¥§°©®™·ªº²³½¼¾×±µ•")


def detect_encoding(open_file: Callable[[], BinaryIO]) -> str | None:
    """The codec that decodes all of a file, or None: binary data, or an encoding that is not sure.

    Args:
        open_file: opens the file (decompressed) at its beginning; called once for each reading, at most three times.
            Memory is bounded, whatever the file's size.
    """
    with open_file() as file:
        head = file.read(_SAMPLE)
    for mark, codec in _BYTE_ORDER_MARKS:
        if head.startswith(mark) and _decodes(open_file, codec):
            return codec
    if _decodes(open_file, "utf-8"):
        return "utf-8"
    sample = _sample_of(open_file)
    return next((codec for codec in _plausible(sample) if _decodes(open_file, codec)), None)


def detect_encoding_of(data: bytes) -> str | None:
    """`detect_encoding` of data in memory."""
    return detect_encoding(lambda: BytesIO(data))


def _decodes(open_file: Callable[[], BinaryIO], codec: str) -> bool:
    """Whether all of it decodes, to text without NUL: what git, too, takes as the mark of a binary file."""
    decoder = codecs.getincrementaldecoder(codec)()
    with open_file() as file:
        try:
            while data := file.read(_CHUNK):
                if "\0" in decoder.decode(data):
                    return False
            decoder.decode(b"", final=True)
        except UnicodeError:
            return False
    return True


def _sample_of(open_file: Callable[[], BinaryIO]) -> bytes:
    """What is judged: bytes from the first one on that is not ASCII's, with the ASCII text just before it."""
    before = b""
    with open_file() as file:
        while data := file.read(_CHUNK):
            if found := re.search(rb"[\x80-\xff\0]", data):
                # An even place: characters of UTF-16 begin at such.
                start = max(0, len(before) + found.start() - 64) & ~1
                return (before + data + file.read(_SAMPLE))[start : start + _SAMPLE]
            before = data[-64:]
    return before


def _plausible(sample: bytes) -> list[str]:
    """Codecs, best first, in which the sample is text of a language that is usually in them."""
    found = []
    if b"\0" in sample or len(sample) % 2 == 0:
        for codec in ("utf-16-le", "utf-16-be"):
            text = _start_of(sample, codec)
            if text and (_is_latin_in_pairs(text) or is_chinese(text)):
                found.append(codec)
    if b"\0" in sample:
        return found
    if _is_mostly_utf8(sample):
        return []  # UTF-8 with a damaged place
    text = _start_of(sample, "gb18030")
    if text and is_chinese(text):
        found.append("gb18030")
    text = _start_of(sample, "cp1252")
    if text and is_western(text):
        found.append("cp1252")
    return found


def _start_of(sample: bytes, codec: str) -> str | None:
    """The sample decoded; its last character may be cut off. None where it does not decode."""
    try:
        return codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeError:
        return None


def _is_latin_in_pairs(text: str) -> bool:
    ordinary = sum("\x20" <= character < "\x7f" or character in "\t\n\r" for character in text)
    return ordinary >= 0.7 * len(text) and "\0" not in text


def _is_mostly_utf8(sample: bytes) -> bool:
    text = sample.decode("utf-8", errors="replace")
    damaged = text.count("\ufffd")
    return sum(character > "\x7f" for character in text) - damaged >= max(damaged, 1)


def is_chinese(text: str) -> bool:
    """Whether the characters beyond ASCII are those of simplified Chinese text."""
    beyond = [character for character in text if character > "\x7f"]
    ideographs = [character for character in beyond if _IDEOGRAPH.match(character)]
    signs = sum(_CHINESE_PUNCTUATION.match(character) is not None for character in beyond)
    if len(ideographs) < 4 or len(ideographs) + signs < 0.95 * len(beyond):
        return False
    return sum(character in _FREQUENT_CHINESE for character in ideographs) >= 0.4 * len(ideographs)


def is_western(text: str) -> bool:
    """Whether the characters beyond ASCII are the letters of one western language, and signs between words."""
    beyond = list(re.finditer(r"[^\x00-\x7f]", text))
    if not beyond or re.search(r"[\x01-\x08\x0b\x0e-\x1f\x7f-\x9f]", text):
        return False
    letters = "".join(found[0] for found in beyond if found[0].isalpha() and found[0] not in _WESTERN_SIGNS).lower()
    signs = [found.start() for found in beyond if not found[0].isalpha() or found[0] in _WESTERN_SIGNS]
    if len(re.findall(r"[A-Za-z]", text)) < 2 + 2 * len(letters):
        return False
    wrong = sum(not _is_sign_between_words(text, place) for place in signs)
    wrong += sum(len(found[0]) for found in re.finditer(r"[^\W\x00-\x7f]{3,}", text))
    if not letters:
        return wrong == 0
    misfits = min(len(letters) - sum(map(letters.count, language)) for language in _fitting(letters, text.lower()))
    return wrong + misfits <= 0.02 * len(beyond)


def _fitting(letters: str, text: str) -> list[str]:
    """The languages whose letters can be meant: where other encodings have other letters, these need company.

    Windows-1254 has Turkish at Icelandic's letters, Windows-1250 Hungarian at õ and Croatian at æ.
    """
    used = set(letters)
    without = ""
    if used & set("ðþý") and not used & set("áíæ"):
        without += "ðþý"
    if "õ" in used and "ä" not in used and text.count("õe") < 0.9 * text.count("õ"):
        without += "õ"
    if "æ" in used and not used & set("øåáí"):
        without += "æ"
    return ["".join(letter for letter in language if letter not in without) for language in _WESTERN]


def _is_sign_between_words(text: str, place: int) -> bool:
    """Typographic signs; an opening low quote does not follow a letter, and few signs stand inside a word."""
    before, sign, after = text[place - 1 : place], text[place], text[place + 1 : place + 2]
    if sign in "„‚":
        return not before.isalpha()
    if sign not in _WESTERN_SIGNS:
        return False
    return sign in "’·–—\xa0ªº" or not (before.isalpha() and after.isalpha())
