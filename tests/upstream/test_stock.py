"""The same tests, in the same shapes, of transformers' own DeepSeek models."""

import unittest

from upstream.cases import CompressedTests, IndexerTests, ModelTests
from upstream.testers import stock


class TestV2(ModelTests, unittest.TestCase):
    make_tester = staticmethod(lambda: stock("DeepseekV2"))


class TestV3(ModelTests, unittest.TestCase):
    make_tester = staticmethod(lambda: stock("DeepseekV3"))


class TestV32(IndexerTests, unittest.TestCase):
    make_tester = staticmethod(lambda: stock("DeepseekV32"))


class TestV4(CompressedTests, unittest.TestCase):
    make_tester = staticmethod(lambda: stock("DeepseekV4"))
