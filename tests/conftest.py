"""What every test runs under: eight fake CPU devices, a compilation cache, repeatable examples, and no silent skip."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent
ALLOWED_SKIPS = HERE / "allowed_skips.txt"

# jax reads these when it is first imported; set here, they cost a test without jax nothing.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tests compile far more than they compute: without LLVM's optimisation a compilation takes half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    """Lets go of compiled programs before their memory maps reach what Linux allows a process, 65,530 by default.

    Beyond it the compiler does not fail but crash. A module adds up to some 15,000.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and len(maps.read_bytes().splitlines()) > 25_000:
        sys.modules["jax"].clear_caches()


def skips(config: pytest.Config) -> list[tuple[str, str]]:
    """Every (test, reason) of this run: tests and whole modules that were skipped, and failures that were expected.

    Under xdist a worker has no terminal reporter and answers []; the controller sees the reports of all workers.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return []
    found = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found.append((report.nodeid, reason.removeprefix("Skipped: ")))
    for report in reporter.stats.get("xfailed", []):
        found.append((report.nodeid, report.wasxfail.removeprefix("reason: ")))
    return found


def unlisted(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of `found` whose reason is not a line of allowed_skips.txt."""
    lines = (line.strip() for line in ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines())
    allowed = {line for line in lines if line and not line.startswith("#")}
    return [skip for skip in found if skip[1] not in allowed]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    passed = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if passed and unlisted(skips(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = skips(config)
    if not found:
        return
    bad = unlisted(found)
    terminalreporter.section("skips")
    for skip in found:
        mark = "  (reason not listed)" if skip in bad else ""
        terminalreporter.line(f"{skip[0]}: {skip[1]}{mark}")
    if bad:
        terminalreporter.line(f"{len(bad)} of them for a reason that {ALLOWED_SKIPS.name} does not list: make the "
                              "test run here, or list the exact reason there.", red=True)
