"""A skip is printed with its reason, and fails the run unless allowed_skips.txt lists that reason."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")

LISTED = """
import pytest

@pytest.mark.skip(reason="no accelerator here")
def test_marked():
    assert False

def test_runs():
    assert True
"""
IN_A_TEST = """
import pytest

def test_stops():
    pytest.skip("did not feel like it")
"""
WHOLE_MODULE = """
import pytest

pytest.importorskip("a_module_that_is_nowhere", reason="nowhere to be found")
"""
EXPECTED_FAILURE = """
import pytest

@pytest.mark.xfail(reason="known to be wrong")
def test_wrong():
    assert 1 == 2
"""


def run(folder: Path, files: dict[str, str], *, workers: int) -> tuple[int, str]:
    """Runs pytest in `folder` under this project's conftest; returns its exit code and what it printed."""
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "allowed_skips.txt").write_text("# a comment\n\nno accelerator here\n", encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", "-n", str(workers), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                          capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_listed_reason_is_printed_and_passes(tmp_path):
    code, printed = run(tmp_path, {"test_listed.py": LISTED}, workers=0)
    assert code == pytest.ExitCode.OK, printed
    assert "test_marked: no accelerator here\n" in printed


@pytest.mark.parametrize("text, reason", [
    (IN_A_TEST, "did not feel like it"),
    (WHOLE_MODULE, "nowhere to be found"),
    (EXPECTED_FAILURE, "known to be wrong"),
], ids=["in a test", "whole module", "expected failure"])
def test_an_unlisted_reason_is_printed_and_fails(tmp_path, text, reason):
    code, printed = run(tmp_path, {"test_listed.py": LISTED, "test_other.py": text}, workers=0)
    assert code == pytest.ExitCode.TESTS_FAILED, printed
    assert f": {reason}  (reason not listed)\n" in printed


def test_the_controller_sees_the_skips_of_all_workers(tmp_path):
    files = {"test_a.py": LISTED, "test_b.py": IN_A_TEST, "test_c.py": WHOLE_MODULE, "test_d.py": EXPECTED_FAILURE}
    code, printed = run(tmp_path, files, workers=2)
    assert code == pytest.ExitCode.TESTS_FAILED, printed
    assert "test_marked: no accelerator here\n" in printed
    for reason in ("did not feel like it", "nowhere to be found", "known to be wrong"):
        assert printed.count(f": {reason}  (reason not listed)\n") == 1, printed
