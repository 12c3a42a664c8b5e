"""One thread for all tests, and the treatment of tests that need something which is not installed.

Tiny tensors gain nothing from two threads, and lose a factor of ten on busy machines.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)

# Marks of tests that need a module which the extra `test` does not bring, and how to get it.
NEEDED = {
    "diffusers": "needs diffusers: pip install -c constraints.txt -e '.[oracle]'",
    "ltx_core": "needs ltx-core: pip install --no-deps ltx-core==1.0.0",
    "matplotlib": "needs matplotlib: pip install -c constraints.txt -e '.[report]'",
    "zensical": "needs zensical: pip install -c constraints.txt -e '.[docs]'",
}


# The longest files come first. Otherwise one of two workers ends long after the other (`--dist loadfile`).
LONGEST = ("test_kit", "test_cases", "test_audit", "test_verify", "test_compile", "test_streaming", "test_sharding")


@pytest.hookimpl(trylast=True)  # after -k and -m: of what they select, a sample is taken
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if os.environ.get("LTX2REF_CORPUS") != "full" and (left := left_out(items)):
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def left_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return what the mark `sample` leaves out: of each test all parameter sets but some, evenly spread."""
    sets = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            sets[item.nodeid.partition("[")[0]].append(item)
    left = []
    for found in sets.values():
        kept = found[0].get_closest_marker("sample").args[0]  # type: ignore[union-attr]
        chosen = {int((i + 0.5) * len(found) / kept) for i in range(kept)}
        left += [item for i, item in enumerate(found) if i not in chosen]
    return left


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--installed",
        action="append",
        default=[],
        choices=[*NEEDED],
        metavar="MODULE",
        help=f"one of {', '.join(NEEDED)}, which is there: no test may be skipped for want of it",
    )


def pytest_configure(config: pytest.Config) -> None:
    for module, reason in NEEDED.items():
        config.addinivalue_line("markers", f"{module}: {reason}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for module, reason in NEEDED.items():
        if item.get_closest_marker(module) and find_spec(module) is None:
            if module in item.config.getoption("installed"):
                pytest.fail(f"{reason}, which --installed {module} says is done", pytrace=False)
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Skip a file that imports such a module where it is not installed, instead of reporting an error.

    It remains an error for want of a mark by which its tests would be selected where the module is installed. Only
    diffusers needs none: the README's commands install it, and all tests run there.
    """
    report = yield
    error = getattr(report, "call", None) and report.call.excinfo and report.call.excinfo.value.__cause__
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else None
    if report.failed and module in NEEDED and module not in collector.config.getoption("installed"):
        if module != "diffusers" and f"pytest.mark.{module}" not in collector.path.read_text(encoding="utf-8"):
            return report
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {NEEDED[module]}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a test that is skipped for lack of a module and lacks its mark: `-m ltx_core` must select all of them."""
    report = yield
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    for module in NEEDED:
        if re.search(module.replace("_", "[-_]"), reason) and not item.get_closest_marker(module):
            report.outcome, report.longrepr = "failed", f"{reason}: expected the mark `pytest.mark.{module}`"
    return report
