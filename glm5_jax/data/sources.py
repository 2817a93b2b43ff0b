"""Documents to train on: the packaged text, the Python standard library, files, seeded text; and how they are split.

Sources are sequences of documents. Those of files read a document when it is asked for, so that they may be larger
than memory, and travel to worker processes as a path.
"""

import abc
from collections.abc import Sequence
import dataclasses
import difflib
import hashlib
import importlib.resources
import json
import logging
import os
import pathlib
import sysconfig
from typing import Any, Callable, Mapping, overload

import grain
import numpy as np

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


class LazyDocuments(Sequence[Document], abc.ABC):
    """A sequence that makes each document when it is asked for; a slice is made at once."""

    @abc.abstractmethod
    def _read(self, index: int) -> Document:
        """Document `index`, which is there."""

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Document, ...]: ...

    def __getitem__(self, index: int | slice) -> Document | tuple[Document, ...]:
        places = range(len(self))[index]  # raises IndexError, and counts from the end, as a tuple does
        return self._read(places) if isinstance(places, int) else tuple(self._read(place) for place in places)


class TextFiles(LazyDocuments):
    """One document per file: `path` itself, or every file below it whose name ends in `suffix`, by relative path.

    Every file is read once when opened. Raises FileNotFoundError where there is none, OSError for one that cannot be
    read, ValueError for one that is empty or not UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str], suffix: str = ".txt"):
        self._root = pathlib.Path(path)
        if self._root.is_dir():
            self._names = sorted(file.relative_to(self._root).as_posix() for file in self._root.rglob(f"*{suffix}"))
        elif self._root.exists():
            self._root, self._names = self._root.parent, [self._root.name]
        else:
            raise FileNotFoundError(f"{path}: expected a text file or a folder of them, found neither")
        if not self._names:
            raise FileNotFoundError(f"{path}: expected files that end in {suffix}, found none")
        for index in range(len(self)):
            self._read(index)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, index: int) -> Document:
        file = self._root / self._names[index]
        text = _utf8(_bytes(file), str(file))
        if not text:
            raise ValueError(f"{file}: expected text, found an empty file")
        return Document(self._names[index], text)


class JsonLines(LazyDocuments):
    """One document per line of a JSONL file, from the fields `text` and, where given, `name`; blank lines are skipped.

    Without `name` a document is called `file:line`. Every line is parsed once when the file is opened. Raises OSError
    for a file that cannot be read, and ValueError, with the line's number, for an empty file, a line that is not a
    JSON object in UTF-8, and a field that is missing, empty or not a string.
    """

    def __init__(self, path: str | os.PathLike[str], *, text: str = "text", name: str | None = None):
        self._path, self._text, self._name = pathlib.Path(path), text, name
        places = []
        try:
            with open(self._path, "rb") as file:
                start = 0
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._parse(line, number)
                        places.append((number, start))
                    start += len(line)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if not places:
            raise ValueError(f"{path}: expected a JSON object per line, found an empty file")
        self._places = np.array(places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, index: int) -> Document:
        number, start = self._places[index].tolist()
        with open(self._path, "rb") as file:
            file.seek(start)
            return self._parse(file.readline(), number)

    def _parse(self, line: bytes, number: int) -> Document:
        place = f"{self._path}:{number}"
        return _from_json(line.rstrip(), place, self._text, self._name, f"{self._path.name}:{number}")


class ArrayRecords(LazyDocuments):
    """One document per record of ArrayRecord files, each a JSON object in UTF-8 with the fields of `JsonLines`.

    Without `name` a document is called `record:number`. The first record is read when opened, another when it is
    asked for. Raises OSError for a file that cannot be read, ValueError for one that is not an ArrayRecord file or
    holds no record, and for a record as `JsonLines` does for a line.
    """

    def __init__(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, text: str = "text",
                 name: str | None = None):
        files = [pathlib.Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        for file in files:
            try:
                with open(file, "rb"):
                    pass
            except OSError as error:
                raise _unreadable(file, error) from error
        self._place = ", ".join(map(str, files))
        self._text, self._name = text, name
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(file) for file in files])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self._place}: expected ArrayRecord files, found: {_first_line(error)}") from error
        if not len(self):
            raise ValueError(f"{self._place}: expected records, found none")
        self._read(0)

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int) -> Document:
        return _from_json(self._records[index], f"{self._place}, record {index}", self._text, self._name,
                          f"record:{index}")


class Synthetic(LazyDocuments):
    """`count` documents of made-up words, each a function of `seed` and its number: data of any size from nothing.

    Word frequencies follow Zipf's law and lengths a log-normal around `median_words`, so that packing and tokenising
    work as they do on text; there is nothing to learn but the words.
    """

    def __init__(self, count: int, *, seed: int = 0, median_words: int = 300):
        for field, value in (("count", count), ("median_words", median_words)):
            if value < 1:
                raise ValueError(f"{field}: expected at least 1, found {value}")
        self._count, self._seed, self._median_words = count, seed, median_words
        letters = np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, (2_000, 8), dtype=np.uint8)
        self._words = [bytes(word[:2 + number % 7]).decode("ascii") for number, word in enumerate(letters)]

    def __len__(self) -> int:
        return self._count

    def _read(self, index: int) -> Document:
        rng = np.random.default_rng([self._seed, index])
        count = max(1, round(self._median_words * rng.lognormal(sigma=1)))
        words = [self._words[place] for place in (rng.zipf(1.2, count) - 1) % len(self._words)]
        sentences = [" ".join(words[start:start + 12]).capitalize() + ".\n" for start in range(0, count, 12)]
        return Document(f"synthetic/{index}", "".join(sentences))


class Selection(LazyDocuments):
    """The documents at `indices` of another sequence, in that order."""

    def __init__(self, documents: Sequence[Document], indices: Sequence[int]):
        self._documents, self.indices = documents, tuple(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def _read(self, index: int) -> Document:
        return self._documents[self.indices[index]]


SOURCES: Mapping[str, Callable[[], tuple[Document, ...]]] = {"packaged": packaged_text, "stdlib": stdlib_text}
READERS: Mapping[str, Callable[[str], LazyDocuments]] = {
    ".txt": TextFiles, ".jsonl": JsonLines, ".array_record": ArrayRecords}


def load(name: str) -> Sequence[Document]:
    """Documents of the source `name`: a key of `SOURCES`, a file of a kind in `READERS`, or a folder of text files.

    Raises ValueError for another name, and what the reader raises.
    """
    if name in SOURCES:
        return SOURCES[name]()
    path = pathlib.Path(name).expanduser()
    reader = TextFiles if path.is_dir() else READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"data: expected one of {sorted(SOURCES)}, found {name!r}; "
                         f"nor is that a folder or a file that ends in one of {sorted(READERS)}")
    return reader(str(path))


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


def _bytes(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: pathlib.Path, error: OSError) -> OSError:
    return type(error)(f"{file}: expected a file that can be read, found: {error.strerror or error}")


def _utf8(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: expected UTF-8, found byte 0x{content[error.start]:02x} "
                         f"at offset {error.start}") from error


def _from_json(content: bytes, place: str, text: str, name: str | None, default_name: str) -> Document:
    try:
        record = json.loads(_utf8(content, place))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: expected a JSON object, found: {error.msg} at character {error.pos}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object, found {type(record).__name__}")
    return Document(_field(record, name, place) if name else default_name, _field(record, text, place))


def _field(record: Mapping[str, Any], field: str, place: str) -> str:
    if field not in record:
        near = difflib.get_close_matches(field, record, 1)
        raise ValueError(f"{place}: expected the field {field!r}, found {sorted(record)}"
                         + (f"; did you mean {near[0]!r}?" if near else ""))
    value = record[field]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place}: expected text in the field {field!r}, found {value!r:.50}")
    return value


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
