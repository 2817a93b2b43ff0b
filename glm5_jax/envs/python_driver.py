"""The guest's side of the Python tool: its source runs inside the sandbox, on the standard library alone.

Requests come as JSON lines on stdin, replies leave as JSON lines on stdout. Before the first one both are moved to
descriptors of their own, so that code which prints, reads, or starts programs meets /dev/null and stderr instead.
"""

import ast
import json
import linecache
import os
import sys
import traceback
import types
from typing import Any


def evaluate(code: str, name: str, namespace: dict[str, Any], longest: int) -> dict[str, Any]:
    """Runs `code`; {"value": repr of a last expression or None} or {"error": traceback}, `longest` characters each."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        tree = ast.parse(code, name)
        last = tree.body[-1] if tree.body else None
        steps = []
        if isinstance(last, ast.Expr):
            tree.body.pop()
            steps = [compile(ast.Expression(last.value), name, "eval")]
        steps = [compile(tree, name, "exec"), *steps]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"error": "".join(traceback.format_exception_only(type(error), error))[-longest:]}
    try:
        value = None
        for step in steps:
            value = eval(step, namespace)
        return {"value": None if value is None else repr(value)[:longest]}
    except BaseException as error:
        return {"error": _describe(error)[-longest:]}


def _describe(error: BaseException) -> str:
    """The traceback without our own frame; errors may have methods that raise errors."""
    try:
        inner = error.__traceback__.tb_next if error.__traceback__ else None
        return "".join(traceback.format_exception(type(error), error, inner))
    except BaseException:
        return f"{type(error).__name__}\n"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass  # the code has closed or replaced it


def main() -> None:
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    for count, line in enumerate(requests):
        request = json.loads(line)
        reply = evaluate(request["code"], f"<call {count}>", module.__dict__, request["longest"])
        _flush()
        replies.write(json.dumps({"id": request["id"], **reply}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
