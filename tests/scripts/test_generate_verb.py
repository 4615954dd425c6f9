"""`fathom generate` in this process: what it writes where, and how it refuses."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.scripts.cli import main
from fathom.training.checkpoints import load_model, load_tokenizer


def expected(checkpoint: Path, prompt: list[int], tokens: int) -> str:
    model, tokenizer = load_model(str(checkpoint)), load_tokenizer(str(checkpoint))
    output = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def test_raw_text_is_continued_on_stdout_with_the_figures_on_stderr(tiny_checkpoint: Path, capsys: Any) -> None:
    arguments = ["generate", str(tiny_checkpoint), "def double", "--max_new_tokens", "12", "--temperature", "0"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    tokenizer = load_tokenizer(str(tiny_checkpoint))
    prompt = [tokenizer.bos_token_id, *tokenizer.encode("def double")]
    assert out == expected(tiny_checkpoint, prompt, 12) + "\n"
    assert f"{len(prompt)} prompt tokens, " in err
    assert err.splitlines()[-1] == f"next: fathom chat {tiny_checkpoint}"


def test_chat_applies_the_template_to_stdin(
    tiny_checkpoint: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is\n2 * 2?"))
    arguments = ["--prompt", "-", "--chat", "--system", "Be brief.", "--max_new_tokens", "8", "--temperature", "0"]
    assert main(["generate", str(tiny_checkpoint), *arguments]) == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is\n2 * 2?"}]
    tokenizer = load_tokenizer(str(tiny_checkpoint))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert capsys.readouterr().out == expected(tiny_checkpoint, prompt, 8) + "\n"


@pytest.mark.parametrize("form", [[], ["--chat"]], ids=["raw", "chat"])
def test_control_tokens_in_a_prompt_are_text_unless_named(
    tiny_checkpoint: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    from fathom import FathomForCausalLM

    prompts = []
    generate = FathomForCausalLM.generate

    def watched(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        prompts.append(input_ids[0].tolist())
        return generate(self, input_ids, **options)

    monkeypatch.setattr(FathomForCausalLM, "generate", watched)
    text = "a<｜end▁of▁sentence｜><｜fim▁hole｜>b"
    arguments = ["generate", str(tiny_checkpoint), text, "--max_new_tokens", "2", *form]
    assert main(arguments) == 0
    assert main([*arguments, "--allowed_special", "<｜fim▁hole｜>"]) == 0
    tokenizer = load_tokenizer(str(tiny_checkpoint))
    hole = tokenizer.convert_tokens_to_ids("<｜fim▁hole｜>")
    assert [prompt.count(hole) for prompt in prompts] == [0, 1]
    assert [prompt.count(tokenizer.eos_token_id) for prompt in prompts] == [0, 0]
    assert all(text in tokenizer.decode(prompt) for prompt in prompts)
    capsys.readouterr()
    assert main([*arguments, "--allowed_special", "<hole>"]) == 2
    assert "'<hole>' is no control token" in capsys.readouterr().err


def test_a_seed_makes_sampling_repeatable(tiny_checkpoint: Path, capsys: Any) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(tiny_checkpoint), "the", "--temperature", "2", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_weights_in_int8(tiny_checkpoint: Path, capsys: Any) -> None:
    arguments = ["the", "--max_new_tokens", "12", "--temperature", "0", "--int8"]
    assert main(["generate", str(tiny_checkpoint), *arguments]) == 0
    model, tokenizer = load_model(str(tiny_checkpoint)).quantize_int8(), load_tokenizer(str(tiny_checkpoint))
    prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("the")]])
    output = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(output, skip_special_tokens=True) + "\n"


def test_drafts_do_not_change_the_text(tiny_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["the", "--max_new_tokens", "20", "--temperature", "0"]
    texts = []
    for options in ([], ["--draft"]):
        assert main(["generate", str(tiny_checkpoint), *arguments, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert load_model(str(tiny_checkpoint)).config.num_nextn_predict_layers == 1

    assert main(["generate", "random:classic", *arguments, "--draft"]) == 2
    assert "no MTP layers" in capsys.readouterr().err


def test_an_answer_clipped_by_the_context_says_so(tiny_checkpoint: Path, capsys: Any) -> None:
    tokenizer = load_tokenizer(str(tiny_checkpoint))
    prompt = tokenizer.decode([tokenizer.encode("q")[0]] * 125)  # with BOS, 126 of the context's 128
    assert main(["generate", str(tiny_checkpoint), prompt, "--temperature", "0"]) == 0
    assert "cut at 2 instead of 256 tokens: the context is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model given"),
        (["MODEL"], "no prompt given"),
        (["MODEL", "q" * 400], "context holds 128"),
        (["MODEL", "hi", "--chat", "--raw"], "exclude each other"),
        (["MODEL", "hi", "--thinking"], "add --chat"),
        (["MODEL", "hi", "--top_p", "0"], "top_p=0.0 must be above 0"),
        (["MODEL", "hi", "--max_new_tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["MODEL", "\udcff"], "surrogate"),
        (["random:v33", "hi"], "did you mean v3"),
        (["./nowhere", "hi"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny_checkpoint: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    assert main(["generate", *(str(tiny_checkpoint) if word == "MODEL" else word for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_stdin_that_is_no_text_is_refused(tiny_checkpoint: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    assert main(["generate", str(tiny_checkpoint), "--prompt", "-"]) == 2
    assert "byte 2 is 0xff" in capsys.readouterr().err
