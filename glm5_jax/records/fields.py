"""Frozen dataclasses whose fields are checked when they are built, and their JSON.

A field is an int, float, str, StrEnum, a `Message`, another record, a tuple of one of these, or one of these or None.
"""

import dataclasses
import enum
import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Message = dict[str, Any]  # any JSON object
NESTING = 128  # levels of lists and objects in a `Message`: it is copied and compared by recursion
R = TypeVar("R", bound="Record")


@dataclasses.dataclass(frozen=True)
class Record:
    """The types of all fields are checked at construction, then what `validate` says about their values."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(typing.cast(Any, type(self))).items():
            object.__setattr__(self, name, _checked(getattr(self, name), kind, f"{type(self).__name__}.{name}"))
        self.validate()

    def validate(self) -> None:
        """What the types alone do not say."""

    def require(self, holds: bool, field: str, expected: str, found: object) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{field}: expected {expected}, found {found!r}")

    def require_each(self, field: str, holds: Callable[[Any], bool], expected: str) -> None:
        values = getattr(self, field)
        bad = next((i for i, value in enumerate(values) if not holds(value)), None)
        if bad is not None:
            self.require(False, f"{field}[{bad}]", expected, values[bad])


def to_json(record: Record) -> str:
    """One line of JSON; `from_json` gives the equal record back."""
    return json.dumps(record, default=vars, allow_nan=False)


def from_json(kind: type[R], text: str) -> R:
    """The record of the class `kind` that `text` holds; raises ValueError or TypeError naming the field at fault."""
    return _checked(json.loads(text), kind, kind.__name__)


@functools.cache
def _kinds(record: Any) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _checked(value: Any, kind: Any, name: str) -> Any:
    """`value` as the field type `kind`: number types and iterables converted, mappings built into records, JSON copied.

    Raises TypeError or ValueError that begins with `name`, the path of the field.
    """
    def wrong(expected: str, error: type[Exception] = TypeError) -> Exception:
        return error(f"{name}: expected {expected}, found {value!r}")

    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _checked(value, arguments[0], name)
    if origin is tuple:
        if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
            raise wrong("a list")
        items = tuple(value)
        if arguments[0] is int and set(map(type, items)) <= {int}:
            return items  # a context is long: this is ten times as fast as the line below
        if arguments[0] is float and set(map(type, items)) <= {float} and all(map(math.isfinite, items)):
            return items
        return tuple(_checked(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(items))
    if kind == Message:
        if not isinstance(value, Mapping):
            raise wrong("an object")
        return _json_copy(value, name)
    if kind in (int, float):
        tower: Any = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, tower):
            raise wrong("an integer" if kind is int else "a number")
        if kind is float and not math.isfinite(value):
            raise wrong("a finite number", ValueError)
        return kind(value)
    if kind is str:
        if type(value) is not str:
            raise wrong("a string")
        return value
    if issubclass(kind, enum.StrEnum):
        if value not in list(kind):
            raise wrong(f"one of {[one.value for one in kind]}", ValueError)
        return kind(value)
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise wrong(f"a {kind.__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = {field.name for field in fields.values()
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}
    if not required <= set(value) <= set(fields):
        raise ValueError(f"{name}: expected the fields {list(fields)}, found {list(value)}; missing "
                         f"{sorted(required - set(value))}, unknown {sorted(set(value) - set(fields))}")
    kinds = _kinds(kind)
    return kind(**{field: _checked(item, kinds[field], f"{name}.{field}") for field, item in value.items()})


def _json_copy(value: Any, name: str, levels: int = NESTING) -> Any:
    """A deep copy of `value` with plain dicts and lists, so that the record owns it; raises where JSON has no such."""
    if levels == 0 and isinstance(value, (Mapping, list, tuple)):
        raise ValueError(f"{name}: expected at most {NESTING} levels of lists and objects, found more")
    if isinstance(value, Mapping):
        if wrong := [key for key in value if type(key) is not str]:
            raise TypeError(f"{name}: expected strings as keys, found {wrong[0]!r}")
        return {key: _json_copy(item, f"{name}.{key}", levels - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_copy(item, f"{name}[{i}]", levels - 1) for i, item in enumerate(value)]
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    raise TypeError(f"{name}: expected a JSON value, found {value!r}")
