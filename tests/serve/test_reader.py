"""Completions read piece by piece: the cut makes no difference, and a stop string ends with the token completing it."""

import random

import pytest

from glm5_jax.records import Completion
from glm5_jax.serve.reader import ChatReader, StoppedReader, TextReader
from glm5_jax.text import stream, tools
from glm5_jax.text.grammar import Fault, Kind, collect
from glm5_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.packaged()
THOUGHT = "Let me END this.</think>"
CALL = "<tool_call>look<arg_key>at</arg_key><arg_value>END</arg_value></tool_call>"


def done(ids, stop: str = "length") -> Completion:
    return Completion(ids, [-(n + 1) / 64 for n in range(len(ids))], range(len(ids)), stop)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, specials=True)


def reader(strings=(), raw: bool = False) -> StoppedReader:
    return StoppedReader(TextReader(TOKENIZER) if raw else ChatReader(TOKENIZER, [], thinking=True), strings)


def read(ids, strings=(), *, raw: bool = False, rng: random.Random | None = None):
    """The reader after all ids, in one piece or at random in several, and what it kept of them."""
    one, kept, events, start = reader(strings, raw), [], [], 0
    while start < len(ids) and one.found is None:
        end = rng.randint(start, len(ids)) if rng else len(ids)
        found, part = one.read(done(ids[start:end], "abort"))
        events, kept, start = events + found, kept + list(part.ids), end
    events += one.close()
    assert events == one.events
    return one, kept


def shortest(text: str, end: str) -> list[int]:
    """The fewest tokens whose text contains `end` in the answer."""
    ids = ids_of(text)
    count = next(n for n in range(len(ids)) if end in stream.read_ids(TOKENIZER, ids[:n]).content)
    return ids[:count]


STOPPED = {  # what is sampled: the strings, the one that ends it, the answer before it
    f"{THOUGHT}One.\nEND of it": (["END"], "END", "One.\n"),
    f"{THOUGHT}One EN ENEND two": (["END"], "END", "One EN EN"),
    f"{THOUGHT}a\n\nb\n\n\nc": (["\n\n\n", "zzz"], "\n\n\n", "a\n\nb"),
    f"{THOUGHT}One two three": (["three", "wo"], "wo", "One t"),
    f"{THOUGHT}{CALL} Then END.": (["END"], "END", " Then "),
    f"{THOUGHT}caf\u00e9, na\u00efve": (["\u00ef"], "\u00ef", "caf\u00e9, na"),
}
PASSED = {f"{THOUGHT}One two EN": ["END"], f"{THOUGHT}EN{CALL}D": ["END"], f"{THOUGHT}{CALL}": ["END", "look"],
          "END": ["END"], f"{THOUGHT}END": [], "": ["x"]}


@pytest.mark.parametrize("text", STOPPED)
def test_a_stop_string_ends_the_completion_with_the_token_that_completes_it(text):
    strings, end, answer = STOPPED[text]
    for seed in range(20):
        one, kept = read(ids_of(text), strings, rng=random.Random(seed) if seed else None)
        assert kept == shortest(text, end) and one.found == end
        message, _ = one.reply()
        assert message["content"] == answer
        assert message["reasoning_content"] == THOUGHT.removesuffix("</think>")


def test_the_piece_that_is_kept_has_its_own_logprobs_and_versions():
    ids = ids_of(f"{THOUGHT}One END two")
    _, part = reader(["END"]).read(done(ids))
    count = len(part.ids)
    assert 0 < count < len(ids) and part == Completion(ids[:count], done(ids).logprobs[:count], range(count), "stop")


@pytest.mark.parametrize("text", PASSED)
def test_what_only_looks_like_a_stop_string_is_told_in_the_end(text):
    for seed in range(20):
        one, kept = read(ids_of(text), PASSED[text], rng=random.Random(seed) if seed else None)
        assert kept == ids_of(text) and one.found is None
        plain = stream.read_ids(TOKENIZER, ids_of(text))
        assert collect(one.events) == plain
        assert one.reply() == tools.understand(plain, [])


def test_events_come_no_later_than_the_answer_is_certain():
    one = reader(["END"])
    shown = lambda text: "".join(event.text for event in one.read(done(TOKENIZER.encode(text), "abort"))[0])
    one.read(done(ids_of("</think>"), "abort"))
    assert [shown(text) for text in ("One E", "N", "x", "E")] == ["One ", "", "ENx", ""]
    assert "".join(event.text for event in one.close()) == "E"


def test_raw_text():
    half = [id for id in range(TOKENIZER.vocab_size) if TOKENIZER.bytes_of(id) == "é".encode()[:1]]
    ids = ids_of("a<think>b") + half + [TOKENIZER.eos_id]
    for seed in range(10):
        one, kept = read(ids, raw=True, rng=random.Random(seed))
        assert one.reply() == ({"role": "assistant", "content": "a<think>b\ufffd"}, [])
        assert kept == ids and one.events[-1].kind is Kind.STOP and one.events[-1].text == "<|endoftext|>"
    one, kept = read(ids_of("One END two"), ["END"], raw=True)
    assert (one.reply()[0]["content"], one.found) == ("One ", "END") and kept == ids_of("One END")


@pytest.mark.parametrize("raw", [True, False])
def test_tokens_that_the_tokenizer_does_not_have_are_kept_and_say_nothing(raw):
    ids = ids_of("</think>a")[raw:] + [TOKENIZER.vocab_size + 7] + ids_of("b")
    one, kept = read(ids, ["zz"], raw=raw)
    assert kept == ids and one.reply()[0]["content"] == "ab"


def test_what_is_wrong_with_a_reply_is_told():
    one, _ = read(ids_of("</think>One<tool_call>look<arg_key>at</tool_call>"))
    message, errors = one.reply()
    assert message == {"role": "assistant", "content": "One", "reasoning_content": "\n"}
    assert [error.kind for error in errors] == [Fault.UNCLOSED_CALL]
