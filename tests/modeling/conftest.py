import pytest
from device import forbid_reading


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


@pytest.fixture(params=["read", "unread"])
def host_reads(request, monkeypatch) -> None:
    """The test runs twice: as on a CPU, and as on an accelerator, whose tensors Python does not read (`device`)."""
    if request.param == "unread":
        forbid_reading(monkeypatch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The second way is another one where keys or entries are chosen; elsewhere it would be the same test again."""
    of = [getattr(item, "callspec", None) for item in items]
    twice = [each and each.params.get("host_reads") == "unread" for each in of]
    same = [each and each.params.get("generation") in ("classic", "moe", "v2", "v3") for each in of]
    items[:] = [item for item, again, alike in zip(items, twice, same, strict=True) if not (again and alike)]
