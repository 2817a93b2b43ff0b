"""The child process of a rubric: calls reward functions that come pickled by name, and answers with JSON.

A request is a line: an id that its answer repeats, a space, and base64; pickled in it, (functions to import, seconds,
arguments, keyword arguments). The last of the functions is called where there are arguments, in no more than those
seconds.
"""

import base64
import json
import math
import numbers
import os
import pickle
import signal
import sys
import traceback
from typing import Any

_LONGEST = 10_000


def answer(request: bytes) -> dict[str, Any]:
    """{"value": a float, or the repr of what is no reward} or {"error": traceback}."""
    try:
        functions, seconds, arguments, keywords = pickle.loads(base64.b64decode(request))
        if arguments is None:
            return {"value": None}
        # Should the parent have died, nobody else ends a function that hangs.
        signal.alarm(math.ceil(seconds) + 1)
        value = functions[-1](*arguments, **keywords)
        real = isinstance(value, numbers.Real)
        return {"value": float(value) if real and 0 <= value <= 1 else repr(value)[:_LONGEST]}
    except BaseException:
        return {"error": traceback.format_exc()[-_LONGEST:]}
    finally:
        signal.alarm(0)


def main() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    own = os.getpid()
    for line in requests:
        number, _, request = line.partition(b" ")
        found = answer(request)
        if os.getpid() != own:
            os._exit(0)  # a child that the function has forked and let return
        replies.write(json.dumps({"id": number.decode(), **found}) + "\n")
        replies.flush()
        sys.stdout.flush()


if __name__ == "__main__":
    main()
