"""Imported files come first: each language's imports, rings, and the order against a truth of its own."""

import ast
import itertools
from pathlib import Path

from hypothesis import given, strategies as st
import pytest

from glm5_jax.data.import_order import imports, in_order

PYTHON = {
    "src/pkg/__init__.py": "from pkg.core import run\n",
    "src/pkg/core.py": "import json, os\nfrom . import shapes\nfrom .deep.leaf import Leaf\n",
    "src/pkg/shapes.py": "from pkg.deep import *\n",
    "src/pkg/json.py": "",
    "src/pkg/deep/__init__.py": "",
    "src/pkg/deep/leaf.py": "from ..json import dumps\nfrom ... import too_far\nfrom ....... import further\n",
    "src/pkg/broken.py": "def (:\n",
    "src/pkg/stub.pyi": "import pkg.shapes",
    "tests/test_core.py": "def test():\n    import pkg.core as core\n    import helper\n",
    "tests/helper.py": "import requests\n",
}
C = {
    "main.c": '#include <stdio.h>\n #  include "lib/list.h"\n#include "missing.h"\n',
    "lib/list.c": '#include "list.h"\n#include "../main.h"\n',
    "lib/list.h": '#include <types.hpp>\n',
    "include/types.hpp": "", "main.h": "// #include nothing\n",
}
SCRIPT = {
    "app/index.ts": "import React from 'react';\nimport { a, b } from './a';\nexport * from \"../lib\";\n",
    "app/a.tsx": "const c = require('./c.js'); const d = await import('./d');",
    "app/c.ts": "import './style.css'", "app/d/index.js": "", "lib/index.ts": "import x from './d.json'",
}
GO = {
    "go.mod": "module example.org/tool\n\ngo 1.22\n",
    "main.go": 'package main\nimport (\n\t"fmt"\n\tname "example.org/tool/inner/deep"\n)\n',
    "inner/deep/a.go": 'package deep\nimport "example.org/tool"\n', "inner/deep/b.go": "package deep\n",
    "inner/deep/a_test.go": "package deep\n", "elsewhere/deep/c.go": 'import "example.org/toolbox/inner/deep"\n',
}
JAVA = {
    "src/main/java/org/one/Main.java": "import org.one.tools.*;\nimport static org.two.Deep.Inner.make;\n"
                                       "import java.util.List;",
    "src/main/java/org/one/tools/A.java": "", "src/main/java/org/one/tools/B.java": "import org.one.Main;",
    "src/main/java/org/two/Deep.java": "",
}
RUST = {
    "src/main.rs": "mod parse;\npub(crate) mod tree;\nuse crate::tree::node::Node;\nuse std::fmt;\n",
    "src/parse.rs": "use super::tree;\nmod tokens;\n", "src/parse/tokens.rs": "", "src/tree/mod.rs": "mod node;",
    "src/tree/node.rs": "use crate::missing::Thing;\n",
}


def test_python():
    assert imports(PYTHON) == {
        "src/pkg/__init__.py": ["src/pkg/core.py"],
        "src/pkg/core.py": ["src/pkg/deep/leaf.py", "src/pkg/shapes.py"],  # and not the json beside it
        "src/pkg/shapes.py": ["src/pkg/deep/__init__.py"],
        "src/pkg/json.py": [], "src/pkg/deep/__init__.py": [],
        "src/pkg/deep/leaf.py": ["src/pkg/json.py"],
        "src/pkg/broken.py": [],
        "src/pkg/stub.pyi": ["src/pkg/shapes.py"],
        "tests/test_core.py": ["src/pkg/core.py", "tests/helper.py"],
        "tests/helper.py": [],
    }


@pytest.mark.parametrize("files, expected", [
    (C, {"main.c": ["lib/list.h"], "lib/list.c": ["lib/list.h", "main.h"], "lib/list.h": ["include/types.hpp"]}),
    (SCRIPT, {"app/index.ts": ["app/a.tsx", "lib/index.ts"], "app/a.tsx": ["app/c.ts", "app/d/index.js"]}),
    (GO, {"main.go": ["inner/deep/a.go", "inner/deep/b.go"], "inner/deep/a.go": ["main.go"]}),
    (JAVA, {"src/main/java/org/one/Main.java": ["src/main/java/org/one/tools/A.java",
                                                "src/main/java/org/one/tools/B.java",
                                                "src/main/java/org/two/Deep.java"],
            "src/main/java/org/one/tools/B.java": ["src/main/java/org/one/Main.java"]}),
    (RUST, {"src/main.rs": ["src/parse.rs", "src/tree/mod.rs", "src/tree/node.rs"],
            "src/parse.rs": ["src/parse/tokens.rs", "src/tree/mod.rs"], "src/tree/mod.rs": ["src/tree/node.rs"]}),
])
def test_other_languages(files, expected):
    assert {path: found for path, found in imports(files).items() if found} == expected


def test_order_written_out():
    assert in_order({"README.md": "import a", "a.py": "import c, b", "b.py": "", "c.py": "import b"}) == [
        "README.md", "b.py", "c.py", "a.py"]
    assert in_order({}) == []


@given(st.integers(1, 7).flatmap(lambda count: st.tuples(
    st.just(count), st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))), st.randoms())))
def test_what_is_imported_comes_first_unless_it_imports_back(graph):
    count, edges, random = graph
    files = {f"m{i}.py": "\n".join(f"import m{j}" for a, j in sorted(edges) if a == i) for i in range(count)}
    reach = {(i, j): (i, j) in edges for i, j in itertools.product(range(count), repeat=2)}
    for k, i, j in itertools.product(range(count), repeat=3):
        reach[i, j] |= reach[i, k] and reach[k, j]
    order = in_order(files)
    place = {int(path[1:-3]): index for index, path in enumerate(order)}
    assert sorted(place) == list(range(count))
    assert all(place[j] < place[i] for i, j in edges if not reach[j, i])
    shuffled = list(files)
    random.shuffle(shuffled)
    assert in_order({path: files[path] for path in shuffled}) == order


def test_long_chains_and_deep_nesting_are_no_trouble():
    chain = {f"m{i:04}.py": f"import m{i + 1:04}" for i in range(3000)}
    assert in_order(chain) == sorted(chain, reverse=True)
    for text in ("(" * 5000, "-" * 20000 + "1", "x = " + "[" * 300 + "]" * 300, "\0", "1" * 5000):
        assert imports({"a.py": text}) == {"a.py": []}


def test_a_warning_in_what_is_read_stays_there(recwarn):
    assert imports({"a.py": "x = '\\d'\nimport b\n1 is 1", "b.py": ""})["a.py"] == ["b.py"]
    assert not recwarn.list


def test_own_package_is_ordered_as_the_floors_say():
    """Of this very library, no file stands before one that it imports at the top (there are no rings in it)."""
    root = Path(__file__).parents[2]
    files = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
             for path in sorted((root / "glm5_jax").rglob("*.py"))}
    order = in_order(files)
    place = {path: index for index, path in enumerate(order)}
    edges = [(path, node.module.replace(".", "/") + ".py") for path, text in files.items()
             for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [(path, imported) for path, imported in edges if imported in files]
    assert len(ours) > 50
    assert all(place[imported] < place[path] for path, imported in ours)
