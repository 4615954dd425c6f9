"""The first minutes of a new user of an installed wheel: train, chat, load the model where Fathom is not installed.

`.ci/fresh` runs these in a new virtual environment with the newest releases; `make test` runs them on the pinned ones.
"""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client
from without_fathom import WITHOUT_FATHOM

QUICKSTART = ("--pretrain_steps", "100", "--sft_steps", "20", "--vocab_size", "512")
LONGEST = 900  # seconds until the chat answers, on two slow cores


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """`fathom quickstart` with a hundred steps, up to the chat: its folder, and the address of the page."""
    folder = tmp_path_factory.mktemp("quickstart")
    log = folder / "printed.txt"
    command = [sys.executable, "-m", "fathom", "quickstart", *QUICKSTART]
    with log.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(command, cwd=folder, stdout=printed, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + LONGEST
        while not (address := re.search(r"^chat\s+(http://\S+)", log.read_text(encoding="utf-8"), re.MULTILINE)):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.5)
        yield folder / "runs/quickstart", address[1].rstrip("/")
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
def test_the_quickstart_ends_in_a_chat_that_answers(quickstart):
    folder, address = quickstart
    with urllib.request.urlopen(address, timeout=60) as page:
        assert page.status == 200
    _, details = Client(address, verbose=False).predict("What does `len(obj)` do?", max_new_tokens=8, api_name="/chat")
    assert 0 < details["new_tokens"] <= 8
    assert (folder / "sft" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_trained_model_loads_where_fathom_is_not_installed(quickstart):
    folder, _ = quickstart
    code = WITHOUT_FATHOM + (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder / 'sft')!r}, trust_remote_code=True)\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder / 'sft')!r})\n"
        "ids = tokenizer('import ', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=8, do_sample=False).shape[1] - ids.input_ids.shape[1])\n"
        "assert 'fathom' not in __import__('sys').modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) <= 8
