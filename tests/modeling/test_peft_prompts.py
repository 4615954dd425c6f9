"""PEFT's prompt learning: virtual tokens before the text, as embeddings or as keys and values.

PEFT hands a prefix's keys and values over by the cache's old name, `past_key_values`.
"""

from pathlib import Path

import pytest
import torch
from generations import GENERATIONS, model, tokens

peft = pytest.importorskip("peft")

VIRTUAL, NEW = 4, 6
KINDS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "encoder": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}
# Hash layers of V4 route by token id, which a virtual token has not; latents are no keys and values of heads.
WITH_PROMPTS = [
    (kind, generation) for kind in ("prompt", "encoder") for generation in GENERATIONS if generation != "v4"
]
WITH_PREFIXES = [("prefix", "classic"), ("prefix", "moe")]
every_pair = pytest.mark.parametrize(("kind", "generation"), WITH_PROMPTS + WITH_PREFIXES)
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning", "ignore:Position ids are not supp")


def prompted(kind: str, generation: str) -> "peft.PeftModel":
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model(generation), KINDS[kind]()).eval()


@torch.no_grad()
def expected_logits(ours: "peft.PeftModel", kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Of the ids [B, T]: what the base model gives behind the virtual tokens."""
    prompt, base = ours.get_prompt(len(ids)), ours.get_base_model()
    if kind == "prefix":
        return base(ids, cache=prompt).logits
    embeds = torch.cat((prompt, base.model.embed_tokens(ids)), dim=1)
    return base(inputs_embeds=embeds).logits[:, VIRTUAL:]


@every_pair
def test_the_virtual_tokens_alone_learn(kind: str, generation: str) -> None:
    ours, ids = prompted(kind, generation).train(), tokens()
    ours(input_ids=ids, labels=ids).loss.backward()
    learning = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert all(name.startswith("prompt_encoder") for name in learning)
    assert [name for name, p in learning.items() if p.grad is None or not p.grad.any()] == []


@every_pair
def test_texts_follow_the_virtual_tokens(kind: str, generation: str) -> None:
    ours, ids = prompted(kind, generation), tokens()
    expected = expected_logits(ours, kind, ids)
    with torch.no_grad():
        logits = ours(input_ids=ids).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (expected - ours.get_base_model()(ids).logits).abs().max() > 1e-3, "virtual tokens change nothing"
    text = ids
    for _ in range(NEW):
        text = torch.cat((text, expected_logits(ours, kind, text)[:, -1:].argmax(-1)), dim=1)
    generated = ours.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generated, text)


@every_pair
def test_saved_and_loaded(tmp_path: Path, kind: str, generation: str) -> None:
    ours, ids = prompted(kind, generation), tokens()
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model(generation), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "generation", "message"),
    [
        *[("prefix", generation, "prefix tuning fits multi-head attention alone") for generation in ("v2", "v3")],
        ("prefix", "v3.2", "prefix tuning fits multi-head attention alone"),
        ("prefix", "v4", "filled by another kind of model"),
        ("prompt", "v4", "route by token id: pass input_ids"),
    ],
)
def test_what_does_not_fit_is_said(kind: str, generation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompted(kind, generation)(input_ids=tokens())
