"""A git repository as one long sequence: its files, the imported ones first, then commits, issues and pull requests.

    repository = read(path, commits=history(path, count=8))
    parts = repository.files + repository.commits + discussions("issues.json")
    story = assemble(tokenizer, parts, 131_072)
    story.ids                               # whole parts, and the end of the document
    story.left_out, repository.skipped      # what it does not hold

Everything is read from the objects of the repository, by commands of git that run nothing the repository names: no
hook, filter, diff program, pager, signature check or transport. The working tree is never touched. GLM-5 report,
section 2.3.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm5_jax.data.import_order import in_order
from glm5_jax.text.tokenizer import Tokenizer

LOCK_FILES = frozenset({"package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "Cargo.lock",
                        "poetry.lock", "uv.lock", "Pipfile.lock", "Gemfile.lock", "composer.lock", "go.sum",
                        "flake.lock"})
GENERATED_NAME = re.compile(r"(\.min\.(js|css)|\.(js|css)\.map|_pb2(_grpc)?\.pyi?|\.pb\.(go|cc|h))$")
GENERATED_TEXT = re.compile(r"@generated\b|\b(auto-?|code )generated\b|\bgenerated (by|from)\b.{,200}"
                            r"\bdo not (edit|modify)|\bdo not (edit|modify)\b.{,200}\bgenerated", re.I | re.S)
GENERATED_WITHIN = 1000  # characters at the start of a file, where its generator signs
LONGEST_LINE = 5000
KINDS = {"issue": "issue", "pull_request": "pull request"}

# What a repository's own configuration could start, and these commands would otherwise look at.
SETTINGS = ("core.hooksPath=/dev/null", "core.fsmonitor=false", "core.attributesFile=/dev/null", "core.pager=cat",
            "diff.external=", "log.showSignature=false", "protocol.allow=never",
            # Others' repositories may be read, since nothing of theirs is run.
            "safe.directory=*")


class RepositoryError(ValueError):
    """A repository, a revision or a file of discussions that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of a repository's story."""

    role: str                     # file, commit, issue, pull request
    name: str                     # a path, a commit's hash, #number
    text: str
    touches: tuple[str, ...] = ()  # the paths that a commit changes

    def rendered(self) -> str:
        """The text under one line that names it, and ended by a line end."""
        return f"=== {self.role} {self.name}\n{self.text.removesuffix(chr(10))}\n"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file, or a file's part of a commit, that is not worth reading."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Repository:
    """What was read: files with the imported before those that import them, commits in the order asked for."""

    files: tuple[Part, ...]
    commits: tuple[Part, ...]
    skipped: tuple[Skipped, ...]

    def reasons(self) -> dict[str, int]:
        """How many were skipped for each reason."""
        return dict(collections.Counter(each.reason for each in self.skipped))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part in tokens."""

    role: str
    name: str
    tokens: int  # how many
    start: int   # index of the first; -1 where it is left out


@dataclasses.dataclass(frozen=True)
class Story:
    """One document of a repository."""

    ids: np.ndarray               # int32 [tokens], ended by `<|endoftext|>`
    pieces: tuple[Piece, ...]     # in order and without gaps
    left_out: tuple[Piece, ...]   # what the length had no room for


def read(path: str | os.PathLike[str], *, revision: str = "HEAD", commits: Sequence[str] = (),
         max_file_bytes: int = 200_000) -> Repository:
    """The files at a revision, and commits (each its message and its difference to its first parent).

    `path` is the top folder of a clone, or a bare repository. Files in the order of `import_order`. Skipped, with the
    reason: binary, empty, generated (a known name, or a generator's note at the start), large (above `max_file_bytes`),
    not UTF-8, with a line above 5,000 characters, symbolic links, submodules; of commits the files that are generated
    by name, and large differences (in the others, bytes that are not UTF-8 become U+FFFD). Raises RepositoryError for
    what is no repository or no commit of it, and where objects are missing (a partial clone), FileNotFoundError
    without git.
    """
    git_dir = _git_dir(path)
    texts, skipped = _files(git_dir, _commit_hash(git_dir, revision), max_file_bytes)
    told = []
    for commit in commits:
        part, without = _commit(git_dir, _commit_hash(git_dir, commit), max_file_bytes)
        told.append(part)
        skipped += without
    return Repository(tuple(Part("file", name, texts[name]) for name in in_order(texts)), tuple(told), tuple(skipped))


def history(path: str | os.PathLike[str], *, revision: str = "HEAD", count: int) -> tuple[str, ...]:
    """The hashes of the last `count` commits up to a revision, along first parents, the oldest first.

    Raises RepositoryError as `read`, ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 commit, found {count}")
    git_dir = _git_dir(path)
    start = _commit_hash(git_dir, revision)
    return tuple(reversed(_git(git_dir, "rev-list", "--first-parent", f"--max-count={count}", start).decode().split()))


def discussions(path: str | os.PathLike[str]) -> tuple[Part, ...]:
    """Issues and pull requests of a JSON file: a list of, or one,

        {"kind": "issue" or "pull_request", "number": 7, "title": "...", "body": "...",
         "comments": [{"author": "...", "body": "..."}]}

    of which body, comments and author may be missing or null, and other keys are left alone. Raises RepositoryError
    naming the file, the entry and the field.
    """
    try:
        entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RepositoryError(f"{path}: expected JSON in UTF-8, found: {error}") from error
    entries = entries if isinstance(entries, list) else [entries]
    return tuple(_discussion(entry, f"{path}: [{index}]") for index, entry in enumerate(entries))


def assemble(tokenizer: Tokenizer, parts: Sequence[Part], length: int) -> Story:
    """The parts, in the given order, in one document of at most `length` tokens.

    A part is in it whole, or is left out and reported. Where not all fit, room goes first to commits, issues and pull
    requests, then to the files that these commits touch, then to the other files, each in the given order; a part
    that is too long for what is left makes way for the next. Raises ValueError if not one fits.
    """
    ids = [tokenizer.encode(part.rendered()) for part in parts]
    touched = {path for part in parts for path in part.touches}
    ranks = [0 if part.role != "file" else 1 if part.name in touched else 2 for part in parts]
    room = length - 1  # for the end of the document
    chosen = set()
    for index in sorted(range(len(parts)), key=ranks.__getitem__):
        if len(ids[index]) <= room:
            room -= len(ids[index])
            chosen.add(index)
    if not chosen:
        raise ValueError(f"length: expected room for one of {len(parts)} parts, the shortest of which has "
                         f"{min(map(len, ids), default=0)} tokens and an end, found {length}")
    pieces, left_out, start = [], [], 0
    for index, part in enumerate(parts):
        if index in chosen:
            pieces.append(Piece(part.role, part.name, len(ids[index]), start))
            start += len(ids[index])
        else:
            left_out.append(Piece(part.role, part.name, len(ids[index]), -1))
    whole = [id for index in sorted(chosen) for id in ids[index]] + [tokenizer.eos_id]
    return Story(np.array(whole, np.int32), tuple(pieces), tuple(left_out))


def _git(folder: str | os.PathLike[str], *arguments: str, stdin: bytes = b"") -> bytes:
    """The output of a git command in a folder; raises RepositoryError with git's own words."""
    settings = [word for setting in SETTINGS for word in ("-c", setting)]
    # From the folders named in full, or a program called git in the repository would be taken for git.
    search = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(entry)]
    environment = {
        "PATH": os.pathsep.join(search), "LC_ALL": "C", "HOME": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": os.path.dirname(os.path.realpath(folder)),  # no repository further up
        "GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_REPLACE_OBJECTS": "1", "GIT_OPTIONAL_LOCKS": "0",
    }
    done = subprocess.run(["git", "--no-pager", *settings, *arguments], cwd=folder, env=environment, input=stdin,
                          capture_output=True)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise RepositoryError(f"{folder}: expected a git repository that holds what was asked for; "
                              f"git {arguments[0]} says: {said or 'nothing'}")
    return done.stdout


def _git_dir(path: str | os.PathLike[str]) -> str:
    """Where its objects are. Commands run there, out of reach of the attributes in a working tree."""
    if not os.path.isdir(path):
        raise RepositoryError(f"{path}: expected the folder of a git repository, found none")
    return os.fsdecode(_git(path, "rev-parse", "--absolute-git-dir").removesuffix(b"\n"))


def _commit_hash(git_dir: str, revision: str) -> str:
    try:
        found = _git(git_dir, "rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}")
    except RepositoryError:
        raise RepositoryError(f"{git_dir}: expected a revision that names a commit, found {revision!r}") from None
    return found.decode().strip()


def _files(git_dir: str, commit: str, max_file_bytes: int) -> tuple[dict[str, str], list[Skipped]]:
    """The text of each file of a commit that is worth reading, by path."""
    wanted, skipped = {}, []
    for entry in _git(git_dir, "ls-tree", "-r", "-z", "-l", "--full-tree", commit).split(b"\0")[:-1]:
        about, _, raw_path = entry.partition(b"\t")
        mode, kind, blob, size = about.decode().split()
        path = raw_path.decode("utf-8", "backslashreplace")
        if size == "BAD":  # git's word for it
            raise _missing(git_dir, blob)
        if reason := ("submodule" if kind == "commit" else "symbolic link" if mode == "120000"
                      else "empty" if int(size) == 0 else "generated" if _generated_name(path)
                      else "large" if int(size) > max_file_bytes else None):
            skipped.append(Skipped(path, reason))
        else:
            wanted[path] = blob
    texts = {}
    for path, content in zip(wanted, _blobs(git_dir, list(wanted.values()))):
        text, reason = _text(content)
        if reason:
            skipped.append(Skipped(path, reason))
        else:
            texts[path] = text
    return texts, skipped


def _blobs(git_dir: str, hashes: Sequence[str]) -> list[bytes]:
    output = _git(git_dir, "cat-file", "--batch", stdin="".join(f"{each}\n" for each in hashes).encode())
    contents, at = [], 0
    for each in hashes:
        line_end = output.index(b"\n", at)
        header = output[at:line_end].decode().split()
        if header[1] != "blob":
            raise _missing(git_dir, each)
        size = int(header[2])
        contents.append(output[line_end + 1:line_end + 1 + size])
        at = line_end + size + 2
    return contents


def _missing(git_dir: str, blob: str) -> RepositoryError:
    return RepositoryError(f"{git_dir}: expected the content {blob}, found it missing; make a full clone")


def _text(content: bytes) -> tuple[str, str | None]:
    """The text of a file, or why it is skipped."""
    if b"\0" in content:
        return "", "binary"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    if GENERATED_TEXT.search(text[:GENERATED_WITHIN]):
        return "", "generated"
    if max(map(len, text.split("\n"))) > LONGEST_LINE:
        return "", "long line"
    return text, None


def _generated_name(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name in LOCK_FILES or GENERATED_NAME.search(name) is not None


def _commit(git_dir: str, commit: str, max_file_bytes: int) -> tuple[Part, list[Skipped]]:
    header, _, raw_message = _git(git_dir, "cat-file", "commit", commit).partition(b"\n\n")
    fields = [line.split(b" ", 1) for line in header.split(b"\n")]
    parents = [value.decode() for key, value in (field for field in fields if len(field) == 2) if key == b"parent"]
    pair = [parents[0], commit] if parents else ["--root", "--no-commit-id", commit]
    touched = _git(git_dir, "diff-tree", "-r", "-z", "--name-only", *pair).split(b"\0")[:-1]
    patch = _git(git_dir, "diff-tree", "-p", "-M", "--no-color", "--no-ext-diff", "--no-textconv", "--abbrev=8",
                 "--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", *pair)
    kept, skipped = [], []
    # No line of a file begins like this: its lines stand behind a space, a plus or a minus.
    for piece in re.split(rb"^(?=diff --git )", patch, flags=re.M):
        path = piece.partition(b"\n")[0].rpartition(b" b/")[2].decode("utf-8", "backslashreplace").strip('"')
        if reason := "generated" if _generated_name(path) else "large" if len(piece) > max_file_bytes else None:
            skipped.append(Skipped(f"{commit} {path}", reason))
        else:
            kept.append(piece)
    text = f"{_message(raw_message)}\n\n{b''.join(kept).decode('utf-8', 'replace')}"
    paths = tuple(path.decode("utf-8", "backslashreplace") for path in touched)
    return Part("commit", commit, text, paths), skipped


def _message(raw: bytes) -> str:
    return raw.decode("utf-8", "replace").strip()


def _discussion(entry: Any, where: str) -> Part:
    def field(holder: Any, name: str, kind: type, at: str, *, missing: Any = None) -> Any:
        value = holder.get(name) if isinstance(holder, Mapping) else None
        value = missing if value is None else value
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RepositoryError(f"{at}.{name}: expected {kind.__name__}, found {value!r}")
        # JSON can spell half a character, which no tokenizer takes.
        return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value

    kind = field(entry, "kind", str, where)
    if kind not in KINDS:
        raise RepositoryError(f"{where}.kind: expected one of {sorted(KINDS)}, found {kind!r}")
    number, title = field(entry, "number", int, where), field(entry, "title", str, where)
    told = [title, field(entry, "body", str, where, missing="")]
    for index, comment in enumerate(field(entry, "comments", list, where, missing=[])):
        at = f"{where}.comments[{index}]"
        author, body = field(comment, "author", str, at, missing=""), field(comment, "body", str, at)
        told.append(f"{author}: {body}" if author else body)
    return Part(KINDS[kind], f"#{number}", "\n\n".join(text.strip() for text in told if text.strip()))
