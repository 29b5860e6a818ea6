"""`--quick` leaves out tests that were measured to be slow; `--write-slow-tests` measures them.

tests/slow_tests.txt lists the functions of slow tests. A test that it does not list counts as
quick, so `make test-fast` runs new tests; if one is slow, the end of that run says so, and `make
slow-tests` lists it.
"""

import os
from pathlib import Path

import pytest

# CPU seconds, which other programs affect less than wall time: of the test, of the processes that
# it waited for, and of the fixtures that it needs (except session-scoped ones).
SLOW = 0.5
NO_LONGER_QUICK = 5 * SLOW  # tests above it are named: first tests also import and compile
ROOT = Path(__file__).parent.parent.parent
LIST = ROOT / "tests" / "slow_tests.txt"
SECONDS = "processor_seconds"


def pytest_addoption(parser):
    group = parser.getgroup("quick")
    group.addoption("--quick", action="store_true", help="only tests that are not slow")
    group.addoption(
        "--write-slow-tests",
        action="store_true",
        help=f"update {LIST.name} by what this run measures",
    )


def pytest_configure(config):
    config.pluginmanager.register(Quick(config), "quick-tests")


def function_of(nodeid: str) -> str:
    """The id of a test without its parameters."""
    return nodeid.partition("[")[0]


def listed() -> set[str]:
    return set(LIST.read_text().split()) if LIST.exists() else set()


def there(function: str) -> bool:
    """Whether the test still exists."""
    file, _, name = function.partition("::")
    path = ROOT / file
    return path.exists() and f"def {name.rpartition('::')[2]}(" in path.read_text()


class Quick:
    """Pytest hooks, and their measurements."""

    def __init__(self, config):
        self.quick = config.getoption("quick")
        self.write = config.getoption("write_slow_tests")
        self.is_worker = hasattr(config, "workerinput")
        self.fixtures = {}  # seconds by where a fixture is defined and its name
        self.took = {}  # seconds by test

    def pytest_collection_modifyitems(self, config, items):
        if self.quick:
            slow = listed()
            left_out = [item for item in items if function_of(item.nodeid) in slow]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if function_of(item.nodeid) not in slow]

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        start = _processor_seconds()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "session":
                key = fixturedef.baseid, fixturedef.argname
                self.fixtures[key] = _processor_seconds() - start

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        start = _processor_seconds()
        try:
            return (yield)
        finally:
            needed = sum(
                seconds
                for (where, name), seconds in self.fixtures.items()
                if name in item.fixturenames and item.nodeid.startswith(where)
            )
            item.user_properties.append((SECONDS, _processor_seconds() - start + needed))

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            self.took[report.nodeid] = dict(report.user_properties).get(SECONDS, 0.0)

    def pytest_sessionfinish(self):
        if self.write and not self.is_worker:
            ran = set(map(function_of, self.took))
            slow = {function_of(test) for test, seconds in self.took.items() if seconds > SLOW}
            kept = {function for function in listed() - ran if there(function)}
            LIST.write_text("".join(f"{function}\n" for function in sorted(slow | kept)))

    def pytest_terminal_summary(self, terminalreporter):
        slow = {test: s for test, s in self.took.items() if s > NO_LONGER_QUICK}
        if self.quick and slow:
            terminalreporter.section("tests that are no longer quick; run `make slow-tests`")
            for test, seconds in sorted(slow.items(), key=lambda item: -item[1]):
                terminalreporter.write_line(f"{seconds:.1f} s of processors  {test}")


def _processor_seconds() -> float:
    """CPU seconds of this process and of the ended ones that it waited for."""
    return sum(os.times()[:4])
