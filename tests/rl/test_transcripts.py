"""The log of rollouts: every one on the disk, in one form, whatever was torn."""

import json
import os

import pytest

from glm5_jax.records import Completion, Failure, Trajectory, Turn, extend
from glm5_jax.rl.transcripts import Transcripts, normalised, read, transcript

QUESTION = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "2"}


def rollout(id: str = "sums-0", **fields) -> Trajectory:
    first = Turn([QUESTION], ANSWER, prompt=(5,), completion=Completion((7,), (-0.5,), (3,), "stop"))
    again = extend([first], [QUESTION, ANSWER, {"role": "user", "content": "Sure?"}], ANSWER, prompt=(5, 7, 8),
                   completion=Completion((7,), (-0.25,), (4,), "stop"), reward=1)
    fork = Turn([QUESTION], {"role": "assistant", "content": "two"}, prompt=(5,),
                completion=Completion((9,), (-0.5,), (4,), "stop"))
    return Trajectory(**{"id": id, "task": "sums", "seed": 3, "turns": [first, again, fork], "end": "done"} | fields)


def test_a_rollout_is_one_line_with_a_list_for_each_context(tmp_path):
    with Transcripts(tmp_path / "new" / "log.jsonl") as log:
        log.add(rollout())
        log.add(rollout("sums-1", turns=[], end="failed", failure=Failure("worker", "rollout", "gone")))
    one, two = read(tmp_path / "new" / "log.jsonl")
    assert one == json.loads(json.dumps(transcript(rollout())))
    assert (one["id"], one["reward"], one["versions"], one["failure"]) == ("sums-0", 1.0, [3, 4], None)
    assert [[message["content"] for message in context] for context in one["contexts"]] == [
        ["1 + 1?", "2", "Sure?", "2"], ["1 + 1?", "two"]]
    assert (two["reward"], two["versions"], two["contexts"]) == (None, None, [])
    assert two["failure"] == {"reason": "worker", "place": "rollout", "detail": "gone"}


def test_a_torn_line_costs_only_itself(tmp_path):
    path = tmp_path / "log.jsonl"
    with Transcripts(path) as log:
        log.add(rollout("a"))
        log.add(rollout("b"))
    path.write_bytes(path.read_bytes()[:-20])
    assert [one["id"] for one in read(path)] == ["a"]
    for id in "cd":
        with Transcripts(path) as log:
            log.add(rollout(id))
    assert [one["id"] for one in read(path)] == ["a", "c", "d"]


def test_a_full_disk_costs_the_lines_it_does_not_take(tmp_path, monkeypatch):
    write, room = os.write, [100]

    def limited(file, line):
        if not room[0]:
            raise OSError("no space left on device")
        taken = write(file, line[:room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", limited)
    with Transcripts(tmp_path / "log.jsonl") as log:
        with pytest.raises(OSError, match="no space left"):
            log.add(rollout("a"))
        monkeypatch.undo()
        for id in "bc":
            log.add(rollout(id))
    assert [one["id"] for one in read(tmp_path / "log.jsonl")] == ["b", "c"]


def test_text_that_is_no_text_is_kept(tmp_path):
    odd = "half a pair \ud83d, two\nlines, \u2028, ü"
    with Transcripts(tmp_path / "log.jsonl") as log:
        log.add(rollout(turns=[Turn([{"role": "user", "content": odd}], ANSWER)]))
    one, = read(tmp_path / "log.jsonl")
    assert one["contexts"][0][0]["content"] == odd


def test_messages_have_one_form():
    call = {"function": {"name": "ls", "arguments": {"path": "/tmp"}}}
    found = normalised([
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "assistant", "reasoning_content": "Look.", "tool_calls": [call, {"name": "pwd"}]},
        {"role": "tool", "content": {"files": []}}, {"role": "tool", "content": "/"},
        {"role": "assistant", "content": "", "tool_calls": [call | {"id": "mine"}]},
        {"role": "tool", "content": "b", "tool_call_id": "mine"}])
    assert found == [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "ls", "arguments": '{"path": "/tmp"}'}},
            {"id": "call_1", "type": "function", "function": {"name": "pwd", "arguments": "{}"}}]},
        {"role": "tool", "content": '{"files": []}', "tool_call_id": "call_0"},
        {"role": "tool", "content": "/", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "mine", "type": "function", "function": {"name": "ls", "arguments": '{"path": "/tmp"}'}}]},
        {"role": "tool", "content": "b", "tool_call_id": "mine"}]
    assert normalised(found) == found
