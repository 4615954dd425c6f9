"""What every transformers model can do, every generation does: resizing, heads, dtypes, copies, ways to generate."""

import copy
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from generations import GENERATIONS, config, model, save_with_tokenizer, tokens
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, set_seed

from fathom import FathomForCausalLM, FathomForSequenceClassification, FathomForTokenClassification, FathomModel

FLOATS_THAT_STAY = ("inv_freq", "original_inv_freq", "e_score_correction_bias")


def logits(of: torch.nn.Module, ids: torch.Tensor, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return of(input_ids=ids, **inputs).logits


@pytest.mark.parametrize(("wanted", "multiple", "got"), [(110, None, 110), (100, 16, 112), (50, None, 50)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_resized_vocabulary(tmp_path, generation, tied, wanted, multiple, got):
    """Old ids keep their logits; new ones are routed, drafted, saved and trained."""
    ours, ids = model(generation, tie_word_embeddings=tied), tokens() % 47 + 3
    before = logits(ours, ids)
    ours.resize_token_embeddings(wanted, pad_to_multiple_of=multiple, mean_resizing=False)
    after = logits(ours, ids)
    assert after.shape[-1] == ours.config.vocab_size == got
    torch.testing.assert_close(after[..., : min(got, 97)], before[..., : min(got, 97)])
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied

    newest = got - 1
    ids[:, 5] = newest
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        outputs = ours.train()(ids, labels=ids)
        outputs.loss.backward()
        assert ours.model.embed_tokens.weight.grad[newest].any()
        assert ours.lm_head.weight.grad[newest].any()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]

    ours.eval().save_pretrained(tmp_path)
    reread = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reread, ids), logits(ours, ids))
    assert reread.generate(ids[:, :6], max_new_tokens=3, eos_token_id=None).shape == (2, 9)


@pytest.mark.parametrize("head", [FathomForSequenceClassification, FathomForTokenClassification])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_classifier_from_a_language_model(tmp_path, generation, head):
    language_model, ids = model(generation), tokens(4)
    language_model.save_pretrained(tmp_path / "lm")
    classifier = head.from_pretrained(tmp_path / "lm", num_labels=3)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        expected = language_model.model(ids, attention_mask=mask).last_hidden_state
        states = classifier.model(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(states[mask.bool()], expected[mask.bool()])

    labels = torch.tensor([0, 1, 2, 0])
    if head is FathomForTokenClassification:
        labels = labels[:, None].expand(ids.shape).masked_fill(mask == 0, -100)
    classifier.train()(ids, attention_mask=mask, labels=labels).loss.backward()
    trainable = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(".indexer." in name for name, p in classifier.named_parameters() if not p.requires_grad)

    classifier.eval().save_pretrained(tmp_path / "classifier")
    reread = head.from_pretrained(tmp_path / "classifier")
    assert torch.equal(logits(reread, ids, attention_mask=mask), logits(classifier, ids, attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_half_precision(tmp_path, generation, dtype):
    """Loaded in a dtype, cast to it, and loaded from files of it: one model, whose fp32 buffers stay fp32."""
    ours, ids = model(generation), tokens()
    ours.save_pretrained(tmp_path / "fp32")
    cast = copy.deepcopy(ours).to(dtype)
    expected = logits(cast, ids)
    assert expected.dtype == dtype
    assert expected.isfinite().all()
    for name, buffer in cast.named_buffers():
        if name.split(".")[-1] in FLOATS_THAT_STAY:
            assert torch.equal(buffer, ours.get_buffer(name)), name
    cast.save_pretrained(tmp_path / "half")
    for loaded in (
        FathomForCausalLM.from_pretrained(tmp_path / "fp32", dtype=dtype),
        FathomForCausalLM.from_pretrained(tmp_path / "fp32", torch_dtype=dtype, low_cpu_mem_usage=True),
        FathomForCausalLM.from_pretrained(tmp_path / "half", dtype="auto"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "half"),
    ):
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert torch.equal(logits(loaded, ids), expected)
    assert loaded.generate(ids, max_new_tokens=4, eos_token_id=None).shape == (2, 28)
    cast.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in cast.parameters() if p.requires_grad)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_copies(generation):
    ours, ids = model(generation), tokens()
    expected = logits(ours, ids)
    copied = copy.deepcopy(ours)
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(copied, ids), expected)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_from_config_and_sizes(generation):
    made = config(generation)
    ours = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    assert (type(ours), ours.dtype) == (FathomForCausalLM, torch.bfloat16)
    assert type(AutoModel.from_config(made)) is FathomModel
    sizes = {name: parameter.numel() for name, parameter in ours.named_parameters()}
    assert ours.num_parameters() == ours.num_parameters(only_trainable=True) == sum(sizes.values())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in ours.buffers())
    assert ours.get_memory_footprint() == 2 * sum(sizes.values()) + buffers


@pytest.mark.parametrize("generation", GENERATIONS)
def test_saved_as_safetensors_alone_tied_weights_once(tmp_path, generation):
    model(generation, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}
    stored = load_file(tmp_path / "model.safetensors")
    embeddings, head = {"v4": ("embed.weight", "head.weight")}.get(
        generation, ("model.embed_tokens.weight", "lm_head.weight")
    )
    assert embeddings in stored
    assert head not in stored


@pytest.mark.parametrize("generation", GENERATIONS)
def test_drafts_do_not_change_the_text(generation):
    """Of the prompt's own words, of a smaller model, of another generation."""
    ours, ids = model(generation), tokens(1)
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = ours.generate(ids, use_cache=False, **settings)
    smaller = model(generation, num_hidden_layers=2, num_nextn_predict_layers=0)
    other = model("v3" if generation == "classic" else "classic")
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": smaller}, {"assistant_model": other}):
        assert torch.equal(ours.generate(ids, **settings, **draft), expected), draft


@pytest.mark.parametrize(
    "sampler",
    [
        {"top_k": 5, "temperature": 0.5},
        {"top_p": 0.7, "repetition_penalty": 1.3},
        {"min_p": 0.1, "no_repeat_ngram_size": 2},
        {"typical_p": 0.8, "num_return_sequences": 3},
        {"num_beams": 2},
    ],
    ids=lambda sampler: "+".join(sampler),
)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_samplers_draw_the_same_with_and_without_a_cache(generation, sampler):
    ours, ids = model(generation), tokens()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    texts = []
    for use_cache in (True, False):
        set_seed(0)
        settings = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None, "use_cache": use_cache, **sampler}
        texts.append(ours.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*texts)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_streamed_text(tmp_path, generation):
    save_with_tokenizer(tmp_path, generation)
    ours, tokenizer = FathomForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("the quick brown", return_tensors="pt")
    settings = {**prompt, "max_new_tokens": 12, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = Thread(target=ours.generate, kwargs={**settings, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(ours.generate(**settings)[0, prompt["input_ids"].shape[1] :])
    assert len(pieces) > 3


@pytest.mark.parametrize("generation", GENERATIONS)
def test_log_likelihoods_as_evaluation_harnesses_ask_for_them(generation):
    """Texts of several lengths, padded on the right and without a mask; read are the logits before each one's end."""
    ours, rows = model(generation), [tokens(1, length)[0] for length in (24, 17, 9)]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    together = F.log_softmax(logits(ours, batch), dim=-1)
    for row, of_row in zip(rows, together, strict=True):
        context, continuation = row[:-4], row[-4:]
        alone = F.log_softmax(logits(ours, row[None])[0], dim=-1)
        span = slice(len(context) - 1, len(row) - 1)
        expected = alone[span].gather(1, continuation[:, None]).sum()
        got = of_row[span].gather(1, continuation[:, None]).sum()
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        assert torch.equal(of_row[span].argmax(-1), alone[span].argmax(-1))
