"""transformers' own continuous batching: with multi-head attention the texts of `generate()`, else a refusal."""

import pytest
from generations import GENERATIONS, model
from sharing import GREEDY, PROMPTS
from transformers import GenerationConfig

WITH_HEADS = ["classic", "moe"]
SETTINGS = GenerationConfig(**{**GREEDY, "eos_token_id": 96})


@pytest.mark.parametrize("generation", WITH_HEADS)
def test_texts_are_those_of_generate(generation: str) -> None:
    ours = model(generation)
    expected = [ours.generate(prompt, **{**GREEDY, "eos_token_id": 96})[0, prompt.shape[1] :] for prompt in PROMPTS]
    outputs = ours.generate_batch(inputs=[prompt[0].tolist() for prompt in PROMPTS], generation_config=SETTINGS)
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert found[tuple(prompt[0].tolist())] == text.tolist()


@pytest.mark.parametrize("generation", [each for each in GENERATIONS if each not in WITH_HEADS])
def test_other_caches_cannot_be_paged(generation: str) -> None:
    with pytest.raises(ValueError, match=r"generate_batch.*layers do not cache.*share_batch"):
        model(generation).generate_batch(inputs=[[5, 6, 7]], generation_config=SETTINGS)
