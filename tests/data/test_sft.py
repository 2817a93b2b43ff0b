"""Conversations in packed rows: what is learned is exactly what the model has to say, and nothing is lost unsaid."""

import json

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from glm5_jax.data.sft import Conversation, by_turn, encode, pack, read
from glm5_jax.text import chat
from glm5_jax.text.thinking import INTERLEAVED, PRESERVED
from glm5_jax.text.tokenizer import Tokenizer

ASK = {"role": "user", "content": "two and two?"}
ANSWER = {"role": "assistant", "reasoning_content": "easy", "content": "four"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.packaged()


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def learned(tokenizer, conversation):
    """The text of each unbroken run of learned tokens."""
    ids, weights = encode(tokenizer, conversation)
    runs, last = [], 0.0
    for id, weight in zip(ids.tolist(), weights):
        if weight:
            runs += [] if last else [[]]
            runs[-1].append(id)
        last = weight
    return [tokenizer.decode(run) for run in runs]


def test_read_written_out(tmp_path):
    path = written(tmp_path / "chat.jsonl", {"messages": [ASK, ANSWER]}, "", "  ", {
        "messages": [ASK, ANSWER], "tools": [TOOL], "thinking": "preserved", "erroneous": [[3, 5]],
        "metadata": {"id": 7}}, {"messages": [ASK], "tools": None, "erroneous": None})
    assert read(path) == (
        Conversation((ASK, ANSWER), place=f"{path}:1"),
        Conversation((ASK, ANSWER), (TOOL,), PRESERVED, ((3, 5),), f"{path}:4"),
        Conversation((ASK,), (), INTERLEAVED, (), f"{path}:5"))


@pytest.mark.parametrize("line, message", [
    ("{", "expected a JSON object in UTF-8"), ("[" * 100_000, "nested too deep"), ("[1]", "a JSON object, found list"),
    ('{"messages": NaN}', "found NaN"), ("{}", "at least one message in the field 'messages'"),
    ({"messages": []}, "at least one message"), ({"messages": "hi"}, "a list of objects in the field 'messages'"),
    ({"messages": ["hi"]}, "a list of objects"), ({"messages": [ASK], "tools": {"a": 1}}, "in the field 'tools'"),
    ({"messages": [ASK], "erronous": []}, "found 'erronous', did you mean 'erroneous'"),
    ({"messages": [ASK], "id": 3}, "found 'id', which belongs under 'metadata'"),
    ({"messages": [ASK], "thinking": "loud"}, r"one of \['interleaved', 'preserved'\].*found 'loud'"),
    ({"messages": [ASK], "thinking": []}, "in the field 'thinking'"),
    ({"messages": [ASK], "erroneous": [[1, 2, 3]]}, "expected .start, end. pairs"),
    ({"messages": [ASK], "erroneous": [[0, True]]}, "expected .start, end. pairs"),
    ({"messages": [ASK], "erroneous": 3}, "pairs in the field 'erroneous', found 3"),
])
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    path = written(tmp_path / "chat.jsonl", {"messages": [ASK]}, "", line, {"messages": [ASK]})
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="found an empty file"):
        read(written(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes('{"messages": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl:1: expected a JSON object in UTF-8"):
        read(tmp_path / "latin.jsonl")


def test_what_cannot_be_rendered_is_named_by_its_line(tmp_path, tokenizer):
    path = written(tmp_path / "chat.jsonl", {"messages": [ASK]}, {"messages": [{"role": "robot", "content": "x"}]})
    with pytest.raises(ValueError, match=r"chat.jsonl:2: messages\[0\].role"):
        pack(tokenizer, read(path), 64)
    path = written(tmp_path / "chat.jsonl", {"messages": [ASK], "erroneous": [[0, 999]]})
    with pytest.raises(ValueError, match="chat.jsonl:1: erroneous: expected parts within"):
        pack(tokenizer, read(path), 64)


def test_what_is_learned_written_out(tokenizer):
    call = {"role": "assistant", "reasoning_content": "sum", "tool_calls": [{"name": "add", "arguments": {}}]}
    result = {"role": "tool", "content": "4"}
    steps = (ASK, call, result, ANSWER)
    called = "sum</think><tool_call>add</tool_call><|observation|>"
    assert learned(tokenizer, Conversation(steps)) == [called, "easy</think>four<|user|>"]
    assert learned(tokenizer, Conversation(steps[:2])) == [called]  # a call that nothing answers stops alike
    assert learned(tokenizer, Conversation(steps[:3])) == [called]
    # The thoughts before a new question are not shown.
    assert learned(tokenizer, Conversation((*steps, ASK))) == [
        "<tool_call>add</tool_call><|observation|>", "four<|user|>"]
    assert learned(tokenizer, Conversation((*steps, ASK), thinking=PRESERVED)) == [called, "easy</think>four<|user|>"]
    wrong_call, wrong_answer = {**call, "weight": 0}, {**ANSWER, "weight": 0}
    assert learned(tokenizer, Conversation((ASK, wrong_call, result, ANSWER))) == ["easy</think>four<|user|>"]
    assert learned(tokenizer, Conversation((ASK, call, result, wrong_answer))) == [called]
    at = chat.render(steps).index("sum")
    assert learned(tokenizer, Conversation(steps, erroneous=((at, at + 3),)))[0] == called.removeprefix("sum")


def test_the_added_stop_is_the_next_prompt(tokenizer):
    """The ids of a conversation, its stop included, begin those of a longer one."""
    ids, weights = encode(tokenizer, Conversation((ASK, ANSWER), thinking=PRESERVED))
    longer, longer_weights = encode(tokenizer, Conversation((ASK, ANSWER, ASK, ANSWER), thinking=PRESERVED))
    assert np.array_equal(ids, longer[:len(ids)])
    assert np.array_equal(weights, longer_weights[:len(ids)])


def test_each_turn_learns_its_own_thoughts(tokenizer):
    system = {"role": "system", "content": "be brief"}
    second = {"role": "assistant", "reasoning_content": "hm", "content": "six"}
    whole = Conversation((system, ASK, ANSWER, ASK, second, ASK), place="here")
    assert learned(tokenizer, whole) == ["four<|user|>", "six<|user|>"]
    first, last = by_turn(whole)
    assert first == Conversation((system, ASK, ANSWER), place="here")
    assert learned(tokenizer, first) == ["easy</think>four<|user|>"]
    assert last.messages == (system, ASK, {**ANSWER, "weight": 0}, ASK, second)
    assert learned(tokenizer, last) == ["hm</think>six<|user|>"]
    assert by_turn(Conversation((ANSWER, ASK))) == (Conversation((ANSWER,)),)
    with pytest.raises(ValueError, match="here: expected no erroneous parts"):
        by_turn(Conversation((ASK, ANSWER), erroneous=((0, 1),), place="here"))


turn = st.builds(lambda said, thought, answer, weight: (
    {"role": "user", "content": said},
    {"role": "assistant", "reasoning_content": thought, "content": answer, "weight": weight}),
    st.text(max_size=12), st.text(max_size=12), st.text(max_size=12), st.sampled_from([0, 1, 1]))
conversations = st.lists(st.builds(
    lambda turns, preserved: (tuple(message for pair in turns for message in pair), preserved),
    st.lists(turn, min_size=1, max_size=3), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=60)
@given(conversations, st.integers(8, 90), st.sampled_from(["drop", "cut"]))
def test_rows_hold_exactly_what_the_report_says(tokenizer, found, length, over_long):
    found = [Conversation(messages, thinking=PRESERVED if preserved else INTERLEAVED, place=str(index))
             for index, (messages, preserved) in enumerate(found)]
    encoded = [encode(tokenizer, conversation) for conversation in found]
    expected = {}
    for index, (ids, weights) in enumerate(encoded):
        if (len(ids) <= length or over_long == "cut") and weights[:length].any():
            expected[index] = (ids[:length], weights[:length])
    if not expected:
        with pytest.raises(ValueError, match=f"of {len(found)}, "):
            pack(tokenizer, found, length, over_long=over_long)
        return
    rows, report = pack(tokenizer, found, length, over_long=over_long)
    # Each segment, read back with its weights moved to the token they are of, is one conversation.
    segments = []
    for row in range(len(rows.tokens)):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            here = rows.segment_ids[row] == segment
            segments.append((rows.tokens[row][here].tolist(), [0.0, *rows.weights[row][here][:-1].tolist()]))
            assert rows.weights[row][here][-1] == 0
            assert rows.targets[row][here][:-1].tolist() == rows.tokens[row][here][1:].tolist()
    assert sorted(segments) == sorted((ids.tolist(), weights.tolist()) for ids, weights in expected.values())
    long = {str(index) for index, (ids, _) in enumerate(encoded) if len(ids) > length}
    kept = set(map(str, expected))
    assert report.kept == len(kept)
    assert set(report.cut) == long & kept
    assert set(report.over_long) == (long if over_long == "drop" else set())
    assert set(report.cut) | set(report.over_long) | set(report.unlearned) | kept == set(map(str, range(len(found))))
    assert report.kept + len(report.over_long) + len(report.unlearned) == len(found)
    assert report.learned == rows.weights.sum()
    assert report.tokens == (rows.segment_ids > 0).sum()


def test_other_errors(tokenizer):
    with pytest.raises(ValueError, match="over_long: expected 'drop' or 'cut', found 'keep'"):
        pack(tokenizer, [Conversation((ASK, ANSWER))], 64, over_long="keep")
    with pytest.raises(ValueError, match="of 2, 1 are longer and 1 hold nothing to learn"):
        pack(tokenizer, [Conversation((ASK, ANSWER)), Conversation(())], 4)
    with pytest.raises(ValueError, match="of 0, 0 are longer"):
        pack(tokenizer, [], 64)
