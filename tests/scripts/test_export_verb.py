"""`fathom export` from its command line."""

import shlex
import subprocess
import sys

import pytest

from fathom.scripts import cli


@pytest.mark.parametrize(
    "order",
    ["--to transformers SRC DST", "SRC DST --to=transformers", "SRC --to transformers DST"],
)
def test_prints_what_it_wrote_and_the_next_command(tmp_path, tiny_checkpoint, capsys, order):
    folders = {"SRC": str(tiny_checkpoint), "DST": str(tmp_path / "native")}
    words = [folders.get(word, word) for word in order.split()]
    assert cli.main(["export", *words, "--max_shard_size", "100KB"]) == 0
    written, _, _, last = capsys.readouterr().out.rstrip("\n").split("\n")
    files = list((tmp_path / "native").glob("*.safetensors"))
    assert len(files) > 1
    size = sum(file.stat().st_size for file in files)
    assert written.startswith("deepseek_v3: ")
    assert written.endswith(f" tensors, 1 MTP layers included, {size:,} bytes in {len(files)} files")
    if order.startswith("--to"):
        command = shlex.split(last.removeprefix("next: "))
        assert command[0] == "python"
        process = subprocess.run(
            [sys.executable, *command[1:]], capture_output=True, text=True, timeout=120, check=True
        )
        assert process.stdout.startswith("DeepseekV3ForCausalLM(")


def test_a_model_that_cannot_be_expressed_is_one_line(tmp_path, capsys):
    from fathom import FathomConfig, FathomForCausalLM

    shape = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    FathomForCausalLM(FathomConfig.preset("classic", **shape)).save_pretrained(tmp_path / "classic")
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "classic"), str(tmp_path / "out"), "--to", "transformers"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("fathom export: error: transformers' deepseek cannot express position_emb")
    assert not (tmp_path / "out").exists()
