"""The grammar of what a model writes behind a generation prompt: a thought, an answer, calls.

`step` reads one segment, `collect` gathers what a whole completion says. It is one pass without a way back, so that a
completion can be read while it is written (`stream`); what departs from the format is reported, never repaired.
"""

import dataclasses
import enum
from typing import Iterable

from glm5_jax.text.segments import Segment


class Kind(enum.Enum):
    """What an event reports."""

    REASONING = "reasoning"      # more of the thought
    THOUGHT_END = "thought_end"  # the thought is closed
    CONTENT = "content"          # more of the answer
    CALL = "call"                # a call begins, `text` is the function's name
    ARGUMENT = "argument"        # an argument begins, `text` is its name
    VALUE = "value"              # more of that argument's value, as written
    CALL_END = "call_end"        # the call is complete
    FAULT = "fault"              # `fault` says which; a call that was open is void
    STOP = "stop"                # the stop token, `text` is its spelling


class Fault(enum.Enum):
    """How a completion can leave the format."""

    UNCLOSED_THOUGHT = "the completion ends inside the thought"
    UNCLOSED_CALL = "the completion ends inside a call"
    MISSING_NAME = "a call without a function name"
    MISSING_VALUE = "an argument name that is not followed by <arg_value>"
    DUPLICATE_ARGUMENT = "an argument given twice"
    UNEXPECTED = "something in a call where <arg_key> or </tool_call> has to stand"
    TEXT_AFTER_CALL = "text after a call; it counts as content"


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of a stream; `call` counts the calls begun, from 0, and is -1 before the first.

    The `text` of a fault is the marker, or the first letter of the text, at which it showed.
    """

    kind: Kind
    text: str = ""
    call: int = -1
    fault: Fault | None = None


class Mode(enum.Enum):
    """What the reader is inside of, or has just left."""

    THOUGHT = enum.auto()
    CONTENT = enum.auto()
    NAME = enum.auto()
    KEY = enum.auto()
    AFTER_KEY = enum.auto()
    VALUE = enum.auto()
    AFTER_VALUE = enum.auto()
    AFTER_CALL = enum.auto()
    VOID = enum.auto()  # the rest of a malformed call, up to its end or to the next call


@dataclasses.dataclass(frozen=True)
class State:
    """Where the reader stands; `held` is the unfinished function or argument name, `keys` the arguments so far."""

    mode: Mode
    call: int = -1
    held: str = ""
    keys: tuple[str, ...] = ()


def step(state: State, segment: Segment) -> tuple[State, list[Event]]:
    """Reads one segment: the grammar of completions."""
    marker = segment.text if segment.marker else None
    match state.mode:
        case Mode.THOUGHT:
            if marker == "</think>":
                return _to(state, Mode.CONTENT), [Event(Kind.THOUGHT_END)]
            return state, [Event(Kind.REASONING, segment.text, state.call)]
        case Mode.CONTENT | Mode.AFTER_CALL:
            if marker == "<tool_call>":
                return State(Mode.NAME, state.call + 1), []
            late = [_fault(state, segment, Fault.TEXT_AFTER_CALL)] if state.mode is Mode.AFTER_CALL else []
            return _to(state, Mode.CONTENT), late + [Event(Kind.CONTENT, segment.text, state.call)]
        case Mode.NAME:
            if marker is None:
                return dataclasses.replace(state, held=state.held + segment.text), []
            if marker not in ("<arg_key>", "</tool_call>"):
                return _fail(state, segment, Fault.UNEXPECTED)
            if not state.held:
                return _fail(state, segment, Fault.MISSING_NAME)
            after, events = step(_to(state, Mode.AFTER_VALUE), segment)
            return after, [Event(Kind.CALL, state.held, state.call)] + events
        case Mode.KEY:
            if marker != "</arg_key>":
                return dataclasses.replace(state, held=state.held + segment.text), []
            if state.held in state.keys:
                return _fail(state, segment, Fault.DUPLICATE_ARGUMENT)
            named = dataclasses.replace(state, mode=Mode.AFTER_KEY, held="", keys=state.keys + (state.held,))
            return named, [Event(Kind.ARGUMENT, state.held, state.call)]
        case Mode.AFTER_KEY:
            if marker == "<arg_value>":
                return _to(state, Mode.VALUE), []
            return _fail(state, segment, Fault.MISSING_VALUE)
        case Mode.VALUE:
            if marker == "</arg_value>":
                return _to(state, Mode.AFTER_VALUE), []
            return state, [Event(Kind.VALUE, segment.text, state.call)]
        case Mode.AFTER_VALUE:
            if marker == "<arg_key>":
                return _to(state, Mode.KEY), []
            if marker == "</tool_call>":
                return State(Mode.AFTER_CALL, state.call), [Event(Kind.CALL_END, "", state.call)]
            return _fail(state, segment, Fault.UNEXPECTED)
        case _:
            if marker == "<tool_call>":
                return State(Mode.NAME, state.call + 1), []
            return (State(Mode.AFTER_CALL, state.call) if marker == "</tool_call>" else state), []


def _to(state: State, mode: Mode) -> State:
    return dataclasses.replace(state, mode=mode, held="")


def _fail(state: State, segment: Segment, fault: Fault) -> tuple[State, list[Event]]:
    void, events = step(State(Mode.VOID, state.call), segment)
    return void, [_fault(state, segment, fault)] + events


def _fault(state: State, segment: Segment, fault: Fault) -> Event:
    # One letter of a text is enough to say where, and does not depend on how a stream was cut.
    return Event(Kind.FAULT, segment.text if segment.marker else segment.text[:1], state.call, fault)


def finish(state: State) -> list[Event]:
    """The fault of a completion that ends here, if it ends inside something."""
    if state.mode is Mode.THOUGHT:
        return [Event(Kind.FAULT, "", state.call, Fault.UNCLOSED_THOUGHT)]
    if state.mode in (Mode.CONTENT, Mode.AFTER_CALL, Mode.VOID):
        return []
    return [Event(Kind.FAULT, state.held, state.call, Fault.UNCLOSED_CALL)]


def run(state: State, segments: Iterable[Segment]) -> tuple[State, list[Event]]:
    """Reads segments in order, from `state` on."""
    events: list[Event] = []
    for segment in segments:
        state, more = step(state, segment)
        events += more
    return state, events


@dataclasses.dataclass(frozen=True)
class RawCall:
    """A well-formed call: argument names and values in order, the values as written."""

    name: str
    arguments: tuple[tuple[str, str], ...]
    index: int = 0  # which call of the completion, malformed ones counted


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a completion says; it is in the format if `faults` is empty."""

    reasoning: str | None          # None where no thought was opened; "" for an empty one
    content: str
    calls: tuple[RawCall, ...]     # the well-formed ones
    faults: tuple[Event, ...]
    stop: str | None = None        # spelling of the stop token


def collect(events: Iterable[Event]) -> Reply:
    """The reply that the events of a whole completion describe."""
    texts: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    calls: dict[int, tuple[str, list[tuple[str, list[str]]]]] = {}
    sound: list[int] = []
    faults = []
    for event in events:
        texts[event.kind].append(event.text)
        match event.kind:
            case Kind.CALL:
                calls[event.call] = (event.text, [])
            case Kind.ARGUMENT:
                calls[event.call][1].append((event.text, []))
            case Kind.VALUE:
                calls[event.call][1][-1][1].append(event.text)
            case Kind.CALL_END:
                sound.append(event.call)
            case Kind.FAULT:
                faults.append(event)
    thought = texts[Kind.REASONING] or texts[Kind.THOUGHT_END]
    return Reply(
        reasoning="".join(texts[Kind.REASONING]) if thought else None,
        content="".join(texts[Kind.CONTENT]),
        calls=tuple(RawCall(calls[index][0], tuple((key, "".join(value)) for key, value in calls[index][1]), index)
                    for index in sound),
        faults=tuple(faults),
        stop=texts[Kind.STOP][0] if texts[Kind.STOP] else None,
    )
