"""Weight files and their indexes, damaged byte by byte, header by header and tensor by tensor (`malformed`)."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import MANY, changed, same_verdict, write_json
from safetensors.torch import load_file, save_file


def rewrite(header: Callable[[dict], Any] = lambda header: None, data: Callable[[bytearray], Any] = lambda data: None):
    """Changes the header of model.safetensors, or the bytes after it."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        described, numbers = json.loads(content[8:end]), bytearray(content[end:])
        text = header(described)
        data(numbers)
        written = text if isinstance(text, bytes) else json.dumps(described).encode()
        file.write_bytes(struct.pack("<Q", len(written)) + written + numbers)

    return change


def entry(described: dict) -> dict:
    return described["model.norm.weight"]


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors of model.safetensors."""

    def apply(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def scaled(content: dict[str, torch.Tensor], name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    content[name] = content[name].to(torch.float8_e4m3fn)
    if shape:
        content[f"{name}_scale_inv"] = torch.ones(shape).to(dtype)


O_PROJ = "model.layers.0.self_attn.o_proj.weight"
NORM = "model.norm.weight"
HEADERS = {
    "unknown dtype": rewrite(lambda h: entry(h).update(dtype="F99")),
    "dtype of another size": rewrite(lambda h: entry(h).update(dtype="F64")),
    "dtype is a number": rewrite(lambda h: entry(h).update(dtype=4)),
    "shape of another size": rewrite(lambda h: entry(h).update(shape=[7])),
    "negative shape": rewrite(lambda h: entry(h).update(shape=[-32])),
    "shape of floats": rewrite(lambda h: entry(h).update(shape=[32.0])),
    "shape of many": rewrite(lambda h: entry(h).update(shape=[2**62, 2**62])),
    "offsets overlap": rewrite(lambda h: entry(h).update(data_offsets=[0, 128])),
    "offsets are floats": rewrite(lambda h: entry(h).update(data_offsets=[float(n) for n in entry(h)["data_offsets"]])),
    "offsets backwards": rewrite(lambda h: entry(h).update(data_offsets=entry(h)["data_offsets"][::-1])),
    "three offsets": rewrite(lambda h: entry(h).update(data_offsets=[0, 1, 2])),
    "metadata of numbers": rewrite(lambda h: h.update(__metadata__={"format": 1})),
    "metadata is a list": rewrite(lambda h: h.update(__metadata__=["pt"])),
    "no metadata": rewrite(lambda h: h.pop("__metadata__")),
    "format of another library": rewrite(lambda h: h.update(__metadata__={"format": "tf"})),
    "an entry is a list": rewrite(lambda h: h.update({NORM: [1]})),
    "a list": rewrite(lambda h: b"[1]"),
    "deep": rewrite(lambda h: b'{"a":' * 100_000),
    "not UTF-8": rewrite(lambda h: b'{"\xff": 1}'),
    "named twice": rewrite(lambda h: json.dumps(h)[:-1].encode() + b', "x": 1, "x": 2}'),
    "half a character": rewrite(lambda h: h.update({"\ud800": h.pop(NORM)})),
    "empty": rewrite(lambda h: b""),
    "braces": rewrite(lambda h: h.update({"layers.{0}.{}": h.pop(NORM)})),
    "line breaks": rewrite(lambda h: h.update({"norm\n\x1b[31m": h.pop(NORM)})),
    "long name": rewrite(lambda h: h.update({"n" * 100_000: h.pop(NORM)})),
    "a number sign": rewrite(lambda h: h.update({"layers.#.1.weight": h.pop(NORM)})),
    "no number": rewrite(lambda h: h.update({"layers.²." + "9" * 5000: h.pop(NORM)})),
    "an expert too many": rewrite(lambda h: h.update({"model.layers.1.mlp.experts.9.up_proj.weight": h.pop(NORM)})),
}
DATA = {
    "longer": lambda folder: append(folder / "model.safetensors", b"x"),
    "shorter": lambda folder: cut(folder / "model.safetensors", -1),
    "a hundred bytes": lambda folder: cut(folder / "model.safetensors", 100),
    "nothing": lambda folder: cut(folder / "model.safetensors", 0),
    "a header of 2^63 bytes": lambda folder: (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", 2**63) + b"{}"
    ),
    "no file": lambda folder: (folder / "model.safetensors").unlink(),
    "a folder": lambda folder: [(folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()],
    "an adapter beside it": lambda folder: (folder / "adapter_config.json").write_text("{}"),
}
TENSORS = {
    "NaN": tensors(lambda t: t[NORM].fill_(math.nan)),
    "infinite": tensors(lambda t: t[NORM][3:4].fill_(-math.inf)),
    "NaN in an expert": tensors(lambda t: t["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0].fill_(math.nan)),
    "NaN in the bias": tensors(lambda t: t["model.layers.1.mlp.gate.e_score_correction_bias"].fill_(math.nan)),
    "too large for the dtype": lambda folder: [
        tensors(lambda t: t[NORM].fill_(1e30))(folder),
        write_json("config.json", dtype="float16")(folder),
    ],
    "float64": tensors(lambda t: t.update({NORM: t[NORM].double()})),
    "bfloat16": tensors(lambda t: t.update({NORM: t[NORM].bfloat16()})),
    "whole numbers": tensors(lambda t: t.update({NORM: t[NORM].long()})),
    "truth values": tensors(lambda t: t.update({NORM: t[NORM].bool()})),
    "complex": tensors(lambda t: t.update({NORM: torch.complex(t[NORM], t[NORM])})),
    "missing": tensors(lambda t: t.pop(NORM)),
    "an expert's missing": tensors(lambda t: t.pop("model.layers.1.mlp.experts.3.gate_proj.weight")),
    "all of the experts missing": tensors(lambda t: [t.pop(name) for name in list(t) if ".experts." in name]),
    "beyond": tensors(lambda t: t.update({"model.layers.0.extra": torch.ones(3)})),
    "a layer beyond": tensors(lambda t: t.update({"model.layers.7.input_layernorm.weight": torch.ones(32)})),
    "under two names": tensors(lambda t: t.update({"norm.weight": t[NORM].clone()})),
    "without the beginning": tensors(lambda t: t.update({"norm.weight": t.pop(NORM)})),
    "another shape": tensors(lambda t: t.update({NORM: torch.ones(31)})),
    "another number of dimensions": tensors(lambda t: t.update({NORM: torch.ones(32, 1)})),
    "FP8": tensors(lambda t: scaled(t, O_PROJ, 1, 1)),
    "FP8 without scales": tensors(lambda t: scaled(t, O_PROJ)),
    "FP8, NaN": tensors(lambda t: [scaled(t, O_PROJ, 1, 1), t[O_PROJ].view(torch.uint8).fill_(0x7F)]),
    "FP8, scales of NaN": tensors(lambda t: [scaled(t, O_PROJ, 1, 1), t[f"{O_PROJ}_scale_inv"].fill_(math.nan)]),
    "FP8, no block": tensors(lambda t: scaled(t, O_PROJ, 0, 0)),
    "FP8, blocks of no size": tensors(lambda t: scaled(t, O_PROJ, 5, 7)),
    "FP8, too many blocks": tensors(lambda t: scaled(t, O_PROJ, 99, 99)),
    "FP8, one scale": tensors(lambda t: scaled(t, O_PROJ, 1)),
    "FP8, scales of whole numbers": tensors(lambda t: scaled(t, O_PROJ, 1, 1, dtype=torch.int64)),
    "FP8 of a vector": tensors(lambda t: scaled(t, NORM, 1)),
    "int8 without scales": tensors(lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.int8)})),
    "e5m2": tensors(lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.float8_e5m2)})),
    "a scale of a plain weight": tensors(lambda t: t.update({f"{O_PROJ}_scale_inv": torch.ones(1, 1)})),
}


def append(file: Path, more: bytes) -> None:
    file.write_bytes(file.read_bytes() + more)


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


@pytest.mark.parametrize("slip", [*HEADERS, *DATA, *TENSORS])
def test_weights(slip: str, whole: dict[str, Path], tmp_path: Path):
    change = {**HEADERS, **DATA, **TENSORS}[slip]
    with changed(whole["v3"], tmp_path / "model", change) as folder:
        verdict = same_verdict(folder)
    harmless = ("no metadata", "format of another library", "float64", "bfloat16", "FP8")
    assert (verdict == "") == (slip in harmless), verdict


@pytest.mark.parametrize(
    "name", ["layers.{0}.{}", "a\nb\x1b[31m", "n" * 100_000, "layers.#.1.x", "layers.²." + "9" * 5000, ""]
)
def test_names_that_are_read_as_deepseek_v4s(name: str, whole: dict[str, Path], tmp_path: Path):
    change = rewrite(lambda h: h.update({name: h.pop("norm.weight")}))
    with changed(whole["v4"], tmp_path / "model", change) as folder:
        assert "do not fit its config.json" in same_verdict(folder)


@settings(MANY, max_examples=60)
@given(place=st.integers(0, 2**20), byte=st.integers(0, 255), in_header=st.booleans())
def test_any_byte_of_the_weights(whole: dict[str, Path], tmp_path: Path, place: int, byte: int, in_header: bool):
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        end = 8 + struct.unpack("<Q", content[:8])[0]
        content[place % end if in_header else end + place % (len(content) - end)] = byte
        file.write_bytes(content)

    with changed(whole["v3"], tmp_path / "model", change) as folder:
        same_verdict(folder)


@pytest.mark.parametrize(
    ("table", "is_whole"),
    [
        (torch.zeros(288, 2, dtype=torch.int64), True),
        (torch.full((288, 2), -1), False),
        (torch.full((288, 2), 4), False),
        (torch.full((288, 2), 10**12), False),
        (torch.full((288, 2), math.nan), False),
        (torch.zeros(288, 2, dtype=torch.bool), False),
        (torch.zeros(287, 2, dtype=torch.int64), False),
        (torch.zeros(288, 3, dtype=torch.int64), False),
    ],
    ids=str,
)
def test_tables_of_hash_layers(table: torch.Tensor, is_whole: bool, whole: dict[str, Path], tmp_path: Path):
    change = tensors(lambda content: content.update({"layers.0.ffn.gate.tid2eid": table}))
    with changed(whole["v4"], tmp_path / "model", change) as folder:
        assert (same_verdict(folder) == "") == is_whole


def sharded(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Splits the weights in two files with an index, and changes the index."""

    def apply(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, weight_map = sorted(content), {}
        for n, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-0000{n}-of-00002.safetensors"
            save_file({name: content[name] for name in part}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
        change(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


SECOND = "model-00002-of-00002.safetensors"
INDEXES = {
    "whole": sharded(lambda i: None),
    "too few": sharded(lambda i: i["weight_map"].pop(NORM)),
    "too many": sharded(lambda i: i["weight_map"].update(extra=SECOND)),
    "in the other file": sharded(lambda i: i["weight_map"].update({NORM: SECOND, "lm_head.weight": SECOND})),
    "no such file": sharded(lambda i: i["weight_map"].update({NORM: "model-00003.safetensors"})),
    "a path": sharded(lambda i: i["weight_map"].update({NORM: "../../model.safetensors"})),
    "an absolute path": sharded(lambda i: i["weight_map"].update({NORM: "/etc/hostname"})),
    "a long name": sharded(lambda i: i["weight_map"].update({NORM: "x" * 5000})),
    "a zero byte": sharded(lambda i: i["weight_map"].update({NORM: "a\0b.safetensors"})),
    "a number": sharded(lambda i: i["weight_map"].update({NORM: 5})),
    "a list": sharded(lambda i: i.update(weight_map=[1])),
    "nothing": sharded(lambda i: i.update(weight_map={})),
    "one file alone": sharded(lambda i: i.update(weight_map={NORM: SECOND})),
    "metadata is a list": sharded(lambda i: i.update(metadata=[1])),
    "no metadata": sharded(lambda i: i.pop("metadata")),
}


@pytest.mark.parametrize("slip", INDEXES)
def test_indexes(slip: str, whole: dict[str, Path], tmp_path: Path):
    with changed(whole["v3"], tmp_path / "model", INDEXES[slip]) as folder:
        assert (same_verdict(folder) == "") == (slip == "whole")
