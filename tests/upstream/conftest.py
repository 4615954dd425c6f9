"""Sets the marks of transformers' tests, and compares how many pass here and for transformers' own models.

transformers' models are the baseline: what fails there is no failure of ours, and is only counted. The run fails if a
generation passes fewer tests here than there.
"""

from pathlib import PurePath

import pytest
from upstream.source import load

# Marks that transformers registers in a pytest configuration of its own.
MARKS = (
    *("accelerate_tests", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_test", "generate"),
    *("is_training_test", "order", "torch_compile_test"),
)
OUTCOMES = ("passed", "skipped", "failed")
# nodeid -> outcome of the test, its subtests included.
results: dict[str, str] = {}


def pytest_configure(config):
    try:
        load()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("torch_compile_test"):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and item.path.stem == "test_stock":
        report.outcome, report.wasxfail = "skipped", "transformers' own model"
    return report


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        outcome = "failed" if hasattr(report, "wasxfail") else report.outcome
        seen = results.get(report.nodeid)
        # A failed subtest fails its test, whatever is reported of the test itself.
        results[report.nodeid] = "failed" if "failed" in (seen, outcome) else outcome


def counts() -> dict[tuple[str, str], list[int]]:
    """Numbers of tests by OUTCOMES, for every class of tests in every file."""
    table: dict[tuple[str, str], list[int]] = {}
    for nodeid, outcome in results.items():
        path, *test_class, _ = nodeid.split("::")
        if PurePath(path).parent.name == "upstream" and test_class:
            row = table.setdefault((PurePath(path).stem, test_class[0]), [0] * len(OUTCOMES))
            row[OUTCOMES.index(outcome)] += 1
    return table


def fewer_than_stock() -> list[str]:
    """The generations of which transformers' model passes more tests."""
    table = counts()
    both = [name for file, name in table if file == "test_fathom" and ("test_stock", name) in table]
    return [name for name in both if table["test_fathom", name][0] < table["test_stock", name][0]]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    if not hasattr(session.config, "workerinput") and exitstatus == pytest.ExitCode.OK and fewer_than_stock():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if table := counts():
        terminalreporter.section("transformers' tests")
        for (file, name), row in table.items():
            model = "fathom" if file == "test_fathom" else "transformers"
            numbers = "  ".join(f"{count:4d} {outcome}" for count, outcome in zip(row, OUTCOMES, strict=True))
            terminalreporter.line(f"{name.removeprefix('Test'):8} {model:12} {numbers}")
        for name in fewer_than_stock():
            terminalreporter.line(f"{name.removeprefix('Test')} passes fewer tests than transformers' model", red=True)
