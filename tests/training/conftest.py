"""Whole models of two kinds, from which the tests of malformed folders make theirs."""

from pathlib import Path

import pytest
from malformed import make_whole


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per kind of model; read only."""
    return make_whole(tmp_path_factory.mktemp("whole"))
