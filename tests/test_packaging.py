"""setup.cfg says what the house says: one list of dependencies, extras that stay optional, data files that exist."""

import ast
import configparser
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.test_floors import imports, read_sources

ROOT = Path(__file__).parents[1]
OWN = ("glm5_jax", "pallas_kernels")
CORE = {"jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "ml-collections", "absl-py", "einops",
        "numpy", "safetensors", "tokenizers", "tqdm"}
EXTRAS = {"test", "lint", "viz", "metrics", "wandb", "notebook", "aot", "parity", "tasks", "serve", "clients", "ray",
          "browser", "cuda13", "tpu"}
# Distributions whose import name is not their own name with underscores.
IMPORTED_AS = {"orbax-checkpoint": "orbax", "absl-py": "absl", "reasoning-gym": "reasoning_gym"}
# Modules that nobody needs without an extra: what it installs may stand at their top.
OF_AN_EXTRA = {"glm5_jax/serve/http.py": "serve", "glm5_jax/rl/remote.py": "serve", "glm5_jax/rl/worker.py": "serve",
               "glm5_jax/rl/task_client.py": "serve", "glm5_jax/rl/task_server.py": "serve",
               "glm5_jax/rl/ray_executor.py": "ray"}
# jax brings these along, and is nothing without them.
WITH_JAX = {"jaxlib", "ml_dtypes"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    """The requirements of one setup.cfg field; raises InvalidRequirement on a line that is none."""
    lines = (line.strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def import_names(wanted: list[Requirement]) -> set[str]:
    return {IMPORTED_AS.get(one.name, one.name.replace("-", "_")) for one in wanted}


def foreign_imports(source: str) -> Iterator[tuple[str, bool]]:
    """(top-level name, whether at module level) for each import that is neither ours nor the standard library's."""
    todo = [(node, True) for node in ast.parse(source).body]
    while todo:
        node, outside = todo.pop()
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for top in {name.split(".")[0] for name in names} - set(OWN) - sys.stdlib_module_names:
            yield top, outside
        outside = outside and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        todo += [(child, outside) for child in ast.iter_child_nodes(node)]


def undeclared(source: str, core: set[str], optional: set[str]) -> list[str]:
    """Imports that setup.cfg does not cover: at module level the core alone counts, in a function the extras too."""
    return [top for top, outside in foreign_imports(source)
            if top not in core and (outside or top not in optional)]


def test_core_is_the_one_list(setup):
    core = requirements(setup["options"]["install_requires"])
    assert {one.name for one in core} == CORE
    assert all(clause.operator == ">=" for one in core for clause in one.specifier)
    floors = {one.name: str(one.specifier) for one in core}
    assert (floors["jax"], floors["flax"]) == (">=0.7.2", ">=0.11.2")


def test_extras_parse_and_repeat_nothing_of_the_core(setup):
    extras = {name: requirements(text) for name, text in setup["options.extras_require"].items()}
    assert set(extras) == EXTRAS
    for name, wanted in extras.items():
        assert wanted, name
        assert not {one.name for one in wanted if not one.extras} & CORE, name
    assert {str(one) for one in extras["parity"]} == {"torch==2.13.0", "transformers==5.23.0"}


def test_every_import_is_declared_and_extras_stay_optional(setup):
    core = import_names(requirements(setup["options"]["install_requires"])) | WITH_JAX
    extras = {name: import_names(requirements(text)) for name, text in setup["options.extras_require"].items()}
    optional = set().union(*extras.values())
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
               for own in OWN for path in (ROOT / own).rglob("*.py")}
    assert OF_AN_EXTRA.keys() <= sources.keys()
    found = {path: undeclared(source, core | extras.get(OF_AN_EXTRA.get(path, ""), set()), optional)
             for path, source in sources.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_what_needs_an_extra_is_imported_by_commands_and_by_what_needs_it_too():
    sources = read_sources(ROOT)
    modules = {path.removesuffix(".py").replace("/", ".") for path in OF_AN_EXTRA}
    others = [name for name in sources if name not in modules and not name.endswith("__main__")]
    assert not [found.place for name in others for found in imports(name, sources) if found.of in modules]


@pytest.mark.parametrize("source, names", [
    ("import jax.numpy as jnp\nfrom . import mla\nimport json", []),
    ("import matplotlib.pyplot", ["matplotlib"]),
    ("def draw():\n    import matplotlib.pyplot", []),
    ("def draw():\n    from requests import get", ["requests"]),
    ("if True:\n    import torch", ["torch"]),
])
def test_an_undeclared_import_is_found(source, names):
    assert undeclared(source, {"jax"}, {"matplotlib"}) == names


def test_every_package_has_an_init_and_is_named(setup):
    include = setup["options.packages.find"]["include"].split()
    assert include == [f"{own}*" for own in OWN]
    folders = {path.parent for own in OWN for path in (ROOT / own).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_package_data_exists(setup):
    for package, patterns in setup["options.package_data"].items():
        for pattern in patterns.split():
            found = [path for path in (ROOT / package.replace(".", "/")).glob(pattern) if path.is_file()]
            assert found, f"[options.package_data] {package} = {pattern} matches no file"


def test_the_command_leads_to_main(setup):
    command, target = (part.strip() for part in setup["options.entry_points"]["console_scripts"].strip().split("="))
    module, function = target.split(":")
    assert command == "glm5-jax"
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_version_is_a_literal(setup):
    major, minor, patch = setup["metadata"]["version"].split(".")
    assert all(part.isdigit() for part in (major, minor, patch))


def test_every_file_the_metadata_names_exists(setup):
    assert (ROOT / setup["metadata"]["license_files"]).is_file()
    assert (ROOT / setup["metadata"]["long_description"].removeprefix("file: ")).is_file()


def test_the_build_stub_leaves_the_metadata_to_setup_cfg():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "setuptools.build_meta" in text
    assert "[project]" not in text
