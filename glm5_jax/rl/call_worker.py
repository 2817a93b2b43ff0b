"""The child process of `executors.Processes`: imports functions by name, calls them, answers with JSON.

A request is a line {"function": "module:name", "args": [...]}; the answers are two, {"value": null} once the function
is imported and {"value": ...} of its result, or {"error": traceback} in place of either.
"""

import json
import os
import pkgutil
import queue
import sys
import threading
import traceback
from typing import Any

from glm5_jax import records

_LONGEST = 10_000
_KINDS = {kind.__name__: kind for kind in (
    records.Completion, records.Failure, records.Group, records.PolicyVersion, records.Trajectory, records.Turn)}


def encode(value: Any) -> list:
    """A JSON value or a record as JSON; raises TypeError or ValueError for anything else."""
    name = type(value).__name__
    if _KINDS.get(name) is type(value):
        return [name, records.to_json(value)]
    return ["json", json.dumps(value, allow_nan=False)]


def decode(encoded: list) -> Any:
    name, text = encoded
    return json.loads(text) if name == "json" else records.from_json(_KINDS[name], text)


def main() -> None:
    lines, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints is no answer
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines, requests), daemon=True).start()
    own = os.getpid()

    def reply(answer: dict[str, Any]) -> None:
        if os.getpid() != own:
            os._exit(0)  # a child that the function has forked and let return
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    while True:
        try:
            request = json.loads(requests.get())
            function = pkgutil.resolve_name(request["function"])
            reply({"value": None})
            value = encode(function(*map(decode, request["args"])))
        except BaseException:
            reply({"error": traceback.format_exc()[-_LONGEST:]})
        else:
            reply({"value": value})
        sys.stdout.flush()


def _listen(lines: Any, requests: "queue.SimpleQueue[bytes]") -> None:
    """Hands requests on; when the parent is gone, so is this process, whatever it is doing."""
    for line in lines:
        requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
