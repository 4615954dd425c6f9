"""Generation tests for a source distribution that leaves out those of transformers.

They ask of `generate` what `GenerationTesterMixin` asks, under the same names where one test stands for one: shapes of
all outputs of all decoding methods, drafting that changes nothing, and logits that do not depend on how a text is cut,
padded, packed, embedded or cached. In place of the shapes of caches they compare what comes out.
"""

import copy
import inspect

import pytest
import torch
from parameterized import parameterized
from transformers import set_seed
from transformers.cache_utils import StaticCache

NEW = 3  # tokens per generation


class GenerationTests:
    """Mixin; `model_tester` and `all_generative_model_classes` come from `ModelTesterMixin`."""

    def generation_case(self, batch_size: int = 2):
        """Model classes that generate, each with a model that knows no end and unpadded inputs."""
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.eos_token_id = None
            input_ids = inputs["input_ids"][:batch_size]
            set_seed(0)
            yield model_class(config).eval(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def drafting_case(self):
        """One row each, of models whose cache can be taken back."""
        for model, inputs in self.generation_case(batch_size=1):
            if model._is_stateful:
                self.skipTest("a stateful cache cannot forget refused drafts")
            yield model, inputs

    def assert_same(self, expected, got, atol: float = 1e-5):
        """Equal sequences, or equal scores up to the first token that differs: rounding may decide a tie."""
        start = expected.sequences.shape[1] - len(expected.scores)
        for row, (wanted, found) in enumerate(zip(expected.sequences, got.sequences, strict=True)):
            if different := (wanted != found).nonzero().flatten().tolist():
                step = different[0] - start
                torch.testing.assert_close(got.scores[step][row], expected.scores[step][row], atol=atol, rtol=atol)

    def check_outputs(self, outputs, config, prompt: int, rows: int, cached: bool = True):
        """Every step reports scores, hidden states, attentions and a cache of the right shapes."""
        steps = outputs.sequences.shape[1] - prompt
        assert steps == NEW
        for name in ("scores", "logits", "hidden_states", "attentions"):
            assert len(getattr(outputs, name)) == steps, name
        for scores, logits in zip(outputs.scores, outputs.logits, strict=True):
            assert scores.shape == (rows, config.vocab_size)
            assert logits.shape == (rows, config.vocab_size)
        for step in range(steps):
            new = 1 if cached and step else prompt + step
            states, attentions = outputs.hidden_states[step], outputs.attentions[step]
            assert len(states) == config.num_hidden_layers + 1
            assert len(attentions) == config.num_hidden_layers
            for state in states:
                assert (*state.shape[:2], state.shape[-1]) == (rows, new, config.hidden_size)
            for attention in attentions:
                assert attention.shape[:3] == (rows, config.num_attention_heads, new)
        if cached:
            assert outputs.cache.get_seq_length() == prompt + steps - 1

    def all_outputs(self, model, inputs, **options):
        model.set_attn_implementation("eager")
        wanted = ("scores", "logits", "hidden_states", "attentions")
        return model.generate(
            **inputs,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            **{f"output_{name}": True for name in wanted},
            **options,
        )

    @parameterized.expand(
        [
            ("greedy_generate", {"do_sample": False}),
            ("sample_generate", {"do_sample": True, "top_k": 10}),
            ("beam_search_generate", {"do_sample": False, "num_beams": 2, "length_penalty": 2.0}),
            ("beam_sample_generate", {"do_sample": True, "num_beams": 2}),
        ]
    )
    def test_generate_dict_outputs(self, name, options):
        for cached in (True, False):
            for model, inputs in self.generation_case():
                rows, prompt = inputs["input_ids"].shape
                outputs = self.all_outputs(model, inputs, use_cache=cached, **options)
                self.check_outputs(outputs, model.config, prompt, rows * options.get("num_beams", 1), cached)

    @parameterized.expand([("greedy", 1), ("beam search", 2)])
    def test_generate_does_not_depend_on_the_cache(self, name, num_beams):
        options = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        for model, inputs in self.generation_case():
            results = [
                model.generate(**inputs, **options, num_beams=num_beams, use_cache=cached) for cached in (True, False)
            ]
            self.assert_same(*results)

    @parameterized.expand([("random",), ("same",)])
    def test_assisted_decoding_matches_greedy_search(self, assistant_type):
        """A random assistant has all its drafts refused, the model itself all of them accepted."""
        for model, inputs in self.drafting_case():
            expected = self.all_outputs(model, inputs, do_sample=False)
            assistant = model if assistant_type == "same" else type(model)(copy.deepcopy(model.config)).eval()
            assistant.generation_config.num_assistant_tokens = 2
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            self.assert_same(expected, self.all_outputs(model, inputs, do_sample=False, assistant_model=assistant))

    def test_assisted_decoding_sample(self):
        for model, inputs in self.drafting_case():
            model.generation_config.num_assistant_tokens = 2
            outputs = self.all_outputs(model, inputs, do_sample=True, assistant_model=model)
            assert outputs.sequences.shape[1] == inputs["input_ids"].shape[1] + NEW

    def test_prompt_lookup_decoding_matches_greedy_search(self):
        for model, inputs in self.drafting_case():
            # The prompt repeats itself, so that there is something to look up.
            inputs = {name: value.repeat(1, 3) for name, value in inputs.items()}
            expected = self.all_outputs(model, inputs, do_sample=False)
            self.assert_same(expected, self.all_outputs(model, inputs, do_sample=False, prompt_lookup_num_tokens=2))

    @parameterized.expand([("greedy", 1), ("beam search", 2)])
    def test_generate_from_inputs_embeds(self, name, num_beams):
        options = {"max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        for model, inputs in self.generation_case():
            input_ids, mask = inputs["input_ids"], {"attention_mask": inputs["attention_mask"]}
            embeds = model.get_input_embeddings()(input_ids)
            expected = model.generate(**inputs, **options, num_beams=num_beams)
            both = model.generate(input_ids, inputs_embeds=embeds, **mask, **options, num_beams=num_beams)
            self.assert_same(expected, both)
            other = torch.rand_like(embeds)
            other = model.generate(input_ids, inputs_embeds=other, **mask, **options, num_beams=num_beams)
            assert not torch.allclose(other.scores[0], expected.scores[0])
            alone = model.generate(inputs_embeds=embeds, **mask, **options, num_beams=num_beams)
            expected.sequences = expected.sequences[:, input_ids.shape[1] :]
            self.assert_same(expected, alone)

    @parameterized.expand([("input_ids",), ("inputs_embeds",)])
    def test_generate_with_static_cache(self, given):
        options = {"max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        for model, inputs in self.generation_case():
            if not model._can_compile_fullgraph:
                self.skipTest("the model has no static cache")
            if given == "inputs_embeds":
                inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
            expected = model.generate(**inputs, **options)
            got = model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
            assert isinstance(got.cache, StaticCache)
            self.assert_same(expected, got)

    def test_generate_continue_from_past_key_values(self):
        """Four tokens at once, and three and then one more with the cache of the three."""
        options = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        for model, inputs in self.generation_case():
            expected = model.generate(**inputs, **options, max_new_tokens=4)
            first = model.generate(**inputs, **options, max_new_tokens=3)
            mask = torch.ones_like(first.sequences)
            second = model.generate(
                first.sequences,
                attention_mask=mask,
                cache=first.cache,
                **options,
                max_new_tokens=1,
            )
            second.scores = first.scores + second.scores
            self.assert_same(expected, second)

    def test_generate_continue_from_inputs_embeds(self):
        """The same, the prompt given as embeddings."""
        options = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        for model, inputs in self.generation_case():
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
            expected = model.generate(inputs_embeds=embeds, **inputs, **options, max_new_tokens=4)
            first = model.generate(inputs_embeds=embeds, **inputs, **options, max_new_tokens=3)
            embeds = torch.cat((embeds, model.get_input_embeddings()(first.sequences)), 1)
            second = model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2]),
                cache=first.cache,
                **options,
                max_new_tokens=1,
            )
            second.sequences = torch.cat((first.sequences, second.sequences), 1)
            second.scores = first.scores + second.scores
            self.assert_same(expected, second)

    def test_generate_methods_with_logits_to_keep(self):
        for model, inputs in self.generation_case():
            for beams in (1, 2):
                options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
                expected = model.generate(**inputs, **options, logits_to_keep=0)
                assert torch.equal(model.generate(**inputs, **options), expected)

    def test_generate_without_input_ids(self):
        for model, _ in self.generation_case():
            outputs = model.generate(max_new_tokens=NEW, do_sample=False)
            assert outputs.shape == (1, 1 + NEW)

    def test_generate_with_and_without_position_ids(self):
        for model, inputs in self.generation_case():
            if "position_ids" not in inspect.signature(model.forward).parameters:
                self.skipTest("the model takes no positions")
            positions = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
            expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            got = model.generate(**inputs, position_ids=positions, max_new_tokens=NEW, do_sample=False)
            assert torch.equal(got, expected)

    def test_left_padding_compatibility(self):
        for model, inputs in self.generation_case():
            rows = inputs["input_ids"].shape[0]
            pad, zeros = torch.full((rows, 32), model.config.pad_token_id), torch.zeros(rows, 32, dtype=torch.long)
            mask = torch.cat((zeros, inputs["attention_mask"]), 1)
            padded = {
                "input_ids": torch.cat((pad, inputs["input_ids"]), 1),
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
            }
            with torch.no_grad():
                expected, got = model(**inputs).logits[:, -1], model(**padded).logits[:, -1]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    @parameterized.expand([("eager",), ("sdpa",)])
    def test_padding_matches_padding_free_with_position_ids(self, attn_implementation):
        """Documents one behind the other in one row give the logits that they give in rows of their own."""
        for model, inputs in self.generation_case(batch_size=3):
            if attn_implementation == "sdpa" and not model._supports_sdpa:
                self.skipTest("the model does not support SDPA")
            model.set_attn_implementation(attn_implementation)
            lengths = [7, 4, 6]
            mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths]).long()
            packed = inputs["input_ids"][mask.bool()].unsqueeze(0)
            positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
            with torch.no_grad():
                expected = model(inputs["input_ids"], attention_mask=mask).logits[mask.bool()]
                got = model(packed, position_ids=positions, use_cache=False).logits[0]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.torch_compile_test
    def test_generate_compile_model_forward_fullgraph(self):
        options = {"max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        for model, inputs in self.generation_case():
            if not model._can_compile_fullgraph:
                self.skipTest("the model cannot be compiled as one graph")
            expected = model.generate(**inputs, **options)
            torch.compiler.reset()
            model.forward = torch.compile(model.forward, fullgraph=True, mode="default")
            got = model.generate(**inputs, **options, cache_implementation="static")
            self.assert_same(expected, got, atol=1e-4)
