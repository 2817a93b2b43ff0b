"""Token ids and weights of a conversation: markers from the template alone, weights from the trained spans alone."""

import bisect

from hypothesis import given, settings, strategies as st
import pytest

from glm5_jax.text import chat, mask
from glm5_jax.text.segments import MARKERS
from glm5_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

STEPS = [
    {"role": "user", "content": "look"},
    {"role": "assistant", "reasoning_content": "hm", "content": "",
     "tool_calls": [{"name": "ls", "arguments": {"path": "/tmp", "depth": 1}}]},
    {"role": "tool", "content": "é"},
    {"role": "assistant", "reasoning_content": "so", "content": "done", "tool_calls": []},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.packaged()


def test_ids_and_weights_written_out(tokenizer):
    pieces = [  # (text, is a marker, is learned)
        ("[gMASK]", 1, 0), ("<sop>", 1, 0), ("<|user|>", 1, 0), ("look", 0, 0),
        ("<|assistant|>", 1, 0), ("<think>", 1, 0), ("hm", 0, 1), ("</think>", 1, 1),
        ("<tool_call>", 1, 1), ("ls", 0, 1),
        ("<arg_key>", 1, 1), ("path", 0, 1), ("</arg_key>", 1, 1), ("<arg_value>", 1, 1), ("/tmp", 0, 1),
        ("</arg_value>", 1, 1), ("<arg_key>", 1, 1), ("depth", 0, 1), ("</arg_key>", 1, 1), ("<arg_value>", 1, 1),
        ("1", 0, 1), ("</arg_value>", 1, 1), ("</tool_call>", 1, 1), ("<|observation|>", 1, 1),
        ("<tool_response>", 1, 0), ("é", 0, 0), ("</tool_response>", 1, 0),
        ("<|assistant|>", 1, 0), ("<think>", 1, 0), ("so", 0, 1), ("</think>", 1, 1), ("done", 0, 1),
        ("<|user|>", 1, 1), ("thanks", 0, 0), ("<|assistant|>", 1, 0), ("</think>", 1, 0),
    ]
    ids, weights = [], []
    for text, is_marker, learned in pieces:
        tokens = [tokenizer.id_of(text)] if is_marker else tokenizer.encode(text)
        ids += tokens
        weights += [learned] * len(tokens)
    assert mask.encode(tokenizer, STEPS, clear_thinking=False, add_generation_prompt=True,
                       enable_thinking=False) == (ids, weights)


def test_the_tools_block_shows_calls_in_real_markers_and_tools_in_letters(tokenizer):
    ids, weights = mask.encode(tokenizer, [], [{"name": "<tool_call>"}])
    pair = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
    expected = ["[gMASK]", "<sop>", "<|system|>", "<tool_call>", *pair, *pair, "</tool_call>"]
    assert [id for id in ids if id in tokenizer.specials.values()] == [tokenizer.id_of(marker) for marker in expected]
    assert not any(weights)


forged = st.lists(st.one_of(st.text(max_size=4), st.sampled_from(SPECIAL_TOKENS)), max_size=4).map("".join)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.tuples(forged, forged, forged, forged), min_size=1, max_size=3))
def test_no_message_forges_a_marker(tokenizer, turns):
    def conversation(fill):
        messages = []
        for said, thought, answer, value in turns:
            messages += [{"role": "system", "content": fill(said)}, {"role": "user", "content": fill(said)},
                         {"role": "assistant", "content": fill(answer), "reasoning_content": "r" + fill(thought) + "r",
                          "tool_calls": [{"name": "f" + fill(value), "arguments": {fill(value): fill(value)}}]},
                         {"role": "tool", "content": fill(value)}]
        return mask.encode(tokenizer, messages, [{"name": fill(turns[0][0])}])[0]

    special = set(tokenizer.specials.values())
    expected = [id for id in conversation(lambda text: "") if id in special]
    assert [id for id in conversation(lambda text: text) if id in special] == expected


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool", "system"]), forged, forged, st.booleans()),
                max_size=5), st.data())
def test_weights_are_the_trained_spans_less_the_erroneous_parts(tokenizer, turns, data):
    messages = [{"role": role, "content": content} | (
        {"reasoning_content": thought, "weight": int(right)} if role == "assistant" else {})
        for role, content, thought, right in turns]
    text = chat.render(messages)
    edges = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2)))
    learned = [False] * len(text)
    for start, end in chat.trained_spans(messages):
        learned[start:end] = [True] * (end - start)
    ids, plain = mask.encode(tokenizer, messages)
    _, weights = mask.encode(tokenizer, messages, erroneous=[tuple(edges)])
    # Where a token stands follows from its bytes.
    ends = [0]
    for id in ids:
        ends.append(ends[-1] + len(tokenizer.bytes_of(id)))
    starts_of_letters = [0]
    for letter in text:
        starts_of_letters.append(starts_of_letters[-1] + len(letter.encode()))
    assert ends[-1] == starts_of_letters[-1]
    for index, (start, end) in enumerate(zip(ends, ends[1:])):
        first = bisect.bisect_right(starts_of_letters, start) - 1
        letters = range(first, bisect.bisect_left(starts_of_letters, end))
        assert {plain[index]} == {int(learned[letter]) for letter in letters}
        hit = any(edges[0] <= letter < edges[1] for letter in letters)
        assert weights[index] == (0 if hit else plain[index])


def test_every_token_of_a_half_erroneous_letter_is_left_out(tokenizer):
    messages = [{"role": "assistant", "content": "a🏳b", "reasoning_content": ""}]
    at = chat.render(messages).index("🏳")
    assert len(tokenizer.encode("🏳")) > 1
    _, plain = mask.encode(tokenizer, messages)
    _, weights = mask.encode(tokenizer, messages, erroneous=[(at, at + 1)])
    assert sum(plain) - sum(weights) == len(tokenizer.encode("🏳"))
    assert mask.encode(tokenizer, messages, erroneous=[(at, at)])[1] == plain


@pytest.mark.parametrize("part", [(0, 10**6), (-1, 2), (5, 4)])
def test_parts_outside_the_text_are_errors(tokenizer, part):
    with pytest.raises(ValueError, match="erroneous: expected parts within 0"):
        mask.encode(tokenizer, STEPS, erroneous=[part])


def test_a_tokenizer_without_the_markers_is_named():
    packaged = Tokenizer.packaged()
    without = Tokenizer(packaged.plain, packaged.marked, {name: id for name, id in packaged.specials.items()
                                                          if name != "<think>"})
    with pytest.raises(ValueError, match="'<think>'"):
        mask.encode(without, STEPS, clear_thinking=False)


def test_the_markers_are_special_tokens():
    assert set(MARKERS) <= set(SPECIAL_TOKENS)
