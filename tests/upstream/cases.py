"""transformers' mixins put together, with what every model here has in common."""

import torch
from transformers_tests import test_modeling_common
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin
from upstream.testers import evaluate_annotations

evaluate_annotations()


def has_attribute(thing, name: str) -> bool:
    """`hasattr`, but for a window that is None.

    The mixin gives a window of 2 to every configuration that has the field. Ours has it in every generation, and
    refuses it where no layer has windows.
    """
    return hasattr(thing, name) and (name != "sliding_window" or thing.sliding_window is not None)


test_modeling_common.hasattr = has_attribute


class ModelTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """All tests of one model; a subclass says by `make_tester` of which."""

    # Otherwise the year of the copyright line in the configuration's file decides.
    test_can_init_all_missing_weights_before_2023 = True
    # Parts of the names of tests that ask for something the model does not have by design, with the reason.
    not_for_this_model: dict[str, str] = {}
    make_tester = None
    model_tester = None

    def setUp(self):
        for part, reason in self.not_for_this_model.items():
            if part in self._testMethodName:
                self.skipTest(reason)
        self.model_tester = type(self).make_tester()
        self.all_model_classes = self.model_tester.all_model_classes
        # The test of compiled training reads the gradient of every parameter.
        if self.test_all_params_have_gradient:
            self._torch_compile_train_cls = self.model_tester.causal_lm_class

    def test_config(self):
        config = self.model_tester.get_config()
        ConfigTester(self, type(config), hidden_size=config.hidden_size).run_common_tests()


class IndexerTests(ModelTests):
    """A choice of keys has no gradient, and transformers has no loss for what chooses."""

    test_all_params_have_gradient = False


class CompressedTests(IndexerTests):
    """DeepSeek-V4: streams between the layers, and compressed entries behind the window's keys."""

    def setUp(self):
        super().setUp()
        # In the first layer, the heavily compressed one.
        length = self.model_tester.seq_length
        self.model_tester.key_length = length + length // 4

    def test_hidden_states_output(self):
        """The mixin expects [batch, tokens, width]; layers pass on [batch, tokens, streams, width]."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        rows, length = inputs["input_ids"].shape
        for model_class in self.all_model_classes:
            for of_config in (False, True):
                config.output_hidden_states = of_config
                model = model_class(config).eval()
                asked = {} if of_config else {"output_hidden_states": True}
                with torch.no_grad():
                    *layers, last = model(**inputs, **asked).hidden_states
                assert len(layers) == config.num_hidden_layers
                for states in layers:
                    assert states.shape == (rows, length, config.hc_mult, config.hidden_size)
                assert last.shape == (rows, length, config.hidden_size)
