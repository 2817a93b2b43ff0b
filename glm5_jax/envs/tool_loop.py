"""Questions over several turns: the model calls tools, reads their results, and gives an answer when it has one.

    env = ToolLoop(functools.partial(lookup.problem, level=2))
    trajectory = run_episode(env, generate, task="lookup-2", seed=7, limits=Limits(turns=5))

A reply with calls gets a result for each, in their order. One without calls that gives an answer, by the contract of
`verifiable.task`, ends the episode and earns 1 or 0. One with neither is told so and may try again: calls that break
the chat format are in no message, so what was meant as a call may look like that.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glm5_jax.envs.base import Failed, Start, Step
from glm5_jax.envs.verifiable.task import Dice, Task, final_answer
from glm5_jax.records import Failure, FailureReason, Message
from glm5_jax.text import schema, values

NEITHER = "error: no call and no answer"
_FLAKY_STEPS = 10**6


class ToolError(Exception):
    """Raised by a tool for what the model did wrong: its text is the result of the call, and the episode goes on."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """What the model may call. Whatever `run` raises but ToolError says that the environment has failed."""

    definition: Message  # JSON schema, with or without the `function` envelope
    run: Callable[..., str]  # called with the arguments by name, checked against the definition

    @property
    def function(self) -> Mapping[str, Any]:
        """The definition without its envelope."""
        return self.definition.get("function") or self.definition


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question, and the tools to answer it with."""

    task: Task
    tools: tuple[Tool, ...]
    close: Callable[[], None] = lambda: None  # frees what the tools hold; called once


class ToolLoop:
    """The environment of one question that tools help to answer: `make` gives the problem of a seed.

    Without `tools_in_prompt` the model is not told of the tools and has to know them from its training; a prompt is
    then shorter by more than 150 tokens, most of them the template's. What reads its replies has no schema then, and
    takes an argument that looks like a number for one.

    `flaky`, for tests and demonstrations of failure handling, is the share of episodes in which the environment fails
    at the first reply. The seed settles which; `rollout`, the id of a rollout, makes those of one problem fail each by
    itself. Raises ValueError for a share that is not from 0 to 1.
    """

    def __init__(self, make: Callable[[int], Problem], *, tools_in_prompt: bool = True, flaky: float = 0.0,
                 rollout: str = ""):
        if not 0 <= flaky <= 1:
            raise ValueError(f"flaky: expected a share from 0 to 1, found {flaky!r}")
        self._make, self._tools_in_prompt, self._flaky, self._rollout = make, tools_in_prompt, flaky, rollout
        self._problem: Problem | None = None

    def reset(self, seed: int) -> Start:
        self._problem = self._make(seed)
        tools = tuple(tool.definition for tool in self._problem.tools) if self._tools_in_prompt else ()
        return Start(({"role": "user", "content": self._problem.task.prompt},), tools)

    def step(self, message: Message) -> Step:
        if self._problem is None:
            raise RuntimeError("ToolLoop.step: expected a reset before it, found none")
        task = self._problem.task
        if Dice("flaky", self._rollout, task.name, task.seed).below(_FLAKY_STEPS) < self._flaky * _FLAKY_STEPS:
            raise Failed(Failure(FailureReason.ENVIRONMENT, "step", f"made to fail: flaky is {self._flaky:g}"))
        results = call_tools(message, self._problem.tools)
        answered = not results and final_answer(message) is not None
        info = {"calls": len(results), "errors": sum(not well for _, well in results), "answered": answered}
        if answered:
            return Step((), task.reward(message), True, info)
        texts = [text for text, _ in results] or [NEITHER]
        return Step(tuple({"role": "tool", "content": text} for text in texts), info=info)

    def close(self) -> None:
        problem, self._problem = self._problem, None
        if problem is not None:
            problem.close()


def call_tools(message: Message, tools: Iterable[Tool]) -> list[tuple[str, bool]]:
    """The result of each call in an assistant's message, and whether it is one: (text for the model, True or False).

    A call that is malformed, of no such tool, or with arguments that its definition does not allow, results in a text
    that says so. Passes on what tools raise, ToolError excepted.
    """
    by_name = {tool.function["name"]: tool for tool in tools}
    calls = message.get("tool_calls") or []
    return [_result(call, by_name) for call in (calls if isinstance(calls, (list, tuple)) else [calls])]


def conversation(task: Task, calls: Sequence[tuple[str, Mapping[str, Any], str]]) -> list[Message]:
    """How a task is solved, to be learned from: its prompt, a turn for each (name, arguments, result), its solution."""
    messages: list[Message] = [{"role": "user", "content": task.prompt}]
    for name, arguments, result in calls:
        messages += [{"role": "assistant", "content": "",
                      "tool_calls": [{"function": {"name": name, "arguments": dict(arguments)}}]},
                     {"role": "tool", "content": result}]
    return messages + [{"role": "assistant", "content": f"<answer>{task.solution}</answer>"}]


def _result(call: Any, tools: Mapping[str, Tool]) -> tuple[str, bool]:
    try:
        tool, arguments = _understood(call, tools)
        return tool.run(**arguments), True
    except ToolError as error:
        return str(error), False


def _understood(call: Any, tools: Mapping[str, Tool]) -> tuple[Tool, dict[str, Any]]:
    """The tool that is called and its arguments; raises ToolError for a call that cannot be made."""
    inner = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ToolError("error: not a call")
    name, arguments = inner["name"], inner.get("arguments") or {}
    if name not in tools:
        raise ToolError(f"error: no tool {name!r}, only {', '.join(tools)}")
    if isinstance(arguments, str):
        try:
            arguments = values.load(arguments)
        except ValueError as error:
            raise ToolError(f"error: arguments: {error}") from error
    # JSON Schema allows what it does not name; a model that invents an argument has made a mistake.
    wanted = {"type": "object", "additionalProperties": False, **tools[name].function.get("parameters", {})}
    if wrong := schema.mismatches(arguments, wanted):
        first = wrong[0]
        raise ToolError(f"error: {first.path.removeprefix('.') or 'arguments'}: {first.detail}")
    return tools[name], dict(arguments)
