"""Notebooks are stored bare, install themselves where that is needed without touching jax, and run from top to bottom.

Each rule is a function from a notebook to a list of complaints. It is applied to this repository, and to a notebook
that breaks it.
"""

import ast
import copy
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BADGE = re.compile(r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
                   r"\(https://colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/notebooks/(\w+)\.ipynb\)")
GUARD = 'importlib.util.find_spec("glm5_jax") is None'
# A path of a file system root, a home or a drive; the "//" of an address follows a colon, a division stands in spaces.
ABSOLUTE = re.compile(r"(?<![\w.:/)\]])(?:/|~/|[A-Za-z]:\\)[\w.-]+")
KEPT = ("jax", "jaxlib", "numpy")
MOST_CELLS = 25

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8")) | {"name": path.stem}


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code(notebook: Notebook) -> list[str]:
    return [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def leftovers(notebook: Notebook) -> list[str]:
    """What a run leaves in a notebook: outputs, counts, metadata."""
    ran = [cell["id"] for cell in notebook["cells"]
           if cell.get("outputs") or cell.get("execution_count") is not None or cell["metadata"]]
    return ran + sorted(set(notebook["metadata"]) - {"kernelspec", "language_info"})


def wrong_badge(notebook: Notebook) -> list[str]:
    first = notebook["cells"][0]
    found = BADGE.match(source(first)) if first["cell_type"] == "markdown" else None
    return [] if found and found[2] == notebook["name"] else ["the first cell has no Colab badge of this notebook"]


def wrong_install(notebook: Notebook) -> list[str]:
    """The first code cell may import from the standard library, and install inside one guard; no other installs."""
    install, *others = code(notebook)
    *imports, guarded = ast.parse(install).body
    found = [text for text in others if re.search(r"^\s*[!%]|\bpip\b", text, re.MULTILINE)]
    if not all(isinstance(node, ast.Import) and {alias.name.split(".")[0] for alias in node.names}
               <= sys.stdlib_module_names for node in imports):
        found.append("the install cell does more than import before its guard")
    if not isinstance(guarded, ast.If) or guarded.orelse or ast.unparse(guarded.test) != GUARD.replace('"', "'"):
        found.append("the install cell has no guard")
    return found


def absolute_paths(notebook: Notebook) -> list[str]:
    return [found[0] for cell in notebook["cells"] for found in ABSOLUTE.finditer(source(cell))]


def not_plain(notebook: Notebook) -> list[str]:
    """Cells that are not Python, or lines beyond 120 characters."""
    long = [line for cell in notebook["cells"][1:] for line in source(cell).splitlines() if len(line) > 120]
    for text in code(notebook):
        try:
            compile(text, notebook["name"], "exec")
        except SyntaxError:
            long.append(text)
    return long


def too_long(notebook: Notebook) -> list[str]:
    return [notebook["name"]] if len(notebook["cells"]) > MOST_CELLS else []


RULES = [leftovers, wrong_badge, wrong_install, absolute_paths, not_plain, too_long]


def cell(kind: str, text: str) -> dict[str, Any]:
    ran = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": text[:8], "metadata": {}, "source": [text]} | ran


GOOD = {
    "name": "00_some",
    "metadata": {"kernelspec": {}},
    "cells": [cell("markdown", "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://"
                               "colab.research.google.com/github/some/repo/blob/main/notebooks/00_some.ipynb)"),
              cell("code", f"import importlib.util\n\nif {GUARD}:\n    print('installing')"),
              cell("code", "ratio = 1 / 2\nratio = (1)/ratio/2\nprint('docs/file.txt')")],
}


def changed(index: int, **fields: Any) -> Notebook:
    notebook = copy.deepcopy(GOOD)
    notebook["cells"][index].update(fields)
    return notebook


VIOLATIONS = {
    "output": (leftovers, changed(2, outputs=[{"output_type": "stream"}])),
    "count": (leftovers, changed(2, execution_count=1)),
    "cell metadata": (leftovers, changed(2, metadata={"id": "x"})),
    "widgets": (leftovers, GOOD | {"metadata": {"widgets": {}}}),
    "no badge": (wrong_badge, changed(0, source=["# Some"])),
    "another's badge": (wrong_badge, GOOD | {"name": "01_other"}),
    "no guard": (wrong_install, changed(1, source=["import subprocess\n", "subprocess.run(['pip'])"])),
    "another guard": (wrong_install, changed(1, source=[f"if True or {GUARD}:\n", "    pass"])),
    "an else": (wrong_install, changed(1, source=[f"if {GUARD}:\n", "    pass\n", "else:\n", "    pass"])),
    "jax before it": (wrong_install, changed(1, source=["import jax\n", f"if {GUARD}:\n", "    pass"])),
    "later pip": (wrong_install, changed(2, source=["%pip install jax"])),
    "later shell": (wrong_install, changed(2, source=["!ls"])),
    "root": (absolute_paths, changed(2, source=["open('/content/data')"])),
    "home": (absolute_paths, changed(2, source=["open('~/data')"])),
    "drive": (absolute_paths, changed(2, source=["open(r'C:\\data')"])),
    "in prose": (absolute_paths, changed(0, source=["see /tmp/data"])),
    "not Python": (not_plain, changed(2, source=["1 +"])),
    "wide": (not_plain, changed(2, source=["#" * 121])),
    "many cells": (too_long, GOOD | {"cells": GOOD["cells"] * 9}),
}


def test_the_notebooks_are_found():
    assert [path.stem for path in NOTEBOOKS][:2] == ["01_quickstart", "02_sparse_attention"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_notebook_keeps_the_rule(rule, path):
    assert not rule(read(path))


@pytest.mark.parametrize("rule, notebook", VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_found(rule, notebook):
    assert len(rule(notebook)) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_what_is_allowed_is_not_complained_about(rule):
    assert not rule(GOOD)


def test_all_notebooks_name_one_repository():
    texts = [source(cell) for path in NOTEBOOKS for cell in read(path)["cells"]]
    named = [found for text in texts for found in re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)", text)]
    assert len(named) == 2 * len(NOTEBOOKS) and len(set(named)) == 1


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that a cell would run, in an empty folder."""
    ran: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    return ran


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_is_installed_where_the_library_is_there(path, commands, tmp_path):
    exec(code(read(path))[0], {})
    assert not commands and not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [(), ("numpy",)], ids=["with numpy", "without"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_library_is_installed_and_jax_stays_as_it_is(path, missing, commands, monkeypatch):
    hidden, find = ("glm5_jax", *missing), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    exec(code(read(path))[0], {})
    [[*pip, requirement]] = commands
    assert pip == [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
    assert re.match(r"glm5-jax\[\w+(,\w+)*\] @ git\+https://github\.com/", requirement)
    held = [f"{name}=={importlib.metadata.version(name)}" for name in KEPT if name not in missing]
    assert Path("constraints.txt").read_text(encoding="utf-8").split() == held


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, monkeypatch, tmp_path):
    # As a reader has it: one device and optimised code. The kernel is this Python, whatever the user has set up.
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "JUPYTER_PATH", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={tmp_path}", "--nbmake", "--nbmake-kernel=python3",
               "--nbmake-timeout=1200", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
