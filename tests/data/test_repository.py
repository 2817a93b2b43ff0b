"""A repository as one sequence: what is read, in which order, what is left out, and that nothing of it is ever run."""

import json
import os
import subprocess
import sys

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from glm5_jax.data.repository import Part, RepositoryError, assemble, discussions, history, read
from glm5_jax.text.tokenizer import Tokenizer

FIXED = {
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example.org", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
}


def git(folder, *arguments, check=True):
    return subprocess.run(["git", *arguments], cwd=folder, env={**os.environ, **FIXED}, check=check,
                          capture_output=True, text=True).stdout.strip()


def commit(folder, message, files):
    """Writes the files (None removes one) and commits; returns the hash."""
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "HEAD")


def created(folder):
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.packaged()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Three commits and a merge of the third."""
    folder = created(tmp_path_factory.mktemp("repository") / "clone")
    commit(folder, "begin", {
        "app.py": "import core\n\nprint(core.answer())\n", "zebra.py": "X = 1\n", "README.md": "A tool.\n",
        "core.py": "import zebra\n\n\ndef answer():\n    return 41\n"})
    commit(folder, "Mend the answer\n\nIt was one too low.", {
        "core.py": "import zebra\n\n\ndef answer():\n    return 42\n", "package-lock.json": "{}\n" * 50})
    git(folder, "checkout", "-q", "-b", "side")
    commit(folder, "side", {"side.py": "import core\n"})
    git(folder, "checkout", "-q", "main")
    commit(folder, "main", {"README.md": "A good tool.\n"})
    git(folder, "merge", "-q", "--no-ff", "-m", "merge side", "side")
    return folder


def test_files_in_the_order_of_imports(clone):
    found = read(clone)
    assert [part.name for part in found.files] == ["README.md", "zebra.py", "core.py", "app.py", "side.py"]
    assert {part.role for part in found.files} == {"file"}
    assert found.files[2].text == "import zebra\n\n\ndef answer():\n    return 42\n"
    assert [(each.name, each.reason) for each in found.skipped] == [("package-lock.json", "generated")]
    assert found.commits == ()


def test_files_are_those_of_the_revision_not_of_the_working_tree(clone):
    old = read(clone, revision=git(clone, "rev-list", "--max-parents=0", "HEAD"))
    assert [part.name for part in old.files] == ["README.md", "zebra.py", "core.py", "app.py"]
    assert "41" in old.files[2].text
    (clone / "zebra.py").write_text("dirty\n")
    try:
        assert "X = 1" in read(clone).files[1].text
    finally:
        (clone / "zebra.py").write_text("X = 1\n")


def test_a_commit_written_out(clone):
    start, mended, *_ = history(clone, count=10)
    part, = read(clone, commits=[mended]).commits
    assert (part.role, part.name, part.touches) == ("commit", mended, ("core.py", "package-lock.json"))
    index = f"{git(clone, 'rev-parse', f'{start}:core.py')[:8]}..{git(clone, 'rev-parse', f'{mended}:core.py')[:8]}"
    assert part.text.split("\n") == [
        "Mend the answer", "", "It was one too low.", "",
        "diff --git a/core.py b/core.py", f"index {index} 100644", "--- a/core.py", "+++ b/core.py",
        "@@ -2,4 +2,4 @@ import zebra", " ", " ", " def answer():", "-    return 41", "+    return 42", ""]
    skipped = [each for each in read(clone, commits=[mended]).skipped if each.name.startswith(mended)]
    assert [(each.name, each.reason) for each in skipped] == [(f"{mended} package-lock.json", "generated")]


def test_history_first_commits_and_merges(clone):
    hashes = history(clone, count=10)
    assert hashes == tuple(git(clone, "rev-list", "--first-parent", "--reverse", "HEAD").split())
    assert history(clone, count=2, revision="side") == tuple(git(clone, "rev-list", "--reverse", "-2", "side").split())
    with pytest.raises(ValueError, match="count: expected at least 1 commit, found 0"):
        history(clone, count=0)
    first, merge = read(clone, commits=[hashes[0], hashes[-1]]).commits
    assert first.touches == ("README.md", "app.py", "core.py", "zebra.py")
    assert "+    return 41" in first.text and "new file mode" in first.text
    assert merge.touches == ("side.py",)  # against its first parent
    assert merge.text.startswith("merge side\n\ndiff --git a/side.py b/side.py")


def test_what_is_skipped_and_why(tmp_path):
    folder = created(tmp_path / "r")
    commit(folder, "x", {
        "good.py": "# Do not edit this by hand without telling Ann.\nx = 1\n", "latin.txt": "é".encode("latin-1"),
        "binary.bin": b"\0\1", "void.txt": "", "large.txt": "word\n" * 100, "long.js": "x" * 5001,
        "made.c": "/* Generated by flex 2.6. DO NOT EDIT */\nint x;\n", "m.go": "// Code generated by x.\n",
        "api_pb2.py": "x = 1\n", "lib.min.js": "x\n", "Cargo.lock": "x\n", "käse\n.py": "y = 2\n"})
    os.symlink("/etc/passwd", folder / "link.py")
    git(folder, "add", "-A")
    git(folder, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},module")
    git(folder, "commit", "-q", "-m", "y")
    found = read(folder, max_file_bytes=499)
    # Bytes first, since the longest line is longer than the largest file here.
    assert {each.name: each.reason for each in found.skipped} == {
        "latin.txt": "not UTF-8", "binary.bin": "binary", "void.txt": "empty", "large.txt": "large", "long.js": "large",
        "made.c": "generated", "m.go": "generated", "api_pb2.py": "generated", "lib.min.js": "generated",
        "Cargo.lock": "generated", "link.py": "symbolic link", "module": "submodule"}
    assert {part.name for part in found.files} == {"good.py", "käse\n.py"}
    assert found.reasons()["generated"] == 5
    assert {each.name: each.reason for each in read(folder).skipped}["long.js"] == "long line"


def test_renames_binaries_and_large_differences(tmp_path):
    folder = created(tmp_path / "r")
    commit(folder, "x", {"old.py": "line\n" * 20, "b.bin": b"\0one", "big.txt": "a\n"})
    last = commit(folder, "move", {"old.py": None, "a b/ü.py": "line\n" * 20, "b.bin": b"\0two",
                                   "big.txt": "diff --git a/x b/x\n" * 100})
    found = read(folder, commits=["HEAD"], max_file_bytes=1000)
    part, = found.commits
    assert "similarity index 100%\nrename from old.py\n" in part.text
    assert "Binary files a/b.bin and b/b.bin differ" in part.text
    assert "big.txt" not in part.text
    assert part.touches == ("a b/ü.py", "b.bin", "big.txt", "old.py")
    assert [(each.name, each.reason) for each in found.skipped if each.name.startswith(last)] == [
        (f"{last} big.txt", "large")]


# Nothing of the repository is run

RUNS = {"core.fsmonitor": "{}", "core.pager": "{}", "core.sshCommand": "{}", "core.editor": "{}", "diff.external": "{}",
        "diff.evil.command": "{}", "diff.evil.textconv": "{}", "filter.evil.smudge": "{}", "filter.evil.clean": "{}",
        "filter.evil.process": "{}", "gpg.program": "{}", "log.showSignature": "true", "core.gitProxy": "{}",
        "alias.cat-file": "!{}", "alias.diff-tree": "!{}", "pager.diff-tree": "{}", "pager.cat-file": "true",
        "credential.helper": "!{}", "core.alternateRefsCommand": "{}", "uploadpack.packObjectsHook": "{}",
        "remote.evil.url": "ext::{} now", "remote.evil.promisor": "true", "remote.evil.partialclonefilter": "blob:none",
        "extensions.partialClone": "evil", "core.repositoryformatversion": "1", "protocol.allow": "always",
        "protocol.ext.allow": "always"}


@pytest.fixture
def hostile(tmp_path):
    """A repository every setting of which that can start a program starts one that leaves a mark."""
    folder, marks = created(tmp_path / "r"), tmp_path / "marks"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho run >> {marks}\n")
    program.chmod(0o755)
    commit(folder, "one", {"a.py": "x = 1\n", ".gitattributes": "*.py diff=evil filter=evil\n"})
    commit(folder, "two", {"a.py": "x = 2\n", "__init__.py": f"open({str(marks)!r}, 'w')\n",
                           "setup.py": f"open({str(marks)!r}, 'w')\n"})
    for hook in ("pre-commit", "post-checkout", "post-index-change", "reference-transaction", "fsmonitor-watchman"):
        (folder / ".git/hooks").mkdir(exist_ok=True)
        (folder / ".git/hooks" / hook).write_text(program.read_text())
        (folder / ".git/hooks" / hook).chmod(0o755)
    (folder / ".git/info/attributes").write_text("*.py diff=evil filter=evil\n")
    included = tmp_path / "included"
    included.write_text("".join(f'[{key.rpartition(".")[0].replace(".", " " + chr(34), 1)}'
                                f'{chr(34) if key.count(".") == 2 else ""}]\n\t{key.rpartition(".")[2]} = '
                                f'{value.format(program)}\n' for key, value in RUNS.items()))
    git(folder, "config", "include.path", str(included))
    for key in ("extensions.partialClone", "core.repositoryformatversion"):  # git looks for them here alone
        git(folder, "config", key, RUNS[key])
    return folder, marks


def test_the_trap_works(hostile):
    folder, marks = hostile
    git(folder, "diff", "HEAD~1", "HEAD", check=False)
    assert marks.exists()


def test_nothing_of_a_hostile_repository_is_run(hostile, monkeypatch):
    folder, marks = hostile
    for place in (folder, folder / ".git"):
        (place / "git").write_text(f"#!/bin/sh\necho run >> {marks}\n")
        (place / "git").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", os.environ["PATH"]]))
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    found = read(folder, commits=history(folder, count=2))
    assert [part.name for part in found.files] == [".gitattributes", "__init__.py", "a.py", "setup.py"]
    assert "-x = 1\n+x = 2" in found.commits[1].text
    assert not marks.exists()
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_a_missing_object_is_not_fetched(hostile):
    folder, marks = hostile
    blob = git(folder, "rev-parse", "HEAD:a.py")
    (folder / ".git/objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(RepositoryError, match=blob):
        read(folder)
    with pytest.raises(RepositoryError, match="git diff-tree says"):
        read(folder, revision="HEAD~1", commits=["HEAD"])
    assert not marks.exists()
    git(folder, "cat-file", "-p", blob, check=False)
    assert marks.exists()  # as plain git would have


def test_settings_of_the_repository_do_not_change_a_commit(clone, tmp_path):
    plain = read(clone, commits=history(clone, count=4))
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(clone), str(other))
    for key, value in {"diff.noprefix": "true", "diff.mnemonicPrefix": "true", "color.ui": "always",
                       "diff.context": "0", "core.abbrev": "20", "diff.renames": "false"}.items():
        git(other, "config", key, value)
    (other / ".gitattributes").write_text("*.py -diff\n")
    assert read(other, commits=history(other, count=4)) == plain
    git(tmp_path, "clone", "-q", "--bare", str(clone), str(tmp_path / "bare.git"))
    assert read(tmp_path / "bare.git", commits=history(clone, count=4)) == plain


@pytest.mark.parametrize("revision", ["nothing", "--help", "--output=x", "HEAD^{tree}", "HEAD:core.py", "", "a\nb"])
def test_what_is_no_revision_is_an_error(clone, revision):
    with pytest.raises(RepositoryError, match="expected a revision that names a commit, found"):
        read(clone, revision=revision)
    with pytest.raises(RepositoryError, match="expected a revision that names a commit, found"):
        read(clone, commits=[revision])


def test_what_is_no_repository_is_an_error(clone, tmp_path):
    with pytest.raises(RepositoryError, match="not a git repository"):
        read(tmp_path)
    with pytest.raises(RepositoryError, match="expected the folder of a git repository"):
        read(tmp_path / "missing")
    (clone / "inner").mkdir(exist_ok=True)
    with pytest.raises(RepositoryError, match="not a git repository"):  # a folder inside one is not it
        read(clone / "inner")
    with pytest.raises(RepositoryError, match="expected a revision"):
        read(created(tmp_path / "new"))


def test_a_shallow_clone_says_what_it_lacks(clone, tmp_path):
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{clone}", "shallow")
    assert read(tmp_path / "shallow").files == read(clone).files
    with pytest.raises(RepositoryError, match="git diff-tree says"):
        read(tmp_path / "shallow", commits=["HEAD"])


# Issues and pull requests

def test_discussions_written_out(tmp_path):
    path = tmp_path / "issues.json"
    path.write_text(json.dumps([
        {"kind": "issue", "number": 7, "title": "Answer is low", "body": "It says 41.\n", "state": "closed",
         "comments": [{"author": "ann", "body": "Seen too."}, {"body": "Half: \ud800"}]},
        {"kind": "pull_request", "number": 8, "title": "Mend it", "body": None}]), encoding="utf-8")
    assert discussions(path) == (
        Part("issue", "#7", "Answer is low\n\nIt says 41.\n\nann: Seen too.\n\nHalf: ?"),
        Part("pull request", "#8", "Mend it"))
    path.write_text(json.dumps({"kind": "issue", "number": 1, "title": "one"}))
    assert discussions(path) == (Part("issue", "#1", "one"),)


@pytest.mark.parametrize("text, message", [
    ("{", "expected JSON in UTF-8"), ("[3]", r"\[0\].kind: expected str, found None"),
    ('[{"kind": "note"}]', r"kind: expected one of \['issue', 'pull_request'\], found 'note'"),
    ('[{"kind": "issue", "number": "7"}]', "number: expected int, found '7'"),
    ('[{"kind": "issue", "number": true}]', "number: expected int, found True"),
    ('[{"kind": "issue", "number": 7}]', "title: expected str, found None"),
    ('[{"kind": "issue", "number": 7, "title": "x", "comments": 2}]', "comments: expected list, found 2"),
    ('[{"kind": "issue", "number": 7, "title": "x", "comments": [{}]}]', r"comments\[0\].body: expected str"),
])
def test_a_bad_discussion_is_named(tmp_path, text, message):
    path = tmp_path / "issues.json"
    path.write_text(text)
    with pytest.raises(RepositoryError, match=message) as error:
        discussions(path)
    assert str(path) in str(error.value)


# One sequence

def test_a_story_in_order_and_whole(tokenizer, clone):
    found = read(clone, commits=history(clone, count=2))
    parts = found.files + found.commits + (Part("issue", "#7", "Answer is low"),)
    story = assemble(tokenizer, parts, 4096)
    assert story.left_out == ()
    assert [(piece.role, piece.name) for piece in story.pieces] == [(part.role, part.name) for part in parts]
    assert tokenizer.decode(story.ids) == "".join(part.rendered() for part in parts) + "<|endoftext|>"
    assert parts[-1].rendered() == "=== issue #7\nAnswer is low\n"
    assert story.ids.dtype == np.int32


def test_what_matters_most_is_kept(tokenizer):
    parts = (Part("file", "a.py", "a " * 50), Part("file", "b.py", "b " * 50), Part("file", "c.py", "c " * 500),
             Part("commit", "1f", "change b", ("b.py", "c.py")), Part("issue", "#1", "why"))
    sizes = {part.name: len(tokenizer.encode(part.rendered())) for part in parts}
    kept = lambda *names: 1 + sum(sizes[name] for name in names)
    for length, names in [(kept("1f", "#1"), ["1f", "#1"]), (kept("1f", "#1", "b.py") - 1, ["1f", "#1"]),
                          (kept("1f", "#1", "b.py"), ["b.py", "1f", "#1"]),
                          (kept("1f", "#1", "b.py", "a.py"), ["a.py", "b.py", "1f", "#1"]),
                          (kept(*sizes), ["a.py", "b.py", "c.py", "1f", "#1"])]:
        story = assemble(tokenizer, parts, length)
        assert [piece.name for piece in story.pieces] == names
        assert [piece.name for piece in story.left_out] == [name for name in sizes if name not in names]
    with pytest.raises(ValueError, match="length: expected room for one of 5 parts"):
        assemble(tokenizer, parts, 3)
    with pytest.raises(ValueError, match="length: expected room for one of 0 parts"):
        assemble(tokenizer, (), 3)


names = st.sampled_from("abcdef")
parts = st.lists(st.builds(Part, st.sampled_from(["file", "commit", "issue"]), names, st.text(max_size=30),
                           st.lists(names).map(tuple)), min_size=1, max_size=6)


@settings(max_examples=60)
@given(parts, st.integers(2, 120))
def test_nothing_is_lost_silently(tokenizer, parts, length):
    sizes = [len(tokenizer.encode(part.rendered())) for part in parts]
    if min(sizes) >= length:
        with pytest.raises(ValueError, match="length"):
            assemble(tokenizer, parts, length)
        return
    story = assemble(tokenizer, parts, length)
    assert len(story.ids) <= length
    assert story.ids[-1] == tokenizer.eos_id
    assert sorted([piece.tokens for piece in story.pieces + story.left_out]) == sorted(sizes)
    assert all(piece.start == -1 for piece in story.left_out)
    at = 0
    for piece in story.pieces:
        assert piece.start == at
        at += piece.tokens
        text = tokenizer.decode(story.ids[piece.start:at])
        assert text.startswith(f"=== {piece.role} {piece.name}\n")
    assert at == len(story.ids) - 1
    room = length - len(story.ids)
    assert all(piece.tokens > room for piece in story.left_out)


def test_the_same_repository_gives_the_same_story(tokenizer, clone):
    code = ("import sys; from glm5_jax.data.repository import *; from glm5_jax.text.tokenizer import Tokenizer; "
            "r = read(sys.argv[1], commits=history(sys.argv[1], count=4)); "
            "print(assemble(Tokenizer.packaged(), r.files + r.commits, 600).ids.tolist())")
    printed = subprocess.run([sys.executable, "-c", code, str(clone)], check=True, capture_output=True, text=True,
                             env={**os.environ, "PYTHONHASHSEED": "7"}).stdout
    found = read(clone, commits=history(clone, count=4))
    assert json.loads(printed) == assemble(tokenizer, found.files + found.commits, 600).ids.tolist()
