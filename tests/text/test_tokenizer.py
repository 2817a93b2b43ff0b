"""The tokenizer: the packaged files, exact round trips, and special tokens that text cannot forge."""

import hashlib
import importlib.resources
import json
import subprocess
import sys

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from glm5_jax.text import build_assets
from glm5_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

ASSETS = importlib.resources.files("glm5_jax.text") / "assets"
SHA256 = {
    "python_topics.jsonl": "5f0b60b72276a17d2ba546d2c4b94d16a2d1fd19d5ff3c9edb801500b3e715e3",
    "tokenizer.json": "fe8229923defbf6b09eddf10d570c9682fc1819ec5a33fdd0ac5db4d4101b546",
}
# Ids of the released tokenizer; the packaged one keeps their distances.
RELEASED = {
    "<|endoftext|>": 154820, "[gMASK]": 154822, "<sop>": 154824, "<|system|>": 154826, "<|user|>": 154827,
    "<|assistant|>": 154828, "<|observation|>": 154829, "<think>": 154841, "</think>": 154842,
}
UNICODE = [
    "", " ", "\r\n \t\n\n", "don't  stop\n    if x:  ", "a\x00b\x7f\x1b", "naïve cafe\u0301 e\u0301 \ufb01",
    "中文 和 日本語 ไทย हिन्दी עברית", "👩‍👩‍👧‍👦🏳️‍🌈 \U0001f1e9\U0001f1ea", "\u2028\u2029\u00a0\u200b\ufeff\ufffd",
    "\U0010ffff\uffff\ue000",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.packaged()


@pytest.mark.parametrize("name", SHA256)
def test_packaged_files_are_the_pinned_ones(name):
    assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == SHA256[name]


def test_the_licence_stands_beside_the_text():
    licence = (ASSETS / "LICENSE.txt").read_text(encoding="utf-8")
    for words in ("Python Software Foundation License Version 2", "Copyright (c) 2001", "All Rights Reserved",
                  "pydoc_data.topics", f"Python {build_assets.SOURCE_PYTHON}", "8. By copying"):
        assert words in licence


def test_the_kept_script_trains_the_packaged_tokenizer():
    lines = (ASSETS / "python_topics.jsonl").read_text(encoding="utf-8").strip().split("\n")
    trained = build_assets.train_bpe([json.loads(line)["text"] for line in lines], build_assets.VOCAB_SIZE)
    packaged, again = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8")), json.loads(trained.to_str())
    assert again["model"]["vocab"] == packaged["model"]["vocab"]
    assert again["model"]["merges"] == packaged["model"]["merges"]
    assert again["added_tokens"] == packaged["added_tokens"]


def test_topics_are_chosen_short_first_whole_and_without_repeats():
    topics = {
        "long": "first paragraph\n\nsecond paragraph\n\na third one that is longer than both",
        "if": "first\n   paragraph", "while": "second paragraph", "é": "é" * 20, "huge": "x" * 1000,
    }
    expected = {"if": topics["if"], "while": topics["while"], "é": topics["é"]}  # "long" repeats, "huge" does not fit
    assert build_assets.select_topics(topics, limit_bytes=100) == expected
    assert list(build_assets.select_topics(topics, limit_bytes=100)) == ["if", "while", "é"]
    size = sum(len(text.encode()) for text in expected.values())
    assert build_assets.select_topics(topics, limit_bytes=size) == expected
    assert "é" not in build_assets.select_topics(topics, limit_bytes=size - 1)


def test_too_little_text_for_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="expected 4096 entries"):
        build_assets.train_bpe(["a few words"], 4096)


def test_vocabulary_is_exactly_full_and_specials_come_last_in_released_order(tokenizer):
    assert tokenizer.vocab_size == 4096
    first = 4096 - len(SPECIAL_TOKENS)
    assert [tokenizer.id_of(token) for token in SPECIAL_TOKENS] == list(range(first, 4096))
    for token, id in RELEASED.items():
        assert tokenizer.id_of(token) - first == id - 154820
    assert tokenizer.eos_id == tokenizer.id_of("<|endoftext|>")
    assert tokenizer.stop_ids == tuple(tokenizer.id_of(s) for s in ("<|endoftext|>", "<|user|>", "<|observation|>"))


def test_every_id_is_reachable(tokenizer):
    assert sorted(tokenizer.marked.get_vocab().values()) == list(range(4096))


def test_unknown_special_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"'<\|nobody\|>'.*<\|user\|>"):
        tokenizer.id_of("<|nobody|>")


@pytest.mark.parametrize("text", UNICODE)
@pytest.mark.parametrize("specials", [False, True])
def test_round_trip(tokenizer, text, specials):
    assert tokenizer.decode(tokenizer.encode(text, specials=specials)) == text


# Text from which special tokens, halves of them and their neighbours arise often.
pieces = st.one_of(st.text(max_size=5), st.sampled_from(SPECIAL_TOKENS), st.sampled_from(["<|", "|>", "<", "/", " "]))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(pieces, max_size=8).map("".join))
def test_round_trip_and_no_forged_special(tokenizer, text):
    plain = tokenizer.encode(text)
    assert tokenizer.decode(plain) == text
    assert not set(plain) & set(tokenizer.specials.values())
    marked = tokenizer.encode(text, specials=True)
    assert tokenizer.decode(marked) == text
    assert tokenizer.decode(plain, skip_specials=True) == text


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_a_spelled_special_is_one_token_only_on_request(tokenizer, special):
    assert tokenizer.encode(special, specials=True) == [tokenizer.id_of(special)]
    assert tokenizer.id_of(special) not in tokenizer.encode(f"a{special}b")
    around = tokenizer.encode(f" a {special} b ", specials=True)
    assert around.count(tokenizer.id_of(special)) == 1
    assert tokenizer.decode(around) == f" a {special} b "  # the blanks beside a special are kept
    assert tokenizer.decode(around, skip_specials=True) == " a  b "


def test_nothing_is_added_around_the_text(tokenizer):
    assert tokenizer.encode("") == tokenizer.encode("", specials=True) == []


def test_decode_takes_numpy_and_shows_half_characters(tokenizer):
    ids = np.array(tokenizer.encode("€"), np.int32)
    assert tokenizer.decode(ids) == "€"
    assert len(ids) > 1 and "\ufffd" in tokenizer.decode(ids[:-1])


@pytest.mark.parametrize("id", [-1, 4096, 10**12])
def test_decode_rejects_ids_outside_the_vocabulary(tokenizer, id):
    with pytest.raises(ValueError, match=rf"0\.\.4095, found {id} at position 1"):
        tokenizer.decode([5, id])


def test_a_lone_surrogate_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800b")


def test_load_takes_a_file_or_a_directory(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes())
    text = "import os<|user|>\n"
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        loaded = Tokenizer.load(path)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode(text, specials=True) == tokenizer.encode(text, specials=True)


def test_load_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: expected"):
        Tokenizer.load(tmp_path)
    for content in ("not json", '{"added_tokens": [], "model": {"vocab": {}}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="tokenizer.json: expected a tokenizer"):
            Tokenizer.load(tmp_path)


def test_specials_inside_the_model_vocabulary_and_a_post_processor_do_not_leak(tmp_path):
    """Other trainers put special tokens into the BPE vocabulary too, whole words may skip merging, and a template may
    add tokens around a text."""
    description = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))
    think, nothink = (next(t["id"] for t in description["added_tokens"] if t["content"] == s)
                      for s in ("<think>", "/nothink"))
    description["model"]["vocab"] |= {t["content"]: t["id"] for t in description["added_tokens"]}
    description["model"]["ignore_merges"] = True
    description["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<think>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<think>": {"id": "<think>", "ids": [think], "tokens": ["<think>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    loaded = Tokenizer.load(tmp_path)
    assert nothink not in loaded.encode("/nothink") and think not in loaded.encode("/nothink")
    assert loaded.encode("/nothink", specials=True) == [nothink]
    assert loaded.vocab_size == 4096


def test_text_never_imports_jax():
    code = "import sys; sys.modules['jax'] = None; from glm5_jax.text import tokenizer; " \
           "t = tokenizer.Tokenizer.packaged(); assert t.decode(t.encode('ok')) == 'ok'"
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.one_of(st.lists(st.integers(0, 4095), max_size=12), st.lists(st.integers(0, 255), max_size=12)), st.data())
def test_streamed_text_is_the_decoded_text(tokenizer, ids, data):
    """Any ids, bytes that are no UTF-8 too (the first 256 are the single bytes), in any portions."""
    letters, texts, begin = tokenizer.stream(), [], 0
    for cut in sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4))) + [len(ids)]:
        text, letters = letters.feed(ids[begin:cut])
        texts.append(text)
        begin = cut
    assert "".join(texts) + letters.close() == tokenizer.decode(ids)
    assert len(letters.held) <= 3


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(pieces, max_size=6).map("".join))
def test_a_stream_never_splits_a_character(tokenizer, text):
    letters, texts = tokenizer.stream(), []
    for id in tokenizer.encode(text, specials=True):
        piece, letters = letters.feed([id])
        texts.append(piece)
    assert "".join(texts) == text and letters.close() == ""


def test_a_stream_gives_a_character_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("a🏳b")
    letters, texts = tokenizer.stream(), []
    for id in ids:
        piece, letters = letters.feed([id])
        texts.append(piece)
    assert texts == ["a", *[""] * (len(ids) - 3), "🏳", "b"]
    _, cut = tokenizer.stream().feed(ids[:2])
    assert cut.close() == tokenizer.decode(ids[1:2]) == "\ufffd"


def test_bytes_of_every_id_are_the_bytes_it_decodes_to(tokenizer):
    for id in range(tokenizer.vocab_size):
        assert tokenizer.bytes_of(id).decode("utf-8", "replace") == tokenizer.decode([id])
    for id in (-1, 4096, 2**40):
        with pytest.raises(ValueError, match=rf"expected an id in 0\.\.4095, found {id}"):
            tokenizer.bytes_of(id)


def test_an_added_token_outside_the_byte_alphabet_streams_as_it_is_spelled(tmp_path):
    description = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))
    added = [dict(description["added_tokens"][0], id=4096 + rank, content=content)
             for rank, content in enumerate(["<a token>", "中"])]
    description["added_tokens"] += added
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    loaded = Tokenizer.load(tmp_path)
    for id in (4096, 4097):
        text, letters = loaded.stream().feed([id])
        assert text + letters.close() == loaded.decode([id])


def test_a_vocabulary_that_is_not_byte_level_cannot_stream(tmp_path):
    description = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(description | {"decoder": {"type": "Fuse"}}))
    with pytest.raises(ValueError, match="decoder: expected a ByteLevel one"):
        Tokenizer.load(tmp_path).stream().feed([0])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(pieces, max_size=6).map("".join))
def test_spans_of_tokens_cover_the_text(tokenizer, text):
    spans = tokenizer.encode_spans(text)
    assert [id for id, _, _ in spans] == tokenizer.encode(text)
    data = text.encode()
    position = 0
    for id, start, end in spans:
        size = len(tokenizer.bytes_of(id))
        assert len(text[:start].encode()) <= position and position + size <= len(text[:end].encode())
        assert end > start
        position += size
    assert position == len(data)
