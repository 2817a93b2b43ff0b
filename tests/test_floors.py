"""The house rules of CONTRIBUTING.md, held over the source: floors, cycles, deferred imports, names, sizes, no jax.

Each rule is a function from {module name: source} to a list of complaints. It is applied to this repository, and to a
few lines that break it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("glm5_jax", "pallas_kernels")
FLOORS = {
    0: ["pallas_kernels"],
    1: ["glm5_jax.records", "glm5_jax.core", "glm5_jax.text"],
    2: ["glm5_jax.model", "glm5_jax.losses", "glm5_jax.optim", "glm5_jax.data", "glm5_jax.envs"],
    3: ["glm5_jax.checkpoint", "glm5_jax.infer"],
    4: ["glm5_jax.train", "glm5_jax.serve", "glm5_jax.rewards"],
    5: ["glm5_jax.scale", "glm5_jax.evals", "glm5_jax.rl"],
    6: ["glm5_jax.job", "glm5_jax.posttrain", "glm5_jax.pipeline", "glm5_jax.agent", "glm5_jax.__main__"],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# The command line hands a job over to what runs it.
SIDEWAYS = {("glm5_jax.__main__", "glm5_jax.job"), ("glm5_jax.__main__", "glm5_jax.pipeline"),
            ("glm5_jax.__main__", "glm5_jax.agent"), ("glm5_jax.pipeline", "glm5_jax.job"),
            ("glm5_jax.pipeline", "glm5_jax.posttrain"), ("glm5_jax.posttrain", "glm5_jax.job")}
# The lazy table of public names: above every floor, so that nothing below may import it.
TOP = "glm5_jax"
CONFIG_READERS = {"glm5_jax.job", "glm5_jax.__main__"}
JAX_FREE = ("glm5_jax.text", "glm5_jax.envs", "glm5_jax.records")
JAX_FAMILY = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex")
VAGUE = {"utils", "util", "common", "misc", "helpers", "helper"}
BUDGET, KERNEL_BUDGET, MODEL_BUDGET = 400, 700, 2_500

Sources = dict[str, str]


@dataclass(frozen=True)
class Import:
    """One import of a module: by whom, on which line, of what, and whether it waits inside a function."""

    by: str
    line: int
    of: str
    deferred: bool

    @property
    def place(self) -> str:
        return f"{self.by}:{self.line}"


def read_sources(root: Path) -> Sources:
    """{dotted name: text} of every module below `root` that is ours; a package goes by its own name."""
    found = {}
    for path in sorted(path for own in OWN for path in (root / own).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def is_package(name: str, sources: Sources) -> bool:
    return any(other.startswith(name + ".") for other in sources)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room(name: str) -> str:
    """The unit that has a floor: pallas_kernels as a whole, below glm5_jax its second level."""
    parts = name.split(".")
    return parts[0] if parts[0] == "pallas_kernels" else ".".join(parts[:2])


def imports(name: str, sources: Sources) -> Iterator[Import]:
    """Every import of the module, ours and others', relative ones resolved, in functions too."""
    base = name if is_package(name, sources) else name.rpartition(".")[0]
    todo = [(node, False) for node in ast.parse(sources[name]).body]
    while todo:
        node, deferred = todo.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, node.lineno, alias.name, deferred)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = base.split(".")[:len(base.split(".")) - node.level + 1]
                origin = ".".join(above + ([origin] if origin else []))
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield Import(name, node.lineno, full if full in sources else origin, deferred)
        deferred = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        todo += [(child, deferred) for child in ast.iter_child_nodes(node)]


def own_imports(sources: Sources) -> list[Import]:
    return [found for name in sources for found in imports(name, sources) if found.of.split(".")[0] in OWN]


def wrong_floors(sources: Sources) -> list[str]:
    """Rooms without a floor, and imports that go up, sideways, or to the lazy table."""
    complaints = [f"{name}: give {room(name)} a floor here and in CONTRIBUTING.md"
                  for name in sources if name != TOP and room(name) not in FLOOR_OF]
    for found in own_imports(sources):
        here, there = room(found.by), room(found.of)
        if found.by == TOP:
            complaints.append(f"{found.place} imports {found.of}: only the lazy table of names may load a package")
        elif there == TOP:
            complaints.append(f"{found.place} imports {found.of}: name the room, not the table above all floors")
        elif here != there and here in FLOOR_OF and (here, there) not in SIDEWAYS:
            if there not in FLOOR_OF:
                complaints.append(f"{found.place} imports {found.of}, which has no floor")
            elif FLOOR_OF[there] >= FLOOR_OF[here]:
                complaints.append(f"{found.place} imports {found.of}: floor {FLOOR_OF[here]} may import lower floors, "
                                  f"and that is floor {FLOOR_OF[there]}")
    return complaints


def cycles(sources: Sources) -> list[str]:
    """The import cycles between modules, one complaint for each that a depth-first walk meets."""
    graph: dict[str, list[str]] = {name: [] for name in sources}
    for found in own_imports(sources):
        if found.of in graph and found.of != found.by:
            graph[found.by].append(found.of)
    complaints, done = [], set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            complaints.append("cycle: " + " -> ".join(path[path.index(name):] + [name]))
        elif name not in done:
            for other in graph[name]:
                walk(other, path + [name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return complaints


def deferred_own_imports(sources: Sources) -> list[str]:
    """Own modules imported inside a function, or by a call, anywhere but in the lazy table."""
    complaints = [f"{found.place} imports {found.of} inside a function: move it to the top"
                  for found in own_imports(sources) if found.deferred]
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if name != TOP and isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in ("import_module", "__import__"):
                    complaints.append(f"{name}:{node.lineno} imports by a call: write an import statement")
    return complaints


def vague_names(sources: Sources) -> list[str]:
    return [f"{name}: say what it holds" for name in sources if VAGUE & set(name.split("."))]


def over_budget(sources: Sources) -> list[str]:
    """Modules longer than 400 lines (a kernel 700), and a model/ longer than 2,500 in all."""
    lines = {name: len(text.splitlines()) for name, text in sources.items()}
    complaints = []
    for name, count in lines.items():
        budget = KERNEL_BUDGET if within(name, "pallas_kernels") else BUDGET
        if count > budget:
            complaints.append(f"{name}: {count} lines, {budget} are the ceiling: give its second idea a room")
    model = sum(count for name, count in lines.items() if within(name, "glm5_jax.model"))
    if model > MODEL_BUDGET:
        complaints.append(f"glm5_jax.model: {model} lines in all, {MODEL_BUDGET} are the ceiling")
    return complaints


def config_dicts(sources: Sources) -> list[str]:
    """ml_collections below the two modules that turn a config file into dataclasses."""
    return [f"{found.place} imports {found.of}: the library takes dataclasses" for name in sources
            for found in imports(name, sources) if within(found.of, "ml_collections") and name not in CONFIG_READERS]


def jax_in_free_rooms(sources: Sources) -> list[str]:
    """jax and what loads it, named anywhere in a room that promises to do without."""
    return [f"{found.place} imports {found.of}: {room(name)} does without jax" for name in sources
            if room(name) in JAX_FREE for found in imports(name, sources) if found.of.split(".")[0] in JAX_FAMILY]


def kernels_lean(sources: Sources) -> list[str]:
    """Anything but jax, numpy and the standard library imported by pallas_kernels: it can be borrowed alone."""
    allowed = {"jax", "jaxlib", "numpy", "pallas_kernels"} | sys.stdlib_module_names
    return [f"{found.place} imports {found.of}: pallas_kernels stands on jax alone" for name in sources
            if within(name, "pallas_kernels") for found in imports(name, sources)
            if found.of.split(".")[0] not in allowed]


def heavy_table(sources: Sources) -> list[str]:
    """Anything but the standard library imported by glm5_jax/__init__.py."""
    if TOP not in sources:
        return ["glm5_jax/__init__.py is missing: it holds the lazy table of public names"]
    return [f"{found.place} imports {found.of}: importing glm5_jax.text would load it too"
            for found in imports(TOP, sources) if found.of.split(".")[0] not in sys.stdlib_module_names]


def import_without_jax(root: Path, names: list[str]) -> str:
    """Imports the modules in a fresh Python where jax and its family cannot load; returns the error, or ''."""
    block = f"import sys; sys.modules.update(dict.fromkeys({JAX_FAMILY}))"
    program = "\n".join([block] + [f"import {name}" for name in names])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    return done.stderr if done.returncode else ""


RULES = [wrong_floors, cycles, deferred_own_imports, vague_names, over_budget, config_dicts, jax_in_free_rooms,
         kernels_lean, heavy_table]
TABLE = {TOP: "import importlib\n"}

TYPES_ALONE = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from glm5_jax.model.config import ModelConfig
"""
IN_A_METHOD = """
class Trainer:
    async def fit(self):
        if self:
            from . import step
"""
RING = {"glm5_jax.core.a": "from glm5_jax.core import b", "glm5_jax.core.b": "from glm5_jax.core.c import name",
        "glm5_jax.core.c": "from . import a"}
VIOLATIONS = {
    "up": (wrong_floors, {"glm5_jax.losses.token": "from glm5_jax.train import loop"}),
    "up, relative": (wrong_floors, {"glm5_jax.losses.token": "from ..train.loop import fit"}),
    "up, for types alone": (wrong_floors, {"glm5_jax.core.mesh": TYPES_ALONE}),
    "sideways": (wrong_floors, {"glm5_jax.optim.muon_split": "import glm5_jax.losses.token"}),
    "evals to rl": (wrong_floors, {"glm5_jax.evals.harness": "from glm5_jax.rl.ledger import Ledger"}),
    "kernels to library": (wrong_floors, {"pallas_kernels.blocks": "from glm5_jax.core import mesh"}),
    "the table": (wrong_floors, {"glm5_jax.train.loop": "from glm5_jax import forward"}),
    "the table by name": (wrong_floors, {"glm5_jax.train.loop": "import glm5_jax"}),
    "eager table": (wrong_floors, {TOP: "from glm5_jax.model.config import ModelConfig"}),
    "no floor": (wrong_floors, {"glm5_jax.extras.thing": ""}),
    "ring of three": (cycles, RING),
    "deferred": (deferred_own_imports, {"glm5_jax.train.loop": "def fit():\n    from glm5_jax.core import mesh"}),
    "deferred, relative": (deferred_own_imports, {"glm5_jax.train.loop": IN_A_METHOD}),
    "by a call": (deferred_own_imports, {"glm5_jax.train.loop": "import importlib\nimportlib.import_module('json')"}),
    "vague module": (vague_names, {"glm5_jax.core.utils": ""}),
    "vague package": (vague_names, {"glm5_jax.common.shapes": ""}),
    "long module": (over_budget, {"glm5_jax.core.mesh": "\n" * 401}),
    "long kernel": (over_budget, {"pallas_kernels.sparse_mla.pallas_tpu": "\n" * 701}),
    "long model": (over_budget, {f"glm5_jax.model.part{i}": "\n" * 358 for i in range(7)}),
    "config": (config_dicts, {"glm5_jax.train.loop": "from ml_collections import ConfigDict"}),
    "config in a function": (config_dicts, {"glm5_jax.optim.partition": "def f():\n    import ml_collections.abc"}),
    "jax": (jax_in_free_rooms, {"glm5_jax.text.chat": "import jax.numpy as jnp"}),
    "jax in a function": (jax_in_free_rooms, {"glm5_jax.envs.base": "def f():\n    from flax import struct"}),
    "flax in a kernel": (kernels_lean, {"pallas_kernels.blocks": "from flax import struct"}),
    "heavy table": (heavy_table, {TOP: "import numpy"}),
    "no table": (heavy_table, {}),
}

ALLOWED = TABLE | {
    "pallas_kernels": "",
    "pallas_kernels.dispatch": "import jax\n",
    "pallas_kernels.sparse_mla.api": "from pallas_kernels.sparse_mla.reference import mla\nfrom .. import dispatch\n",
    "pallas_kernels.sparse_mla.reference": "\n" * 700,
    "glm5_jax.core.params": "import jax\n" + "\n" * 399,
    "glm5_jax.text.tokenizer": "import json\n",
    "glm5_jax.data.packing": "from glm5_jax.text.tokenizer import load\nfrom ..core import params\n",
    "glm5_jax.data.sft": "from glm5_jax.data import packing\n",
    "glm5_jax.core.metrics": "def writer():\n    import tensorboardX\n",
    "glm5_jax.job": "import ml_collections\nimport glm5_jax.data.sft\n",
    "glm5_jax.__main__": "from glm5_jax.pipeline import main\nfrom ml_collections import config_flags\n",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule):
    assert not rule(read_sources(ROOT))


@pytest.mark.parametrize("rule, sources", VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_found(rule, sources):
    assert len(rule(sources)) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_what_is_allowed_is_not_complained_about(rule):
    assert not rule(ALLOWED)


def test_every_module_is_read(tmp_path):
    for path in ("glm5_jax/__init__.py", "glm5_jax/model/mla.py", "pallas_kernels/sparse_mla/api.py", "tests/other.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"# {path}\n", encoding="utf-8")
    assert list(read_sources(tmp_path)) == ["glm5_jax", "glm5_jax.model.mla", "pallas_kernels.sparse_mla.api"]
    assert "glm5_jax.core.params" in read_sources(ROOT)


def test_text_envs_and_records_import_without_jax():
    names = [TOP] + [name for name in read_sources(ROOT) if room(name) in JAX_FREE]
    assert "glm5_jax.text" in names
    assert not import_without_jax(ROOT, names)


@pytest.mark.parametrize("text, error", [("import jax", "jax"), ("import orbax", "orbax"), ("import re", "")])
def test_a_module_that_loads_jax_is_found(tmp_path, text, error):
    (tmp_path / "roommate.py").write_text(text, encoding="utf-8")
    found = import_without_jax(tmp_path, ["roommate"])
    assert error in found if error else not found
