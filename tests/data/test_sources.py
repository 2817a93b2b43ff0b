"""Document sources: what is in them, that they are the same every time, and that a split is honest."""

import json
import logging
import pickle
import subprocess
import sys

from array_record.python.array_record_module import ArrayRecordWriter
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


@pytest.fixture
def files(tmp_path):
    """The same two documents in each kind of file, by suffix; a folder is ''."""
    records = [json.dumps(record).encode() for record in [{"text": "é\n1", "id": "one"}, {"id": "two", "text": "2"}]]
    library(tmp_path, {"texts/b.txt": b"2", "texts/a/z.txt": "é\n1".encode(), "texts/notes.md": b"no",
                       "one.txt": b"2", "two.jsonl": b"\n".join([records[0], b" ", records[1]])})
    writer = ArrayRecordWriter(str(tmp_path / "two.array_record"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return {"": tmp_path / "texts", ".txt": tmp_path / "one.txt", ".jsonl": tmp_path / "two.jsonl",
            ".array_record": tmp_path / "two.array_record"}


NAMES = {"": ("a/z.txt", "b.txt"), ".txt": ("one.txt",), ".jsonl": ("two.jsonl:1", "two.jsonl:3"),
         ".array_record": ("record:0", "record:1")}


@pytest.mark.parametrize("suffix", NAMES)
def test_files_are_sequences_of_documents(files, suffix):
    documents = sources.load(str(files[suffix]))
    expected = tuple(map(Document, NAMES[suffix], ["é\n1", "2"][-len(NAMES[suffix]):]))
    assert tuple(documents) == documents[:] == expected
    assert documents[-1] == expected[-1] and documents[::-1] == expected[::-1]
    assert tuple(pickle.loads(pickle.dumps(documents))) == expected
    with pytest.raises(IndexError):
        documents[len(expected)]


@pytest.mark.parametrize("suffix, reader", [(".jsonl", sources.JsonLines), (".array_record", sources.ArrayRecords)])
def test_fields_by_name(files, suffix, reader):
    assert tuple(reader(files[suffix], text="id", name="text")) == (Document("é\n1", "one"), Document("2", "two"))


def test_several_array_record_files_are_one_source(files):
    assert len(sources.ArrayRecords([files[".array_record"]] * 2)) == 4


def test_folders_by_suffix(files):
    assert tuple(sources.TextFiles(files[""], ".md")) == (Document("notes.md", "no"),)


BAD_LINES = {
    "latin": (b'{"text": "\xe9"}', "expected UTF-8, found byte 0xe9 at offset 10"),
    "no json": (b"hello", "expected a JSON object, found: Expecting value at character 0"),
    "cut": (b'{"text": "x', "expected a JSON object, found: Unterminated string"),
    "no object": (b'["text"]', "expected a JSON object, found list"),
    "no field": (b'{"texts": "x", "id": "y"}',
                 r"expected the field 'text', found \['id', 'texts'\]; did you mean 'texts'\?"),
    "no text": (b'{"text": null}', "expected text in the field 'text', found None"),
    "empty text": (b'{"text": ""}', "expected text in the field 'text', found ''"),
}


@pytest.mark.parametrize("line, error", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, error):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"^{path}:3: {error}[^\n]*$"):
        sources.load(str(path))
    writer = ArrayRecordWriter(str(tmp_path / "bad.array_record"), "group_size:1")
    writer.write(line)
    writer.close()
    with pytest.raises(ValueError, match=f"^{tmp_path}/bad.array_record, record 0: {error}[^\n]*$"):
        sources.load(str(tmp_path / "bad.array_record"))


BAD_FILES = {
    "empty.txt": (b"", ValueError, "expected text, found an empty file"),
    "latin.txt": (b"caf\xe9", ValueError, "expected UTF-8, found byte 0xe9 at offset 3"),
    "blank.jsonl": (b"\n\n", ValueError, "expected a JSON object per line, found an empty file"),
    "short.array_record": (b"hello", ValueError, "expected ArrayRecord files, found: "),
    "long.array_record": (b"hello" * 50_000, ValueError, "expected ArrayRecord files, found: "),
    "folder.jsonl/x": (b"", IsADirectoryError, "expected a file that can be read, found: Is a directory"),
    "folder.array_record/x": (b"", IsADirectoryError, "expected a file that can be read, found: Is a directory"),
    "texts/folder.txt/x": (b"", IsADirectoryError, "expected a file that can be read, found: Is a directory"),
}


@pytest.mark.parametrize("name, bad", BAD_FILES.items(), ids=BAD_FILES)
def test_a_bad_file_is_named_when_opened(tmp_path, name, bad):
    content, error, message = bad
    path = library(tmp_path, {name: content}) / name.removesuffix("/x")
    read = sources.READERS[path.suffix]
    with pytest.raises(error, match=f"^{path}: {message}[^\n]*$"):
        read(tmp_path / "texts" if name.startswith("texts") else path)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.array_record"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}: expected a "):
        sources.load(str(tmp_path / name))


def test_a_folder_without_texts_and_an_array_record_file_without_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected files that end in .txt, found none"):
        sources.load(str(tmp_path))
    ArrayRecordWriter(str(tmp_path / "no.array_record"), "group_size:1").close()
    with pytest.raises(ValueError, match="no.array_record: expected "):
        sources.load(str(tmp_path / "no.array_record"))


def test_synthetic_documents_are_functions_of_seed_and_number():
    documents = sources.Synthetic(100, seed=1, median_words=50)
    assert len(documents) == 100 and documents[7] == sources.Synthetic(8, seed=1, median_words=50)[7]
    assert documents[7].text != sources.Synthetic(8, seed=2, median_words=50)[7].text
    assert len({document.text for document in documents}) == len({document.name for document in documents}) == 100
    counts = sorted(len(document.text.split()) for document in documents)
    assert 35 < counts[50] < 70 and counts[-1] > 3 * counts[50]
    with pytest.raises(ValueError, match="count: expected at least 1, found 0"):
        sources.Synthetic(0)


def test_a_selection_keeps_its_order():
    documents = sources.Selection(sources.Synthetic(9), [4, 0, 4])
    assert [document.name for document in documents] == ["synthetic/4", "synthetic/0", "synthetic/4"]


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
