"""transformers' own tests of models, of every generation of Fathom."""

import unittest

from upstream.cases import CompressedTests, IndexerTests, ModelTests
from upstream.testers import CLASSIC, MOE, fathom, fathom_config, register_class_names

from fathom import FathomConfig

register_class_names()


class TestClassic(ModelTests, unittest.TestCase):
    not_for_this_model = {
        "eager_matches_batched_and_grouped_inference": "no layer has experts",
        "output_router_logits": "no layer has a router",
        "reverse_loading_mapping": "without experts, tensors are called the same on disk and in memory",
        "model_rope_scaling": "positions are sinusoids",
    }
    make_tester = staticmethod(lambda: fathom(lambda: FathomConfig(**CLASSIC)))


class TestMoe(ModelTests, unittest.TestCase):
    make_tester = staticmethod(lambda: fathom(lambda: FathomConfig(**MOE)))


class TestV2(ModelTests, unittest.TestCase):
    make_tester = staticmethod(lambda: fathom(lambda: fathom_config("DeepseekV2")))


class TestV3(ModelTests, unittest.TestCase):
    make_tester = staticmethod(lambda: fathom(lambda: fathom_config("DeepseekV3", num_nextn_predict_layers=1)))


class TestV32(IndexerTests, unittest.TestCase):
    make_tester = staticmethod(lambda: fathom(lambda: fathom_config("DeepseekV32", num_nextn_predict_layers=1)))


class TestV4(CompressedTests, unittest.TestCase):
    make_tester = staticmethod(lambda: fathom(lambda: fathom_config("DeepseekV4", num_nextn_predict_layers=1)))
