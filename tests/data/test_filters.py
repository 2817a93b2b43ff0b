"""Each rule on texts made to break it and it alone, duplicates, and a report that adds up."""

import dataclasses
import json
import random
import string

import pytest

from glm5_jax.data import filters, sources
from glm5_jax.data.sources import Document
from glm5_jax.text.tokenizer import Tokenizer

PROSE = next(document.text for document in sources.packaged_text() if document.name == "strings")


def drawn(characters, count):
    return "".join(random.Random(0).choices(characters, k=count))


CHINESE = drawn([chr(code) for code in range(0x4E00, 0x5E00)], 500) + "。"
HINDI = drawn([chr(code) for code in [*range(0x0905, 0x093A), *range(0x093E, 0x094D)]] + [" "] * 10, 500)
BROKEN = {
    "too short": PROSE[:99],
    "not text": PROSE[:1000] + "\ufffd\x00\ue000\U000e0fff" * 5,
    "few letters": drawn("!\"#$%&'()*+,-./ :;<=>?@", 500),
    "unbroken runs": PROSE[:500] + " " + drawn(string.ascii_letters + string.digits, 201),
    "repeated lines": PROSE[:700] + "\nSubscribe to our letter, it is free" * 15,
    "repeated phrases": " ".join(f"line {i} {PROSE[:200]}" for i in range(20)).replace("\n", " "),
}


@pytest.mark.parametrize("reason, text", BROKEN.items(), ids=BROKEN)
def test_a_broken_text_is_dropped_for_its_reason_alone(reason, text):
    assert {rule(text) for rule in filters.RULES} == {reason, None}


@pytest.mark.parametrize("text", [PROSE, CHINESE, HINDI, "def f(x):\n    return x + 1\n" * 4 + PROSE],
                         ids=["English", "Chinese", "Hindi", "code"])
def test_a_sound_text_is_kept(text):
    assert {rule(text) for rule in filters.RULES} == {None}


def test_limits_are_inclusive():
    rule = filters.length(minimum=2, maximum=3)
    assert [rule("x" * size) for size in (1, 2, 3, 4)] == ["too short", None, None, "too long"]
    half = "a unique line of text\n" + "twice the same here\n" * 2  # the second of 19 + 19 + 21 + 3 characters
    assert filters.repetition(max_lines=19 / 62)(half) is None
    assert filters.repetition(max_lines=18.9 / 62)(half) == "repeated lines"
    assert filters.non_text(maximum=0.5)("a\x00") is None and filters.non_text(maximum=0.4)("a\x00") == "not text"
    assert filters.quality(min_letters=0.5)("a!") is None and filters.quality(min_letters=0.6)("a!") == "few letters"


def test_the_packaged_text_is_kept():
    kept, report = filters.apply(sources.packaged_text())
    assert tuple(kept) == sources.packaged_text()
    assert report == filters.Report(filters.Count(71, 292_814, None), {})


@pytest.fixture
def corpus():
    changed = PROSE.replace("escape", "escaping", 1)
    texts = [PROSE, "short", CHINESE, PROSE, changed, BROKEN["not text"], CHINESE, "é"]
    return [Document(f"d{number}", text) for number, text in enumerate(texts)]


def test_apply_keeps_order_and_accounts_for_every_document(corpus):
    tokenizer = Tokenizer.packaged()
    kept, report = filters.apply(corpus, tokenizer=tokenizer)
    assert kept.indices == (0, 2) and list(kept) == [corpus[0], corpus[2]]
    dropped = {"duplicate": [3, 6], "near duplicate": [4], "not text": [5], "too short": [1, 7]}
    for numbers, count in [([0, 2], report.kept), *((dropped[name], count) for name, count in report.dropped.items())]:
        documents = [corpus[number] for number in numbers]
        assert count == filters.Count(len(documents), sources.text_bytes(documents),
                                      sum(len(tokenizer.encode(document.text)) for document in documents))
    assert list(report.dropped) == sorted(dropped)


def test_duplicates_are_left_alone_where_nobody_asks(corpus):
    assert filters.apply(corpus, exact=False, near=None)[0].indices == (0, 2, 3, 4, 6)
    assert filters.apply(corpus, near=None)[0].indices == (0, 2, 4)
    assert filters.apply(corpus, rules=[], near=None)[0].indices == (0, 1, 2, 4, 5, 7)


def test_a_dropped_text_does_not_make_its_copy_a_duplicate():
    kept, report = filters.apply([Document("a", "short"), Document("b", "short")])
    assert len(kept) == 0 and report.dropped == {"too short": filters.Count(2, 10, None)}


def test_the_report_as_a_table_and_as_json(corpus):
    _, report = filters.apply(corpus[:2], tokenizer=Tokenizer.packaged())
    kept, short = report.kept, report.dropped["too short"]
    assert report.table().splitlines() == [
        "| | documents | bytes | tokens |", "|---|---:|---:|---:|",
        f"| kept | 1 | {kept.bytes:,} | {kept.tokens:,} |", f"| too short | 1 | 5 | {short.tokens} |"]
    assert json.loads(json.dumps(dataclasses.asdict(report)))["dropped"]["too short"]["documents"] == 1


def test_an_empty_corpus_gives_an_empty_report():
    kept, report = filters.apply([])
    assert len(kept) == 0 and report == filters.Report(filters.Count(0, 0, None), {})
