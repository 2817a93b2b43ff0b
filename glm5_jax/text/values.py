"""Argument values and tool definitions as the chat format prints them, and the way back."""

import json
import math
import re
from typing import Any

NESTING = 100  # levels of lists and objects that `load` takes: what it gives can be copied and printed by recursion
SURROGATE = re.compile("[\ud800-\udfff]")


def dump(value: Any) -> str:
    """JSON as the template prints it: `", "` and `": "`, keys in their order, nothing escaped that JSON leaves free.

    Not all of it need be JSON: NaN and the infinities are printed as `NaN` and `Infinity`, as `json.dumps` does. Raises
    TypeError for objects of other types, ValueError for circular ones, RecursionError for those nested too deep.
    """
    return json.dumps(value, ensure_ascii=False)


def load(text: str) -> Any:
    """The value of a JSON text, one that can be printed, encoded and copied again.

    Raises ValueError if it is none (`NaN` and `Infinity` are not JSON), and for numbers beyond a float (`1e999`),
    halves of a surrogate pair, and more than `NESTING` levels.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("expected JSON, found brackets nested too deep") from error
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for one in level:
            if isinstance(one, float) and not math.isfinite(one):
                raise ValueError(f"expected finite numbers, found {dump(one)}")
            if isinstance(one, str) and (half := SURROGATE.search(one)):
                raise ValueError(f"expected surrogates in pairs, found {half[0]!r} alone")
            if isinstance(one, (dict, list)):
                if depth == NESTING:
                    raise ValueError(f"expected at most {NESTING} levels, found brackets nested too deep")
                below += [*one, *one.values()] if isinstance(one, dict) else one
        level, depth = below, depth + 1
    return value


def printed(value: Any) -> str:
    """An argument value in a call: a string as it is, without quotes or escapes, anything else as JSON."""
    return value if isinstance(value, str) else dump(value)


def guessed(raw: str) -> Any:
    """The value that `printed` has turned into `raw`, as far as that can be known without a schema.

    JSON that is not a string and is printed back with the same characters is taken for that value (`7`, `[1, 2]`,
    `true`), all else for a string (`1e5`, `[1,2]`, `"x"`). So `printed(guessed(raw)) == raw` always holds.
    """
    try:
        value = load(raw)
        return value if not isinstance(value, str) and dump(value) == raw else raw
    except (ValueError, RecursionError):
        return raw
