"""`fathom push RUN owner/name`: a trained model on the Hub, ready for `AutoModelForCausalLM.from_pretrained`.

Uploaded are the model, its modeling code, tokenizer, chat template, generation config and a model card made from
the run's own figures; checkpoints of the run, optimizer state and logs stay here. A push of what is already there
makes no commit.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..training.checkpoint_files import check_checkpoint
from ..training.errors import UserError, reason
from ..training.hub import hub_errors
from ..training.loading import load_model, load_tokenizer
from ..training.model_card import model_card
from .arguments import parse
from .cli import run

# Left over from an earlier push with more shards or other code, these would be loaded beside the new files.
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.py"]


@dataclass
class PushOptions:
    _argument_group_name = "push"

    run: str = field(metadata={"help": "folder of the trained model, for instance runs/sft"})
    repo: str = field(metadata={"help": "where to: owner/name; made if it does not exist"})
    private: bool = field(default=False, metadata={"help": "make the repository private; an existing one must be"})
    message: str = field(default="Upload by fathom push", metadata={"help": "commit message"})
    license: str = field(default="apache-2.0", metadata={"help": "licence of the weights, a Hub licence identifier"})


def main(argv: Sequence[str]) -> int:
    (options,) = parse(
        "push",
        "Upload a model with tokenizer, code and a model card to the Hugging Face Hub.",
        [PushOptions],
        argv,
        positionals=("run", "repo"),
    )
    folder = Path(options.run).expanduser()
    _check_name(options.repo)
    check_checkpoint(folder)
    if not get_token():
        raise UserError("pushing needs a token with write access: run `hf auth login`, or set HF_TOKEN")

    with tempfile.TemporaryDirectory() as name:
        upload = Path(name)
        model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
        try:
            model.save_pretrained(upload)
            tokenizer.save_pretrained(upload)
            card = model_card(folder, options.repo, options.license)
        except (AttributeError, TypeError, ValueError) as error:
            # transformers refuses to write a generation_config.json that it reads; a card needs run.json as it was.
            raise UserError(f"{folder} cannot be written again: {reason(error)}; mend or remove the file") from error
        (upload / "README.md").write_text(card, encoding="utf-8")
        files = [file for file in upload.rglob("*") if file.is_file()]
        print(f"{len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
        url = _upload(upload, options)

    print(f"""{options.repo} is at {url}

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{options.repo}", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("{options.repo}", trust_remote_code=True)

next: fathom chat {options.repo}""")
    return 0


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} cannot be a repository: {' '.join(str(error).split())}") from error
    if "/" not in repo:
        raise UserError(f"{repo!r} names no owner; give owner/name, for instance your-name/{repo}")


def _upload(folder: Path, options: PushOptions) -> str:
    """Uploads in one commit and returns the page of the repository."""
    api = HfApi()
    with hub_errors(options.repo):
        # None leaves the choice to the owner's default; it concerns only a repository that is made here.
        url = api.create_repo(options.repo, private=options.private or None, exist_ok=True)
        if options.private and not api.model_info(options.repo).private:
            raise UserError(f"{options.repo} exists and is public: change that at {url}/settings, or take a new name")
        api.upload_folder(
            repo_id=options.repo,
            folder_path=folder,
            commit_message=options.message,
            delete_patterns=_REPLACED,
        )
    return str(url)


if __name__ == "__main__":
    sys.exit(run("push", main, sys.argv[1:]))
