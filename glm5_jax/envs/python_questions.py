"""Calculations that a small model does not do in its head, and a Python interpreter that does them.

    env = tool_loop.ToolLoop(functools.partial(python_questions.problem, level=2))
"""

from concurrent.futures import ThreadPoolExecutor

from glm5_jax.envs.base import Failed
from glm5_jax.envs.sandbox import Sandbox
from glm5_jax.envs.tool_loop import Problem, Tool, ToolError, conversation
from glm5_jax.envs.tools_python import CallOutcome, PythonTool
from glm5_jax.envs.verifiable.arithmetic import parse_number
from glm5_jax.envs.verifiable.task import INSTRUCTION, Dice, Task, graded
from glm5_jax.records import Failure, FailureReason, Message

DEFINITION: Message = {
    "name": "python", "parameters": {"properties": {"code": {"type": "string"}}, "required": ["code"]}}


def problem(seed: int, level: int = 1, *, instruction: str = INSTRUCTION, sandbox: Sandbox | None = None,
            call_s: float = 10.0, output_chars: int = 200) -> Problem:
    """The value of an expression, levels 1 to 3, and the tool `python` to find it with.

    The interpreter starts at the first call, in `sandbox`, or in one with the default limits. `call_s` and
    `output_chars` are those of `tools_python.PythonTool`.
    """
    interpreter = _Interpreter(PythonTool(sandbox, call_s=call_s, output_chars=output_chars))
    return Problem(_question(seed, level, instruction)[0], (Tool(DEFINITION, interpreter.call),), interpreter.close)


def demonstration(seed: int, level: int = 1, *, instruction: str = INSTRUCTION) -> list[Message]:
    """The messages of the same `problem` solved, without a thought; nothing is run for it."""
    task, code = _question(seed, level, instruction)
    return conversation(task, [("python", {"code": code}, task.solution)])


def _question(seed: int, level: int, instruction: str) -> tuple[Task, str]:
    """The task, and the code that solves it: the expression as the question writes it. No value has five digits."""
    largest = graded(level, (99, 99, 999))
    dice = Dice("python", level, seed)
    a, b, c = (dice.between(largest // 9, largest) for _ in range(3))
    code, value = ((f"{a} * {b}", a * b), (f"{a} * {b} + {c}", a * b + c), (f"{a} * {b} % {c}", a * b % c))[level - 1]
    task = Task(f"python-{level}", seed, f"What is {code}? {instruction}".strip(), str(value),
                lambda answer: parse_number(answer) == value)
    return task, code


class _Interpreter:
    """A Python tool in a thread of its own: it dies with the thread that started it, and steps come from any."""

    def __init__(self, tool: PythonTool):
        self._tool, self._thread = tool, ThreadPoolExecutor(1)

    def call(self, code: str) -> str:
        result = self._thread.submit(self._tool.call, code).result()
        if result.outcome is CallOutcome.KILLED:  # not by the code
            raise Failed(Failure(FailureReason.ENVIRONMENT, "step", result.text()))
        if result.outcome is not CallOutcome.OK:
            raise ToolError(result.text())
        return result.text()

    def close(self) -> None:
        try:
            self._thread.submit(self._tool.close).result()
        finally:
            self._thread.shutdown()
