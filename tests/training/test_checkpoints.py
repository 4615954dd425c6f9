"""Saved whole or not at all; what is damaged is one clear line. Damage is done to real files, byte by byte."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fathom.training.checkpoints import (
    check_checkpoint,
    find_checkpoints,
    load_model,
    load_tokenizer,
    staged_directory,
)
from fathom.training.errors import UserError


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "runs" / "model"))


def shard(folder: Path) -> None:
    """Splits model.safetensors in two files with an index, as save_pretrained does with large models."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


class TestStagedDirectory:
    def test_new_files_replace_old_ones_and_the_rest_stays(self, tmp_path: Path):
        run = tmp_path / "run"
        (run / "checkpoint-5").mkdir(parents=True)
        (run / "checkpoint-5" / "optimizer.pt").write_text("state")
        (run / "config.json").write_text("old")
        with staged_directory(run) as staging:
            (staging / "config.json").write_text("new")
            (staging / "extra").mkdir()
            (staging / "extra" / "template.jinja").write_text("t")
            assert (run / "config.json").read_text() == "old"
        expected = {"checkpoint-5/optimizer.pt": b"state", "config.json": b"new", "extra/template.jinja": b"t"}
        assert content(run) == expected
        assert os.listdir(tmp_path) == ["run"]

    def test_makes_the_target_and_its_parents(self, tmp_path: Path):
        with staged_directory(tmp_path / "a" / "b") as staging:
            (staging / "config.json").write_text("{}")
        assert content(tmp_path) == {"a/b/config.json": b"{}"}

    def test_weights_of_the_old_model_do_not_shadow_the_new_ones(self, tmp_path: Path):
        run = tmp_path / "run"
        run.mkdir()
        for name in ("model.safetensors", "config.json", "notes.txt"):
            (run / name).write_text("old")
        with staged_directory(run) as staging:
            for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json"):
                (staging / name).write_text("new")
        assert sorted(content(run)) == [
            "config.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "notes.txt",
        ]

    def test_a_save_without_weights_keeps_the_weights(self, tmp_path: Path):
        run = tmp_path / "run"
        run.mkdir()
        (run / "model.safetensors").write_text("weights")
        with staged_directory(run) as staging:
            (staging / "tokenizer.json").write_text("{}")
        assert sorted(content(run)) == ["model.safetensors", "tokenizer.json"]

    @pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt()])
    def test_a_failure_leaves_the_target_as_it_was(self, tmp_path: Path, failure: BaseException):
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.json").write_text("old")

        def save() -> None:
            with staged_directory(run) as staging:
                (staging / "config.json").write_text("new")
                raise failure

        with pytest.raises(type(failure)):
            save()
        assert content(tmp_path) == {"run/config.json": b"old"}

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_one_clear_line(self, tmp_path: Path, code: int):
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.json").write_text("old")
        with (
            pytest.raises(UserError, match=r"disk full while saving .*run \(.*\): .*run is intact$"),
            staged_directory(run),
        ):
            raise OSError(code, os.strerror(code))
        assert content(tmp_path) == {"run/config.json": b"old"}

    @pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE, errno.ENOENT])
    def test_other_errors_of_the_disk_are_one_line_too_and_not_called_full(self, tmp_path: Path, code: int):
        with pytest.raises(UserError) as raised, staged_directory(tmp_path / "run") as staging:
            raise OSError(code, os.strerror(code), str(staging / "config.json"))
        assert f"config.json: {os.strerror(code)}; make the folder writable or choose another" in str(raised.value)
        assert "full" not in str(raised.value)

    def test_errors_of_other_files_and_of_the_network_are_not_blamed_on_the_folder(self, tmp_path: Path):
        for error in (
            FileNotFoundError(errno.ENOENT, "gone", "/elsewhere/source.txt"),
            ConnectionError(errno.ECONNREFUSED, "refused"),
        ):
            with pytest.raises(type(error)), staged_directory(tmp_path / "run"):
                raise error

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_files_have_the_modes_that_the_umask_asks_for(self, tmp_path: Path, mask: int):
        """safetensors writes weights for the owner alone, whatever the umask."""
        before = os.umask(mask)
        try:
            with staged_directory(tmp_path / "run") as staging:
                save_file({"a": torch.zeros(3)}, staging / "model.safetensors")
                (staging / "config.json").write_text("{}")
        finally:
            os.umask(before)
        modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "run").iterdir()}
        assert modes == dict.fromkeys(("model.safetensors", "config.json"), 0o666 & ~mask)

    def test_a_file_in_the_way_is_said_before_any_work(self, tmp_path: Path):
        (tmp_path / "file").write_text("mine")
        for target in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(UserError, match="cannot save to"), staged_directory(target):
                pytest.fail("entered")
        assert content(tmp_path) == {"file": b"mine"}

    @pytest.mark.parametrize("writer", ["safetensors", "torch", "python"])
    def test_each_writer_that_really_runs_out_of_room(self, tmp_path: Path, writer: str):
        # A limit on the size of a file stands for the full disk: the kernel refuses the write in the same way.
        script = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from fathom.training.checkpoints import staged_directory
from fathom.training.errors import UserError
writers = {
    "safetensors": lambda file: save_file({"a": torch.zeros(100_000)}, file),
    "torch": lambda file: torch.save(torch.zeros(100_000), file),
    "python": lambda file: file.write_bytes(bytes(400_000)),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    with staged_directory(Path("run")) as staging:
        writers[sys.argv[1]](staging / "model.safetensors")
except UserError as error:
    print(error)
"""
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("old")
        command = [sys.executable, "-c", script, writer]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert process.stdout.startswith("disk full while saving")
        assert content(tmp_path) == {"run/config.json": b"old"}


class TestCheckCheckpoint:
    def test_a_whole_model_passes_in_one_file_and_in_shards(self, model: Path):
        assert check_checkpoint(model)["model_type"] == "fathom"
        shard(model)
        assert check_checkpoint(model)["hidden_size"] == 64

    def test_missing_folder_names_its_neighbours(self, model: Path):
        with pytest.raises(UserError, match=r"no folder .*modle; did you mean model"):
            check_checkpoint(model.with_name("modle"))

    def test_run_folder_points_to_its_checkpoint(self, model: Path):
        run = model.parent
        model.rename(run / "checkpoint-20")
        with pytest.raises(UserError, match=r"no config\.json: did you mean .*checkpoint-20"):
            check_checkpoint(run)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{", "config.json is no valid JSON"),
            ("[1]", "must hold a JSON object, not a list"),
            ('{"model_type": "llama"}', "model_type 'llama'; Fathom loads 'fathom'"),
            ("{}", "model_type None; Fathom loads 'fathom'"),
        ],
    )
    def test_config(self, model: Path, text: str, expected: str):
        (model / "config.json").write_text(text)
        with pytest.raises(UserError, match=expected):
            check_checkpoint(model)

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_truncated_weights_name_both_sizes(self, model: Path, keep: int):
        file = model / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"model\.safetensors is truncated") as raised:
            check_checkpoint(model)
        assert str(len(whole[:keep])) in str(raised.value)
        if keep == -1:
            assert f"{len(whole)} bytes expected" in str(raised.value)

    @pytest.mark.parametrize("damage", [lambda data: data + b"x", lambda data: data[:8] + b"x" + data[9:]])
    def test_damaged_weights(self, model: Path, damage):
        file = model / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(UserError, match="is damaged"):
            check_checkpoint(model)

    def test_zeros_of_the_right_length(self, model: Path):
        file = model / "model.safetensors"
        file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises(UserError, match="is damaged"):
            check_checkpoint(model)

    def test_lfs_pointer(self, model: Path):
        (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(UserError, match="git lfs pull"):
            check_checkpoint(model)

    def test_missing_weights_and_shards(self, model: Path):
        shard(model)
        (model / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(UserError, match=r"lacks 1 of 2 weight files: model-00002-of-00002\.safetensors"):
            check_checkpoint(model)
        (model / "model.safetensors.index.json").unlink()
        with pytest.raises(UserError, match="the weights are missing"):
            check_checkpoint(model)

    def test_shard_without_a_listed_tensor(self, model: Path):
        shard(model)
        file = model / "model-00001-of-00002.safetensors"
        tensors = load_file(file)
        gone = min(tensors)
        del tensors[gone]
        save_file(tensors, file)
        with pytest.raises(UserError, match=f"lacks 1 of the tensors .* first {gone}"):
            check_checkpoint(model)

    def test_index_without_a_map(self, model: Path):
        shard(model)
        (model / "model.safetensors.index.json").write_text('{"weight_map": []}')
        with pytest.raises(UserError, match="no weight_map"):
            check_checkpoint(model)


class TestFinding:
    def test_all_models_below_a_folder_newest_first(self, model: Path):
        root = model.parent
        older = shutil.copytree(model, root / "deep" / "older")
        shutil.copytree(model, root / ".hidden")
        broken = shutil.copytree(model, root / "broken")
        os.truncate(broken / "model.safetensors", 500)
        os.utime(older / "config.json", (1, 1))
        assert find_checkpoints(root) == [model, older]
        assert find_checkpoints(model) == [model]
        assert find_checkpoints(root / "absent") == []


class TestLoad:
    def test_what_was_saved(self, model: Path):
        tokens = torch.arange(12)[None] % 288
        loaded = load_model(str(model))
        assert not loaded.training
        saved = load_file(model / "model.safetensors")
        torch.testing.assert_close(loaded.model.embed_tokens.weight, saved["model.embed_tokens.weight"], rtol=0, atol=0)
        shard(model)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, load_model(str(model))(tokens).logits, rtol=0, atol=0)
        assert load_model(str(model), dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_another_class(self, model: Path):
        from fathom import FathomModel

        assert type(load_model(str(model), model_class=FathomModel)) is FathomModel

    def test_a_tensor_that_the_config_wants_is_missing(self, model: Path):
        tensors = load_file(model / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"1 tensor is missing that the config expects: norm\.weight"):
            load_model(str(model))

    def test_one_expert_is_missing(self, model: Path):
        tensors = load_file(model / "model.safetensors")
        del tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"1 tensor is missing .*: layers\.1\.mlp\.experts\.2\.down_proj\.weight"):
            load_model(str(model))

    @pytest.mark.parametrize(("key", "value"), [("hidden_size", 96), ("vocab_size", 300)])
    def test_weights_of_another_shape(self, model: Path, key: str, value: int):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=rf"do not fit its config\.json: .*should be \[.*{value}"):
            load_model(str(model))

    @pytest.mark.parametrize(("key", "value"), [("hidden_size", "wide"), ("n_group", 3), ("token_mixers", "magic")])
    def test_a_config_that_cannot_work(self, model: Path, key: str, value):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=f"config.json describes no model .*{key}"):
            load_model(str(model))

    def test_the_tokenizer_beside_it(self, model: Path):
        tokenizer = load_tokenizer(str(model))
        assert tokenizer.decode(tokenizer("lazy dog")["input_ids"]) == "lazy dog"
        assert tokenizer.chat_template

    def test_tokenizer_errors(self, model: Path):
        (model / "tokenizer.json").write_text('{"version": "1.0"}')
        with pytest.raises(UserError, match="cannot be loaded"):
            load_tokenizer(str(model))
        (model / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match="no valid JSON"):
            load_tokenizer(str(model))
        (model / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=r"no tokenizer\.json"):
            load_tokenizer(str(model))

    def test_a_slip_in_a_path_is_not_looked_for_on_the_hub(self, model: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(model.parent.parent)
        with pytest.raises(UserError, match="no folder runs/modle; did you mean model"):
            load_model("runs/modle")
        with pytest.raises(UserError, match="is a file"):
            load_model("runs/model/config.json")

    def test_a_hub_id_without_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"cannot reach .* someone/model is not in the local cache"):
            load_model("someone/model")
