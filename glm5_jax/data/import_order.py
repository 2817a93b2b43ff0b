"""Source files in an order in which what is imported comes first, read off the text without running or building it.

An approximation, and the same on every machine: Python by its syntax tree, C, C++, JavaScript, TypeScript, Go, Java and
Rust by the import lines alone. Only files that are given can be imported; a name that fits none is somebody else's.
Imports made at run time, by build systems, path aliases, or without a word (one Java package) are not seen.
"""

import ast
import collections
import dataclasses
import posixpath
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping

SCRIPT_ENDS = ("", ".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", "/index.ts", "/index.tsx", "/index.js")
SOURCE_ROOTS = ("", "src", "lib", "include", "python")

C_IMPORT = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^">\n]+)[>"]', re.M)
SCRIPT_IMPORT = re.compile(r'''(?:\bfrom|\bimport|\brequire\s*\(|\bimport\s*\()\s*["'](\.[^"'\n]*)["']''')
GO_IMPORT = re.compile(r'^import[ \t]*(?:\(([^)]{,20000})\)|[\w.]*[ \t]*("[^"\n]+"))', re.M)
GO_MODULE = re.compile(r"^module\s+(\S+)", re.M)
JAVA_IMPORT = re.compile(r"^[ \t]*import\s+(?:static\s+)?([\w.]+)(\.\*)?\s*;", re.M)
RUST_MODULE = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?\s+)?mod\s+(\w+)\s*;", re.M)
RUST_USE = re.compile(r"\buse\s+((?:crate|super|self)(?:::\w+)+)")


@dataclasses.dataclass(frozen=True)
class Tree:
    """The files of a repository, as the readers of imports look them up."""

    texts: Mapping[str, str]         # by path
    folders: Mapping[str, set[str]]  # the paths directly in a folder
    names: Mapping[str, set[str]]    # the paths that end in a file name

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> "Tree":
        folders, names = collections.defaultdict(set), collections.defaultdict(set)
        for path in texts:
            folder, name = posixpath.split(path)
            folders[folder].add(path)
            names[name].add(path)
        return cls(texts, dict(folders), dict(names))


def in_order(files: Mapping[str, str]) -> list[str]:
    """The paths of {path: text}, each behind the files it imports; among equals by path.

    Files that import one another in a ring stand together behind what the ring imports: the walk goes by path, and does
    not follow an import back into a file it is still busy with.
    """
    graph = imports(files)
    order: list[str] = []
    seen: set[str] = set()
    for root in sorted(files):
        stack = [(root, iter(graph[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            path, rest = stack[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                order.append(path)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(graph[following])))
    return order


def imports(files: Mapping[str, str]) -> dict[str, list[str]]:
    """For each path of {path: text} the other paths that it imports, sorted; none where the language is not known."""
    tree = Tree.of(files)
    found = {}
    for path in files:
        reader = READERS.get(posixpath.splitext(path)[1])
        found[path] = sorted(set(reader(path, tree)) - {path}) if reader else []
    return found


def _python(path: str, tree: Tree) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the text that is read, not about us
            syntax = ast.parse(tree.texts[path])
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # another Python's, or none
        return
    # What a name begins at: any folder above that is no package itself, the usual roots first.
    folders = [folder for folder in _above(path) if posixpath.join(folder, "__init__.py") not in tree.texts]
    roots = dict.fromkeys((*SOURCE_ROOTS, *folders))
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(alias.name, roots, tree)
        elif isinstance(node, ast.ImportFrom):
            starts = roots if not node.level else _above(path)[-node.level:1 - node.level or None]
            prefix = node.module + "." if node.module else ""
            for alias in node.names:
                found = list(_module(prefix + alias.name, starts, tree))
                yield from found or _module(node.module or "__init__", starts, tree)


def _module(name: str, roots: Collection[str], tree: Tree) -> Iterator[str]:
    stem = name.replace(".", "/")
    yield from _first((posixpath.join(root, stem + end) for root in roots for end in (".py", "/__init__.py", ".pyi")),
                      tree)


def _c(path: str, tree: Tree) -> Iterator[str]:
    for name in C_IMPORT.findall(tree.texts[path]):
        yield from _first((_join(root, name) for root in (posixpath.dirname(path), *SOURCE_ROOTS)), tree)


def _script(path: str, tree: Tree) -> Iterator[str]:
    for name in SCRIPT_IMPORT.findall(tree.texts[path]):
        target = _join(posixpath.dirname(path), name)
        # TypeScript names the file that it will be compiled to.
        stems = dict.fromkeys((target, re.sub(r"\.[cm]?jsx?$", "", target)))
        yield from _first((stem + end for stem in stems for end in SCRIPT_ENDS), tree)


def _go(path: str, tree: Tree) -> Iterator[str]:
    for folder in reversed(_above(path)):
        if module := GO_MODULE.search(tree.texts.get(posixpath.join(folder, "go.mod"), "")):
            break
    else:
        return
    for block, single in GO_IMPORT.findall(tree.texts[path]):
        for name in re.findall(r'"([^"\n]+)"', block or single):
            if name == module[1] or name.startswith(module[1] + "/"):
                package = _join(folder, name[len(module[1]) + 1:])
                yield from (other for other in tree.folders.get(package, ())
                            if other.endswith(".go") and not other.endswith("_test.go"))


def _java(path: str, tree: Tree) -> Iterator[str]:
    for name, whole in JAVA_IMPORT.findall(tree.texts[path]):
        parts = name.split(".")
        if whole:
            package = "/" + "/".join(parts)
            yield from (other for folder in tree.folders if ("/" + folder).endswith(package)
                        for other in tree.folders[folder] if other.endswith(".java"))
        for stop in range(len(parts), 0, -1):  # the last parts may be a nested class or a static member
            end = "/".join(parts[:stop]) + ".java"
            if found := [other for other in tree.names.get(parts[stop - 1] + ".java", ())
                         if ("/" + other).endswith("/" + end)]:
                yield min(found)
                break


def _rust(path: str, tree: Tree) -> Iterator[str]:
    folder, name = posixpath.split(path)
    own = folder if name in ("lib.rs", "main.rs", "mod.rs") else posixpath.join(folder, name.removesuffix(".rs"))
    above = _above(path)
    crate = next((each for each in reversed(above) if posixpath.basename(each) == "src"), above[0])
    start = {"crate": crate, "self": own, "super": posixpath.dirname(own)}
    for name in RUST_MODULE.findall(tree.texts[path]):
        yield from _rust_file(own, [name], tree)
    for use in RUST_USE.findall(tree.texts[path]):
        first, *rest = use.split("::")
        yield from _rust_file(start[first], rest, tree)


def _rust_file(folder: str, names: list[str], tree: Tree) -> Iterator[str]:
    """The file of the longest path of modules: what follows it are items inside."""
    stems = (_join(folder, "/".join(names[:stop])) for stop in range(len(names), 0, -1))
    yield from _first((stem + end for stem in stems for end in (".rs", "/mod.rs")), tree)


def _above(path: str) -> list[str]:
    """The folders that a path is in, the outermost (`""`) first."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(len(parts) + 1)]


def _join(folder: str, name: str) -> str:
    """A normal path, without `./` and `../`."""
    path = posixpath.normpath(posixpath.join(folder, name))
    return "" if path == "." else path


def _first(candidates: Iterator[str], tree: Tree) -> Iterator[str]:
    if found := next((candidate for candidate in candidates if candidate in tree.texts), None):
        yield found


Reader = Callable[[str, Tree], Iterator[str]]
READERS: Mapping[str, Reader] = (
    {".py": _python, ".pyi": _python, ".go": _go, ".java": _java, ".rs": _rust}
    | dict.fromkeys((".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh"), _c)
    | dict.fromkeys((".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx"), _script)
)
