"""Argument values and tool definitions as the chat format prints them, and the way back."""

import json
from typing import Any, NoReturn


def dump(value: Any) -> str:
    """JSON as the template prints it: `", "` and `": "`, keys in their order, nothing escaped that JSON leaves free.

    Raises TypeError or ValueError for what JSON cannot say.
    """
    return json.dumps(value, ensure_ascii=False)


def load(text: str) -> Any:
    """The value of a JSON text; raises ValueError if it is none (`NaN` and `Infinity` are not JSON)."""
    try:
        return json.loads(text, parse_constant=_reject)
    except RecursionError as error:
        raise ValueError("expected JSON, found brackets nested too deep") from error


def _reject(constant: str) -> NoReturn:
    raise ValueError(f"expected JSON, found {constant}")


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
