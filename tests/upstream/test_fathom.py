"""transformers' own tests of models, of every generation of Fathom."""

import unittest

from upstream.cases import CompressedTests, IndexerTests, ModelTests
from upstream.testers import EXPERTS, preset, register_class_names, same_as_stock

register_class_names()


class TestClassic(ModelTests, unittest.TestCase):
    not_for_this_model = {
        "eager_matches_batched_and_grouped_inference": "no layer has experts",
        "output_router_logits": "no layer has a router",
        "reverse_loading_mapping": "without experts, tensors are called the same on disk and in memory",
        "model_rope_scaling": "positions are sinusoids",
    }
    make_tester = staticmethod(lambda: preset("classic", head_dim=8, intermediate_size=32))


class TestMoe(ModelTests, unittest.TestCase):
    make_tester = staticmethod(lambda: preset("moe", **EXPERTS, head_dim=8, intermediate_size=32))


class TestV2(ModelTests, unittest.TestCase):
    make_tester = staticmethod(lambda: same_as_stock("DeepseekV2"))


class TestV3(ModelTests, unittest.TestCase):
    make_tester = staticmethod(lambda: same_as_stock("DeepseekV3", num_nextn_predict_layers=1))


class TestV32(IndexerTests, unittest.TestCase):
    test_all_params_have_gradient = True
    make_tester = staticmethod(lambda: same_as_stock("DeepseekV32", num_nextn_predict_layers=1))


class TestV4(CompressedTests, unittest.TestCase):
    test_all_params_have_gradient = True
    make_tester = staticmethod(lambda: same_as_stock("DeepseekV4", num_nextn_predict_layers=1))
