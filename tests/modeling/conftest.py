import pytest


@pytest.fixture(scope="session", autouse=True)
def native_functions() -> None:
    """They are there from the beginning, and not from some test on."""
    from fathom.modeling import native

    native.wait()


@pytest.fixture
def long_texts(monkeypatch) -> None:
    """Texts of tests count as long, and only steps are read by native functions.

    For tests of bits, in which something else is called in a module's place (offloaded, recorded, without kernels).
    """
    from fathom.modeling import fused

    monkeypatch.setattr(fused, "SHORT_TEXT", fused.FEW_TOKENS)
    monkeypatch.setattr(fused, "multiplies_texts", lambda dtype: False)
