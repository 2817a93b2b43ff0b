"""Document sources: what is in them, that they are the same every time, and that a split is honest."""

import logging
import subprocess
import sys

import pytest

from glm5_jax.data import sources
from glm5_jax.data.sources import Document


def library(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_packaged_text_is_pinned():
    documents = sources.packaged_text()
    assert len(documents) == 71
    assert sources.text_bytes(documents) == 292_814
    assert [document.name for document in documents] == sorted({document.name for document in documents})
    assert sources.fingerprint(documents) == "2f4824126f0d7abfb0c8771db151ca8c9c9631961189b3f85ec63750c8e7a8e4"
    assert next(d.text for d in documents if d.name == "assert").startswith('The "assert" statement\n***')


def test_stdlib_holds_the_library_and_not_its_tests():
    documents = {document.name: document.text for document in sources.stdlib_text()}
    assert list(documents) == sorted(documents)
    assert {"dataclasses.py", "json/decoder.py", "unittest/case.py"} <= set(documents)
    assert "def dataclass(" in documents["dataclasses.py"]
    folders = {part for name in documents for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    assert all(documents.values())


def test_stdlib_leaves_out_and_counts_what_it_cannot_read(tmp_path, caplog):
    root = library(tmp_path, {
        "b.py": b"b = 1\n", "a/z.py": b"z = '\xc3\xa9'\n", "latin.py": b"# \xe9\n", "empty.py": b"", "notes.txt": b"no",
        "test/t.py": b"no", "a/tests/t.py": b"no", "site-packages/p/p.py": b"no", "idlelib/idle_test/i.py": b"no",
        "testing.py": b"yes = 1\n",
    })
    with caplog.at_level(logging.WARNING):
        documents = sources.stdlib_text(root)
    assert documents == (Document("a/z.py", "z = 'é'\n"), Document("b.py", "b = 1\n"),
                         Document("testing.py", "yes = 1\n"))
    assert "1 unreadable files left out of 5: latin.py" in caplog.text


def test_stdlib_without_source_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no .py file"):
        sources.stdlib_text(tmp_path)


def test_load_by_name():
    assert sources.load("packaged") == sources.packaged_text()
    with pytest.raises(ValueError, match=r"\['packaged', 'stdlib'\], found 'wikipedia'"):
        sources.load("wikipedia")


def test_fingerprint_sees_names_texts_order_and_borders():
    variants = [
        [("a", "xy")], [("b", "xy")], [("a", "xz")], [("ax", "y")], [("a", "x"), ("b", "y")], [("b", "y"), ("a", "x")],
        [("a", "x"), ("by", "")], [],
    ]
    prints = [sources.fingerprint([Document(*pair) for pair in variant]) for variant in variants]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 64 for p in prints)


def test_text_bytes_counts_utf8():
    assert sources.text_bytes([Document("a", "é€"), Document("b", "x\n")]) == 2 + 3 + 2


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_split_is_whole_disjoint_and_near_the_fraction(fraction):
    documents = sources.packaged_text()
    train, held_out = sources.split(documents, fraction)
    assert sorted(train + held_out, key=lambda d: d.name) == list(documents)
    assert not set(train) & set(held_out)
    share = sources.text_bytes(held_out) / sources.text_bytes(documents)
    assert fraction - 0.01 < share <= fraction
    assert list(train) == [d for d in documents if d in train]  # the given order stays


def test_split_depends_on_names_and_seed_alone():
    documents = [Document(f"doc{i}", "x" * 10) for i in range(50)]
    names = {d.name for d in sources.split(documents)[1]}
    assert len(names) == 5
    assert {d.name for d in sources.split(documents[::-1])[1]} == names
    assert {d.name for d in sources.split([Document(d.name, "y" * 10) for d in documents])[1]} == names
    assert {d.name for d in sources.split(documents, seed=1)[1]} != names


def test_split_is_the_same_in_another_process():
    code = "from glm5_jax.data import sources; print(*[d.name for d in sources.split(sources.packaged_text())[1]])"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert printed == [d.name for d in sources.split(sources.packaged_text())[1]]


@pytest.mark.parametrize("texts", [("long text", "longer text"), ("", ""), ("", "x"), ("x" * 99, "y")])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.999])
def test_both_sides_get_a_document(texts, fraction):
    train, held_out = sources.split([Document(str(i), text) for i, text in enumerate(texts)], fraction)
    assert len(train) == len(held_out) == 1


def test_split_errors():
    documents = [Document("a", "x"), Document("b", "x")]
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="held_out_fraction"):
            sources.split(documents, fraction)
    with pytest.raises(ValueError, match="at least two"):
        sources.split(documents[:1])
    with pytest.raises(ValueError, match="found 'a' twice"):
        sources.split([*documents, documents[0]])
