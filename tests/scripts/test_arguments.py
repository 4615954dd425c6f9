"""Options from dataclasses and from YAML pass through the same checks; the command line wins."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fathom.scripts.arguments import parse
from fathom.training.errors import UserError


@dataclass
class Dive:
    place: str = field(default="reef", metadata={"help": "where"})
    depth: int = 10
    rate: float = 1e-3
    lamp: bool = False
    gases: list[str] = field(default_factory=list)


@dataclass
class Boat:
    name: str = "Nautilus"


def dive(*words: str, positionals: tuple[str, ...] = ()) -> Dive:
    (options,) = parse("dive", "Goes down.", [Dive], words, positionals)
    return options


def test_defaults_and_options():
    assert dive() == Dive()
    words = ["--depth", "30", "--rate", "2e-4", "--lamp", "--gases", "air", "nitrox"]
    assert dive(*words) == Dive(depth=30, rate=2e-4, lamp=True, gases=["air", "nitrox"])


def test_several_groups():
    options, boat = parse("dive", "", [Dive, Boat], ["--name", "Calypso", "--depth", "3"])
    assert (options.depth, boat.name) == (3, "Calypso")


def test_leading_words_fill_the_positionals():
    assert dive("wreck", "--depth", "3", positionals=("place",)) == Dive(place="wreck", depth=3)
    assert dive("--depth", "3", positionals=("place",)) == Dive(depth=3)
    assert dive("--place", "wreck", positionals=("place",)).place == "wreck"


def test_yaml_lies_under_the_command_line(tmp_path: Path):
    file = tmp_path / "dive.yaml"
    file.write_text("depth: 20\nlamp: true\nrate: 0.5\ngases: [air, trimix]\nplace:\n")
    assert dive("--config", str(file)) == Dive(depth=20, lamp=True, rate=0.5, gases=["air", "trimix"])
    assert dive("--depth", "5", "--config", str(file)).depth == 5
    assert dive("--config", str(file), "--depth", "5").depth == 5
    assert dive("-c", str(file)).depth == 20
    assert dive(f"--config={file}").depth == 20


def test_yaml_exponents_without_a_dot_are_numbers(tmp_path: Path):
    # YAML 1.1 reads 3e-4 as text; the option's own type makes it a number.
    (tmp_path / "dive.yaml").write_text("rate: 3e-4\n")
    assert dive("--config", str(tmp_path / "dive.yaml")).rate == 3e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dept", "3"], "unknown option --dept; did you mean depth?"),
        (["--dept=3"], "unknown option --dept=3; did you mean depth?"),
        (["--depth", "deep"], "invalid int value: 'deep'"),
        (["--depth"], "expected one argument"),
        (["stray"], "unknown option stray"),
        (["--config"], "--config needs a file name"),
        (["--config="], "--config needs a file name"),
        (["--config", "a.yaml", "-c", "b.yaml"], "--config is given 2 times (a.yaml, b.yaml); put all into one file"),
        (["--config", "."], "cannot read --config .: Is a directory"),
        (["--config", "absent.yaml"], "cannot read --config absent.yaml"),
    ],
)
def test_bad_words(words: list[str], message: str):
    with pytest.raises(UserError) as raised:
        dive(*words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dept: 3", "unknown key 'dept' in .*; did you mean depth?"),
        ("depth: deep", "invalid int value: 'deep'"),
        ("- 1", "must hold `option: value` lines"),
        ("depth: [", "is no valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is no valid YAML"),
        ("depth: 3\x00", "is no valid YAML"),
        ("depth: 2001-99-99", "cannot be read: month must be in"),
        ("gases: " + "[" * 5000, "cannot be read|is no valid YAML"),
        ("gases: {air: 1}", "gases in .* must be one value or a list of values"),
        ("gases: [[air]]", "gases in .* must be one value or a list of values"),
        ("? [a, b]\n: 1", "is no valid YAML"),
        ("1: 2", "unknown key 1 in"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str):
    (tmp_path / "dive.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        dive("--config", str(tmp_path / "dive.yaml"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "gb18030"])
def test_files_of_other_encodings_are_one_line(tmp_path: Path, encoding: str):
    (tmp_path / "dive.yaml").write_bytes("place: Élégie 礁\n".encode(encoding, "replace"))
    with pytest.raises(UserError, match=r"--config .*dive.yaml is not UTF-8 \(byte \d+\): save it as UTF-8"):
        dive("--config", str(tmp_path / "dive.yaml"))


def test_a_byte_order_mark_is_no_key(tmp_path: Path):
    (tmp_path / "dive.yaml").write_bytes(b"\xef\xbb\xbfdepth: 4\n")
    assert dive("--config", str(tmp_path / "dive.yaml")).depth == 4


def test_a_large_file_is_no_file_of_options(tmp_path: Path):
    (tmp_path / "dive.yaml").write_text("depth: 4\n" * 200_000)
    with pytest.raises(UserError, match="has 1,800,000 bytes, more than 1,000,000"):
        dive("--config", str(tmp_path / "dive.yaml"))


def test_yaml_does_not_hide_a_bad_command_line(tmp_path: Path):
    (tmp_path / "dive.yaml").write_text("depth: 3\n")
    with pytest.raises(UserError, match="unknown option --dpth"):
        dive("--config", str(tmp_path / "dive.yaml"), "--dpth", "4")
