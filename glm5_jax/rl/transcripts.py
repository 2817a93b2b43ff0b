"""The log of what was said: one line of JSON for every rollout that has ended, its messages in the OpenAI form.

It is for people and for the tools they have; what training needs is in the ledger. A rollout that is played again after
a crash is logged again: the last line of an id counts.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from glm5_jax.records import Message, Trajectory


class Transcripts:
    """The log in the file `path`, made where there is none. `add` returns when its line is on the disk."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)

    def close(self) -> None:
        """Closes the file; what was written stays."""
        os.close(self._file)

    def __enter__(self) -> "Transcripts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, trajectory: Trajectory) -> None:
        """Appends one rollout. Raises OSError where the disk does not take it, and ValueError or TypeError for messages
        that are no JSON."""
        line = json.dumps(transcript(trajectory), ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
        line += b"\n"
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            line = b"\n" + line  # a crash or a full disk has cut a line short: it stays a line of its own
        while line:
            line = line[os.write(self._file, line):]
        os.fsync(self._file)


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rollouts of a log, in the order of their ends; a line that a crash has torn is left out."""
    with open(path, "rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def transcript(trajectory: Trajectory) -> dict[str, Any]:
    """Everything but the tokens, as JSON; one list of messages for every context that no later turn went on with."""
    turns = trajectory.turns
    went_on = {turn.extends for turn in turns}
    contexts = [[*trajectory.sent(i), turn.reply] for i, turn in enumerate(turns) if i not in went_on]
    versions = [turn.completion.versions for turn in turns if turn.completion and turn.completion.versions]
    failure = trajectory.failure
    return {"id": trajectory.id, "task": trajectory.task, "seed": trajectory.seed, "end": trajectory.end.value,
            "failure": None if failure is None else vars(failure), "reward": trajectory.reward,
            "versions": [versions[0][0], versions[-1][-1]] if versions else None, "tools": trajectory.tools,
            "contexts": [normalised(context) for context in contexts]}


def normalised(messages: list[Message]) -> list[Message]:
    """The messages as OpenAI's chat API has them: content as text, arguments as JSON text, and every call with an id
    that its result repeats. Fields of other names stay."""
    found: list[Message] = []
    asked: list[str] = []  # ids of calls that have no result yet
    count = 0
    for message in messages:
        message = {**message, "content": _text(message.get("content"))}
        if calls := message.get("tool_calls"):
            asked = []
            message["tool_calls"] = []
            for call in calls:
                function = call.get("function", call)
                asked.append(call.get("id") or f"call_{count}")
                count += 1
                message["tool_calls"].append({"id": asked[-1], "type": "function", "function": {
                    "name": function.get("name"), "arguments": _json(function.get("arguments"))}})
        if message["role"] == "tool" and not message.get("tool_call_id") and asked:
            message["tool_call_id"] = asked.pop(0)  # results stand in the order of their calls
        found.append(message)
    return found


def _text(content: Any) -> str | None:
    """The text of a content that may come in parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, Mapping) else str(part) for part in content)
    return content if content is None or isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
