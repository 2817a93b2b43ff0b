"""A Python interpreter as an agent's tool: it runs in the sandbox and keeps its variables from call to call."""

import dataclasses
import enum
import json
import math
import secrets
from pathlib import Path
from typing import Any

from glm5_jax.envs import python_driver
from glm5_jax.envs.sandbox import Process, Sandbox

# Starting an interpreter is not the code's time.
_START_S = 60.0

DEFINITION: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python code and returns what it prints, and the value of a last expression. Variables, "
                       "imports and files in the working directory are kept from call to call. There is no network.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code to run."}},
            "required": ["code"],
            "additionalProperties": False,
        },
    },
}


class CallOutcome(enum.StrEnum):
    """How a call ended. After the first two the interpreter lives on, after the others its state is lost."""

    OK = "ok"
    ERROR = "error"
    """The code raised an exception, or is not Python."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT = "output"
    BLOCKED = "blocked"
    EXIT = "exit"
    """The interpreter ended: the code crashed it, or called os._exit."""
    KILLED = "killed"
    """Somebody killed the interpreter from outside, or the thread that started it has ended."""
    PROTOCOL = "protocol"
    """The code interfered with the channel on which replies come."""


_LOST = {
    CallOutcome.TIMEOUT: "the call took longer than {call_s:g} s",
    CallOutcome.MEMORY: "the code used more than {memory_mib} MiB of memory",
    CallOutcome.OUTPUT: "the reply was too long",
    CallOutcome.BLOCKED: "the code made a system call that is forbidden here",
    CallOutcome.EXIT: "the interpreter ended with code {returncode}",
    CallOutcome.KILLED: "the interpreter was killed from outside, or the thread that started it has ended",
    CallOutcome.PROTOCOL: "the code interfered with the interpreter's own input or output",
}


@dataclasses.dataclass(frozen=True)
class CallResult:
    """What one call did."""

    outcome: CallOutcome
    output: str
    """What was written to stdout and stderr, cut at the tool's limit."""
    value: str | None = None
    """repr of the last statement's value where that is an expression, None for none and for None."""
    error: str | None = None
    """The traceback, or why the interpreter's state is lost."""
    truncated: bool = False
    """Output, value or traceback was longer than the limit, and cut."""

    @property
    def state_kept(self) -> bool:
        return self.outcome in (CallOutcome.OK, CallOutcome.ERROR)

    def text(self) -> str:
        """The tool message for the model."""
        parts = [self.output.rstrip("\n"), self.value or "", (self.error or "").rstrip("\n")]
        if self.truncated:
            parts.append(f"[cut to {max(map(len, (self.output, self.value or '', self.error or '')))} characters]")
        return "\n".join(part for part in parts if part)


class PythonTool:
    """One interpreter, started at the first call and again after its state was lost; use it as a context manager.

    `call_s`: seconds for each call. `output_chars`: characters kept of a call's output, of its value and of its
    traceback, each. The limits of `sandbox` hold for the interpreter's whole life, `wall_s` excepted. All calls must
    come from one thread: an interpreter dies with the thread that started it.
    """

    definition = DEFINITION

    def __init__(self, sandbox: Sandbox | None = None, *, call_s: float = 10.0, output_chars: int = 10_000) -> None:
        if not 0 < call_s < math.inf:
            raise ValueError(f"call_s: expected a positive, finite number, found {call_s!r}")
        if not isinstance(output_chars, int) or output_chars < 1:
            raise ValueError(f"output_chars: expected a positive integer, found {output_chars!r}")
        self._sandbox = Sandbox() if sandbox is None else sandbox
        self._call_s, self._output_chars = call_s, output_chars
        self._process: Process | None = None

    def __enter__(self) -> "PythonTool":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the interpreter; the next call would start another."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def call(self, code: str) -> CallResult:
        """Runs `code` in the interpreter. Raises SandboxUnavailable where this machine cannot make a sandbox."""
        try:
            if self._process is None:
                source = Path(python_driver.__file__).read_text(encoding="utf-8")
                self._process = self._sandbox.start(["python", "-u", "-c", source])
                ready = self._ask("", _START_S)
                if ready.outcome is not CallOutcome.OK:
                    return ready
            return self._ask(code, self._call_s)
        except BaseException:
            # The interpreter may be gone, or may still answer this call: the next one needs another.
            self.close()
            raise

    def _ask(self, code: str, seconds: float) -> CallResult:
        assert self._process is not None
        number, longest = secrets.token_hex(16), self._output_chars
        # One character more than is kept tells what was cut; nor is the guest trusted to cut at all.
        request = json.dumps({"id": number, "code": code, "longest": longest + 1})
        reply = self._process.exchange(request, wall_s=seconds)
        output = reply.stderr[:longest]
        truncated = reply.truncated or len(reply.stderr) > len(output)
        answer = _read(reply.line, number)
        if reply.outcome is None and answer is not None:
            value, error = answer["value"], answer["error"]
            truncated = truncated or any(len(text or "") > longest for text in (value, error))
            return CallResult(CallOutcome.OK if error is None else CallOutcome.ERROR, output,
                              value and value[:longest], error and error[-longest:], truncated)
        self.close()
        outcome = CallOutcome.PROTOCOL if reply.outcome is None else CallOutcome(reply.outcome)
        why = _LOST[outcome].format(call_s=seconds, memory_mib=self._sandbox.limits.memory_bytes // 2**20,
                                    returncode=reply.returncode)
        error = f"{why}. All variables are lost; the next call starts a new interpreter."
        return CallResult(outcome, output, None, error, truncated)


def _read(line: str | None, number: str) -> dict[str, str | None] | None:
    """The reply to request `number`, with both its fields; None for anything else: only the code can have sent that."""
    try:
        reply = json.loads(line or "")
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict) or reply.get("id") != number:
        return None
    fields = {name: reply.get(name) for name in ("value", "error")}
    if not all(text is None or isinstance(text, str) for text in fields.values()):
        return None
    # JSON may hold lone surrogates, which no file and no tokenizer takes.
    return {name: text and text.encode("utf-8", "backslashreplace").decode() for name, text in fields.items()}
