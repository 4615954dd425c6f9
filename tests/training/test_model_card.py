"""The model card says what the files of the run say, and nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from fathom.training.model_card import model_card

CONFIG = {"generation": "v3", "num_hidden_layers": 4, "vocab_size": 4096, "max_position_embeddings": 1024}
CORPUS = {
    "sources": ["stdlib"],
    "train_bytes": 11_000_000,
    "heldout_bytes": 600_000,
    "gzip_bits_per_byte": 2.1234,
    "xz_bits_per_byte": 1.8765,
    "python": "3.11.7",
}
PRETRAIN = {
    "verb": "pretrain",
    "command": "fathom pretrain --corpus runs/corpus --out runs/pretrain",
    "generation": "v3",
    "parameters_total": 7_654_321,
    "parameters_active": 3_210_987,
    "parameters_mtp": 12_345,
    "tokens_seen": 5_242_880,
    "steps": 640,
    "flops_per_token": 2.0e7,
    "corpus": CORPUS,
    "evaluation": {"bits_per_byte": 1.6543, "perplexity": 33.25, "loss": 3.504},
    "fathom_version": "9.8.7",
}
SFT = {
    "verb": "sft",
    "command": "fathom sft --model runs/pretrain --out runs/sft",
    "tokens_seen": 345_678,
    "evaluation": {"loss": 1.75},
    "parent": PRETRAIN,
}


def card(folder: Path, **files: dict) -> str:
    for name, content in ({"config": CONFIG} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return model_card(folder, "someone/diver")


def test_front_matter_is_what_the_hub_reads(tmp_path: Path):
    text = card(tmp_path, run=PRETRAIN)
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.tags == ["fathom", "deepseek", "deepseek-v3"]
    assert yaml.safe_load(model_card(tmp_path, "a/b", license="mit").split("---")[1])["license"] == "mit"


@pytest.mark.parametrize(("generation", "kind"), [("v3", "A DeepSeek-V3 "), ("classic", "A plain transformer ")])
def test_the_kind_of_model(tmp_path: Path, generation: str, kind: str):
    text = card(tmp_path, config=CONFIG | {"generation": generation})
    assert f"\n{kind}" in text
    assert ("deepseek" in ModelCard(text).data.tags) == (generation == "v3")


def test_every_figure_of_the_run(tmp_path: Path):
    text = card(tmp_path, run=PRETRAIN)
    for figure in (
        "# diver",
        "DeepSeek-V3",
        "| parameters | 7,654,321 |",
        "| active per token | 3,210,987 |",
        "beside these | 12,345 |",
        "| layers | 4 |",
        "- text: stdlib of Python 3.11.7",
        "- size: 11,000,000 bytes to train on, 600,000 held out",
        "- tokens seen: 5,242,880, at 20,000,000 FLOPs each",
        "- held-out bits per byte: **1.654** (gzip -9 2.123, xz -9e 1.877, on the same text)",
        "- held-out perplexity per token: 33.250",
        "fathom pretrain --corpus runs/corpus --out runs/pretrain",
        "- Fathom 9.8.7",
        "- optimizer steps: 640",
        'from_pretrained("someone/diver", trust_remote_code=True)',
        "at most 1,024 tokens",
    ):
        assert figure in text


def test_a_fine_tuned_model_tells_of_both_runs_in_order(tmp_path: Path):
    text = card(tmp_path, run=SFT)
    pretrain, sft = text.index("## Training: pretrain"), text.index("## Training: sft")
    assert pretrain < text.index("5,242,880") < sft < text.index("345,678")
    # Bits per byte and the text belong to the run that measured them.
    assert "bits per byte" not in text[sft:]
    assert "stdlib" not in text[sft:]


@pytest.mark.parametrize("run", [{}, {"verb": "pretrain", "corpus": {}, "evaluation": {}, "parent": None}])
def test_what_no_file_holds_is_left_out(tmp_path: Path, run: dict):
    text = card(tmp_path, run=run)
    for words in ("Training", "bits per byte", "tokens seen", "gzip", "parameters |", "None", "$"):
        assert words not in text
    assert "| layers | 4 |" in text


def test_each_line_depends_on_its_own_key_only(tmp_path: Path):
    whole = card(tmp_path, run=PRETRAIN).splitlines()
    for key in PRETRAIN:
        rest = {name: value for name, value in PRETRAIN.items() if name != key}
        lines = card(tmp_path, run=rest).splitlines()
        assert len(lines) <= len(whole)
        assert "None" not in "\n".join(lines)


def test_files_beside_the_model_fill_in_what_the_run_does_not_say(tmp_path: Path):
    run = {name: value for name, value in PRETRAIN.items() if name not in ("corpus", "steps")}
    text = card(tmp_path, run=run, corpus=CORPUS, trainer_state={"global_step": 77})
    assert "gzip -9 2.123" in text
    assert "- optimizer steps: 77" in text
    assert "- optimizer steps: 640" in card(tmp_path, run=PRETRAIN, trainer_state={"global_step": 77})


def test_damaged_files_count_as_absent(tmp_path: Path):
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "trainer_state.json").write_text("[]")
    assert "Training" not in card(tmp_path)


def test_paths_and_secrets_of_earlier_versions_stay_private(tmp_path: Path):
    """They wrote the command as it was typed; of the parent run as well."""
    command = f"fathom pretrain --corpus {tmp_path}/jane-doe/texts --trainer hub_token=hf_sEcReTsEcReT run_name=x"
    corpus = CORPUS | {"sources": [f"{tmp_path}/jane-doe/texts", "https://jane:pass-word@host/texts"]}
    private = PRETRAIN | {"command": command, "corpus": corpus}
    for run in (private, SFT | {"parent": private}):
        text = card(tmp_path, run=run)
        for secret in ("jane-doe", "sEcReT", "pass-word", str(tmp_path)):
            assert secret not in text
        assert "--corpus texts --trainer 'hub_token=<redacted>' run_name=x" in text
        assert "- text: texts, https://<redacted>@host/texts" in text
