"""Documents to train on: the packaged text and the Python standard library, and how they are split."""

import dataclasses
import hashlib
import importlib.resources
import json
import logging
import os
import pathlib
import sysconfig
from typing import Callable, Mapping, Sequence

# Not the library itself: tests, what pip installed, and compiled leftovers.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text that is never cut by a split; `name` identifies it."""

    name: str
    text: str


def packaged_text() -> tuple[Document, ...]:
    """The text that comes with this package: 71 topics of Python's documentation, 293 kB (PSF licence), by title."""
    assets = importlib.resources.files("glm5_jax.text") / "assets"
    lines = (assets / "python_topics.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    topics = [json.loads(line) for line in lines]
    return tuple(Document(topic["title"], topic["text"]) for topic in topics)


def stdlib_text(root: str | pathlib.Path | None = None) -> tuple[Document, ...]:
    """Source of the standard library of the running Python without its tests, one document per file, by path.

    It differs from one Python to the next: record `fingerprint` and the Python version beside a result. `root` reads
    another library directory. Files that are not UTF-8 are left out and counted in a warning; empty files are left
    out. Raises FileNotFoundError if the directory holds no source.
    """
    root = pathlib.Path(root or sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_STDLIB]  # os.walk then stays out of the others
        names += [(pathlib.Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]

    documents, unreadable = [], []
    for name in sorted(names):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            unreadable.append(name)
            continue
        if text:
            documents.append(Document(name, text))
    if unreadable:
        _log.warning("standard library: %d unreadable files left out of %d: %s",
                     len(unreadable), len(names), ", ".join(unreadable))
    if not documents:
        raise FileNotFoundError(f"{root}: expected the source of the standard library, found no .py file; "
                                f"use the source 'packaged'")
    return tuple(documents)


SOURCES: Mapping[str, Callable[[], tuple[Document, ...]]] = {"packaged": packaged_text, "stdlib": stdlib_text}


def load(name: str) -> tuple[Document, ...]:
    """Documents of the source `name`, a key of `SOURCES`; raises ValueError for another name."""
    if name not in SOURCES:
        raise ValueError(f"data: expected one of {sorted(SOURCES)}, found {name!r}")
    return SOURCES[name]()


def fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 (hex) over names, texts and order: equal if and only if the documents are."""
    content = json.dumps([[document.name, document.text] for document in documents])
    return hashlib.sha256(content.encode("ascii")).hexdigest()


def split(
    documents: Sequence[Document], held_out_fraction: float = 0.1, seed: int = 0,
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """(train, held_out) by whole documents, each in the given order, neither empty.

    In the order of a hash of seed and name, a document is held out if it still fits in `held_out_fraction` of all
    bytes; where not one fits, the first in that order is. Raises ValueError for fewer than two documents, a repeated
    name, or a fraction outside (0, 1).
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction: expected a number strictly between 0 and 1, found {held_out_fraction}")
    if len(documents) < 2:
        raise ValueError(f"documents: expected at least two, so that both sides get one; found {len(documents)}")
    order = sorted(documents, key=lambda d: (hashlib.sha256(f"{seed}:{d.name}".encode("utf-8")).digest(), d.name))
    for one, next_one in zip(order, order[1:]):
        if one.name == next_one.name:
            raise ValueError(f"documents: expected unique names, found {one.name!r} twice")
    budget = held_out_fraction * text_bytes(documents)
    held_out: set[str] = set()
    for document in order[:-1]:
        if (size := text_bytes([document])) <= budget:
            budget -= size
            held_out.add(document.name)
    held_out = held_out or {order[0].name}
    return (tuple(document for document in documents if document.name not in held_out),
            tuple(document for document in documents if document.name in held_out))


def text_bytes(documents: Sequence[Document]) -> int:
    """Bytes of all texts in UTF-8: the denominator of bits per byte."""
    return sum(len(document.text.encode("utf-8")) for document in documents)
