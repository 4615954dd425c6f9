"""`fathom push` and plain `push_to_hub` over HTTP, and the pushed model in a process that has no Fathom.

The Hub is tests/hub_server.py; every client is a fresh process, because huggingface_hub reads its variables once.
"""

import json
import shutil
from pathlib import Path

import pytest

PUSH = "import sys; from fathom.scripts.cli import main; sys.exit(main(['push', *sys.argv[1:]]))"

# An import of the package fails as on a machine without it, although it is installed here.
WITHOUT_FATHOM = """
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fathom":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
"""

USE = (
    WITHOUT_FATHOM
    + """
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
try:
    import fathom
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("fathom is importable")
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
tokens = torch.arange(24).view(2, 12)
with torch.no_grad():
    logits = model.eval()(tokens).logits
text = tokenizer.apply_chat_template([{"role": "user", "content": "fox?"}], add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, return_tensors="pt")
answer = model.generate(**ids, max_new_tokens=5, do_sample=False)
torch.save({"logits": logits, "text": text, "answer": answer, "eos": model.generation_config.eos_token_id}, "seen.pt")
AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.split(".")[0] == "fathom" for name in sys.modules)
"""
)

PLAIN = """
import sys
from fathom import FathomForCausalLM
from transformers import PreTrainedTokenizerFast
FathomForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("tester/plain")
PreTrainedTokenizerFast.from_pretrained(sys.argv[1]).push_to_hub("tester/plain")
"""

LOAD = """
import sys
from fathom.training.checkpoints import load_model, load_tokenizer
from fathom.training.errors import UserError
try:
    print(load_model(sys.argv[1]).config.hidden_size, len(load_tokenizer(sys.argv[1])))
except UserError as error:
    print(error)
"""


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A run folder as training leaves it: the model, figures, and files that are nobody else's business."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "run"))
    (folder / "run.json").write_text(json.dumps({"verb": "pretrain", "tokens_seen": 4321}))
    (folder / "training_args.bin").write_bytes(b"private")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"private")
    return folder


def files(hub, repo: str) -> dict:
    return hub.repositories["models", repo].branches["main"].files


def assert_same_model(checkpoint: Path, seen: Path) -> None:
    import torch

    from fathom.modeling import fused
    from fathom.training.checkpoints import load_model, load_tokenizer

    here, there = load_model(str(checkpoint)), torch.load(seen, weights_only=True)
    tokenizer = load_tokenizer(str(checkpoint))
    # In the model's folder there are no native functions, which differ in the last bit.
    with torch.no_grad(), pytest.MonkeyPatch.context() as without:
        without.setattr(fused, "_kernels", {})
        without.setattr(fused, "library", lambda dtype: None)
        torch.testing.assert_close(here(torch.arange(24).view(2, 12)).logits, there["logits"], rtol=0, atol=0)
    chat = [{"role": "user", "content": "fox?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == there["text"]
    answer = here.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert answer.tolist() == there["answer"].tolist()
    assert there["eos"] == here.config.eos_token_id


def test_pushed_model_works_without_fathom(client, hub, run: Path, tmp_path: Path):
    pushed = client(PUSH, run, "tester/tiny", "--message", "hello")
    assert pushed.returncode == 0, pushed.stderr
    assert hub.url in pushed.stdout
    assert 'AutoModelForCausalLM.from_pretrained("tester/tiny", trust_remote_code=True)' in pushed.stdout
    assert pushed.stdout.rstrip().endswith("next: fathom chat tester/tiny")
    assert hub.repositories["models", "tester/tiny"].commits[-1].title == "hello"

    uploaded = files(hub, "tester/tiny")
    expected = {"config.json", "generation_config.json", "model.safetensors", "modeling_fathom.py", "README.md"}
    assert expected | {"tokenizer.json", "chat_template.jinja"} <= set(uploaded)
    assert not [name for name in uploaded if "checkpoint" in name or name in ("training_args.bin", "run.json")]
    assert "- tokens seen: 4,321" in uploaded["README.md"].content.decode()

    used = client(USE, "tester/tiny", token=None)
    assert used.returncode == 0, used.stderr
    assert_same_model(run, tmp_path / "seen.pt")

    again = client(PUSH, run, "tester/tiny")
    assert again.returncode == 0, again.stderr
    assert len(hub.repositories["models", "tester/tiny"].commits) == 2  # the first made by the Hub, then one push


def test_a_later_push_leaves_nothing_of_the_older_model(client, hub, run: Path):
    assert client(PUSH, run, "tester/tiny").returncode == 0
    upload = """
from huggingface_hub import upload_file
for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "old_module.py", "notes.md"):
    upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="tester/tiny")
"""
    assert client(upload).returncode == 0
    assert "old_module.py" in files(hub, "tester/tiny")
    assert client(PUSH, run, "tester/tiny").returncode == 0
    stale = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "old_module.py"}
    assert not stale & set(files(hub, "tester/tiny"))
    assert "notes.md" in files(hub, "tester/tiny")


def test_plain_push_to_hub(client, hub, tiny_checkpoint: Path, tmp_path: Path):
    pushed = client(PLAIN, tiny_checkpoint)
    assert pushed.returncode == 0, pushed.stderr
    used = client(USE, "tester/plain")
    assert used.returncode == 0, used.stderr
    assert_same_model(tiny_checkpoint, tmp_path / "seen.pt")


def test_private_repositories(client, hub, run: Path):
    assert client(PUSH, run, "tester/secret", "--private").returncode == 0
    assert hub.repositories["models", "tester/secret"].private
    assert client(LOAD, "tester/secret").stdout == "64 288\n"
    unseen = client(LOAD, "tester/secret", token=None).stdout
    assert unseen.startswith("no repository tester/secret on ")
    assert "hf auth login" in unseen
    assert "refuses the token" in client(LOAD, "tester/secret", token="hf_wrong").stdout

    assert client(PUSH, run, "tester/open").returncode == 0
    refused = client(PUSH, run, "tester/open", "--private", "--message", "leak")
    assert refused.returncode == 2
    assert "exists and is public" in refused.stderr
    assert hub.repositories["models", "tester/open"].commits[-1].title != "leak"


def test_a_repository_that_does_not_exist(client):
    assert client(LOAD, "tester/absent").stdout.startswith("no repository tester/absent on ")


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["run", "tiny"], "hf_test", "'tiny' names no owner; give owner/name"),
        (["run", "a/b/c"], "hf_test", "'a/b/c' cannot be a repository"),
        (["runn", "tester/tiny"], "hf_test", "there is no folder runn; did you mean run?"),
        (["run", "tester/tiny"], None, "pushing needs a token with write access: run `hf auth login`, or set HF_TOKEN"),
        (["run", "tester/tiny"], "hf_wrong", "refuses the token for tester/tiny (HTTP 401)"),
        (["run", "other/tiny"], "hf_test", "refuses the token for other/tiny (HTTP 403)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(client, hub, run: Path, arguments, token, message):
    process = client(PUSH, *arguments, token=token)
    assert process.returncode == 2, process.stderr
    last = process.stderr.splitlines()[-1]
    assert last.startswith("fathom push: error: ")
    assert message in last
    assert "Traceback" not in process.stderr
    assert not hub.repositories


def test_a_damaged_model_is_not_pushed(client, hub, run: Path):
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    process = client(PUSH, "run", "tester/tiny")
    assert process.returncode == 2
    assert "is truncated" in process.stderr
    assert not hub.repositories


def test_no_network_is_one_line(client, hub, run: Path):
    hub.shutdown()
    hub.server_close()
    process = client(PUSH, "run", "tester/tiny")
    assert process.returncode == 2, process.stderr
    assert "cannot reach http://127.0.0.1" in process.stderr.splitlines()[-1]
