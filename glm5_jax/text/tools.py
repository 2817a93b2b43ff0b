"""Tools: their definitions, and the calls of a reply typed and checked by them.

    weather = define("weather", "The weather in a city.", {"city": {"type": "string"}, "days": {"type": "integer"}},
                     required=["city"])
    reply = stream.read_ids(tokenizer, completion)
    message, errors = understand(reply, [weather])

A call's values carry no types; the schema decides. `understand` repairs nothing: what is wrong is in `errors`, by kind.
"""

import dataclasses
import enum
from typing import Any, Mapping, Sequence

from glm5_jax.text import schema, values
from glm5_jax.text.grammar import Fault, RawCall, Reply
from glm5_jax.text.reading import assistant_message

Tool = Mapping[str, Any]


class Misuse(enum.Enum):
    """How a well-formed call can miss its tool's definition."""

    UNKNOWN_TOOL = "no tool of that name"
    UNKNOWN_ARGUMENT = "an argument that the tool does not have"
    MISSING_ARGUMENT = "a required argument is left out"
    BAD_JSON = "the schema asks for a type that is written as JSON, and the value is none"
    BAD_VALUE = "the value is not what the schema asks for"
    UNCHECKED = "the schema uses a keyword that is not supported: the value may or may not be right"


Problem = tuple[Misuse, str]


@dataclasses.dataclass(frozen=True)
class CallError:
    """One thing that is wrong with a reply."""

    kind: Fault | Misuse
    call: int      # which call, from 0; -1 where none had begun
    detail: str    # where, what was expected, what was found


def define(name: str, description: str, properties: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    """A tool definition in its `function` envelope; `properties` maps an argument's name to its JSON schema.

    Raises ValueError as `check`.
    """
    parameters = {"type": "object", "properties": dict(properties), "required": list(required)}
    tool = {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
    check([tool])
    return tool


def check(tools: Sequence[Tool]) -> None:
    """Raises ValueError, naming the tool and the field, for definitions that calls cannot be checked against.

    Rendering does without this: the template prints any dict.
    """
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = _function(tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}.name: expected a name, found {name!r}")
        if name in seen:
            raise ValueError(f"{where}.name: expected a name of its own, found {name!r} again")
        seen.add(name)
        parameters = _parameters(function)
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise ValueError(f"{where}.parameters: expected a JSON schema of type object, found {parameters!r}")
        schema.check(parameters, f"{where}.parameters")
        properties, required = parameters.get("properties", {}), parameters.get("required", [])
        if not all(argument in properties for argument in required):
            raise ValueError(f"{where}.parameters.required: expected names of {list(properties)}, found {required!r}")


def understand(reply: Reply, tools: Sequence[Tool] | None = None) -> tuple[dict[str, Any], list[CallError]]:
    """The assistant message that a reply amounts to, and everything that is wrong with the reply.

    The message holds the well-formed calls; with `tools` their values are typed by the schemas, without, as
    `values.guessed` reads them. A malformed call is in no message, only among the errors. Raises ValueError for tool
    definitions that `check` rejects.
    """
    check(tools or ())
    errors = [CallError(event.fault, event.call, f"{event.fault.value} (at {event.text!r})")
              for event in reply.faults if event.fault]
    calls = []
    for call in reply.calls:
        arguments, problems = _typed(call, tools)
        calls.append((call.name, arguments))
        errors += [CallError(kind, call.index, detail) for kind, detail in problems]
    return assistant_message(reply.reasoning, reply.content, calls), errors


def _function(tool: Any) -> Any:
    return tool.get("function") or tool if isinstance(tool, Mapping) else tool


def _parameters(function: Mapping[str, Any]) -> Any:
    parameters = function.get("parameters")
    return {} if parameters is None else parameters


def _typed(call: RawCall, tools: Sequence[Tool] | None) -> tuple[dict[str, Any], list[Problem]]:
    guesses = {name: values.guessed(raw) for name, raw in call.arguments}
    if tools is None:
        return guesses, []
    functions = {_function(tool)["name"]: _function(tool) for tool in tools}
    if call.name not in functions:
        return guesses, [(Misuse.UNKNOWN_TOOL, f"expected one of {list(functions)}, found {call.name!r}")]
    parameters = _parameters(functions[call.name])
    properties = parameters.get("properties", {})
    # JSON Schema allows what it does not name; a model that invents an argument has made a mistake.
    others = parameters.get("additionalProperties", False)
    arguments: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, raw in call.arguments:
        wanted = properties.get(name, others)
        if wanted is False:
            problems.append((Misuse.UNKNOWN_ARGUMENT, f"expected one of {list(properties)}, found {name!r}"))
        arguments[name], wrong = (guesses[name], []) if wanted is False else _value(raw, wanted)
        problems += [(kind, f"{name}{detail}") for kind, detail in wrong]
    problems += [(Misuse.MISSING_ARGUMENT, f"expected a value of {name!r}, found none")
                 for name in parameters.get("required", []) if name not in arguments]
    looked_at = schema.ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}
    problems += [(Misuse.UNCHECKED, f"parameters.{keyword}: nothing was checked")
                 for keyword in parameters if keyword not in looked_at]
    return arguments, problems


def _value(raw: str, wanted: Any) -> tuple[Any, list[Problem]]:
    """The reading of a value, as a string or as JSON, that its schema accepts; else the likelier one and its faults."""
    readings = [raw]
    try:
        parsed = values.load(raw)
        readings += [] if isinstance(parsed, str) else [parsed]
    except ValueError:
        pass  # then it is a string, or it is wrong
    found = [schema.mismatches(reading, wanted) for reading in readings]
    accepted = [all(mismatch.unsupported for mismatch in some) for some in found]
    if all(accepted):
        value, faults = values.guessed(raw), found[0]
    elif any(accepted):
        value, faults = readings[accepted.index(True)], found[accepted.index(True)]
    else:
        no_string = any(mismatch.keyword == "type" and not mismatch.path for mismatch in found[0])
        value, faults = (readings[-1], found[-1]) if no_string else (raw, found[0])
        if no_string and len(readings) == 1:
            return raw, [(Misuse.BAD_JSON, f": {faults[0].detail}")]
    return value, [(Misuse.UNCHECKED if fault.unsupported else Misuse.BAD_VALUE, f"{fault.path}: {fault.detail}")
                   for fault in faults]
