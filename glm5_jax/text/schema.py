"""JSON values checked against JSON Schema: the keywords that tool definitions use, and no silence about the others.

A keyword outside `CHECKS` and `ANNOTATIONS` ($ref, oneOf, pattern, ...) is a `Mismatch` of its own with `unsupported`
set: what it asks for has not been looked at.
"""

import dataclasses
from typing import Any, Callable, Iterator, Mapping

ANNOTATIONS = frozenset({"title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly",
                         "$schema", "$id", "$comment"})


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """One way in which a value is not what its schema asks for."""

    path: str          # where in the value: "" for the whole, else as ".items[2].name"
    keyword: str       # the keyword of the schema that is not met
    detail: str        # what was expected, and what was found
    unsupported: bool = False


def mismatches(value: Any, schema: Any, path: str = "") -> list[Mismatch]:
    """Every way in which a JSON value departs from a schema that `check` accepts; empty if it is valid."""
    if isinstance(schema, bool):
        return [] if schema else [Mismatch(path, "false", f"expected nothing, found {value!r}")]
    found: list[Mismatch] = []
    for keyword, wanted in schema.items():
        if keyword in CHECKS:
            found += CHECKS[keyword](value, wanted, schema, path)
        elif keyword not in ANNOTATIONS:
            found.append(Mismatch(path, keyword, f"nothing was checked, {keyword} is not supported", unsupported=True))
    return found


def check(schema: Any, where: str = "schema") -> None:
    """Raises ValueError, naming the place, where a schema is malformed in a keyword that is supported."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where}: expected an object or a boolean, found {schema!r}")
    for keyword, wanted in schema.items():
        place = f"{where}.{keyword}"
        inner: Mapping[Any, Any] = {}
        match keyword:
            case "type":
                names = wanted if isinstance(wanted, (list, tuple)) and wanted else [wanted]
                sound, expected = all(name in list(TYPES) for name in names), f"some of {list(TYPES)}"
            case "required":
                sound = isinstance(wanted, (list, tuple)) and all(isinstance(name, str) for name in wanted)
                expected = "a list of names"
            case "enum" | "anyOf":
                sound, expected = isinstance(wanted, (list, tuple)), "a list"
                inner = dict(enumerate(wanted)) if sound and keyword == "anyOf" else {}
            case "properties":
                sound = isinstance(wanted, Mapping) and all(isinstance(name, str) for name in wanted)
                expected = "an object of schemas by name"
                inner = wanted if sound else {}
            case "items" | "additionalProperties":
                sound, expected, inner = True, "", {"": wanted}
            case "const":
                continue
            case _:
                sound, expected = keyword not in CHECKS or TYPES["number"](wanted), "a number"
        if not sound:
            raise ValueError(f"{place}: expected {expected}, found {wanted!r}")
        for key, part in inner.items():
            check(part, f"{place}.{key}" if key != "" else place)


def _integer(value: Any) -> bool:
    return isinstance(value, int) or isinstance(value, float) and value.is_integer()


TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: not isinstance(value, bool) and _integer(value),
    "number": lambda value: not isinstance(value, bool) and isinstance(value, (int, float)),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, (list, tuple)),
    "null": lambda value: value is None,
}


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 is 1.0 but not true."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _type(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
    names = [wanted] if isinstance(wanted, str) else wanted
    if not any(TYPES[name](value) for name in names):
        yield Mismatch(path, "type", f"expected {' or '.join(names)}, found {value!r}")


def _enum(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
    if not any(_same(value, choice) for choice in wanted):
        yield Mismatch(path, "enum", f"expected one of {list(wanted)}, found {value!r}")


def _const(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
    if not _same(value, wanted):
        yield Mismatch(path, "const", f"expected {wanted!r}, found {value!r}")


def _properties(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
    for name, inner in wanted.items():
        if isinstance(value, Mapping) and name in value:
            yield from mismatches(value[name], inner, f"{path}.{name}")


def _required(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
    for name in wanted:
        if isinstance(value, Mapping) and name not in value:
            yield Mismatch(f"{path}.{name}", "required", "expected a value, found none")


def _additional(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
    for name in value if isinstance(value, Mapping) else ():
        if name in schema.get("properties", {}):
            continue
        if wanted is False:
            yield Mismatch(f"{path}.{name}", "additionalProperties",
                           f"expected one of {list(schema.get('properties', {}))}, found {name!r}")
        else:
            yield from mismatches(value[name], wanted, f"{path}.{name}")


def _items(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
    for index, item in enumerate(value if isinstance(value, (list, tuple)) else ()):
        yield from mismatches(item, wanted, f"{path}[{index}]")


def _any_of(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
    branches = [mismatches(value, branch, path) for branch in wanted]
    open_ones = [branch for branch in branches if all(mismatch.unsupported for mismatch in branch)]
    if not open_ones:
        yield Mismatch(path, "anyOf", f"expected one of {len(branches)} alternatives, found {value!r}")
    elif all(open_ones):
        yield from open_ones[0]


def _bound(keyword: str, kind: str, measure: Callable[[Any], Any], holds: Callable[[Any, Any], bool]) -> Callable:
    def check(value: Any, wanted: Any, schema: Mapping, path: str) -> Iterator[Mismatch]:
        if TYPES[kind](value) and not holds(measure(value), wanted):
            yield Mismatch(path, keyword, f"expected {keyword} {wanted}, found {measure(value)}")
    return check


CHECKS: Mapping[str, Callable[[Any, Any, Mapping, str], Iterator[Mismatch]]] = {
    "type": _type, "enum": _enum, "const": _const, "properties": _properties, "required": _required,
    "additionalProperties": _additional, "items": _items, "anyOf": _any_of,
    "minimum": _bound("minimum", "number", lambda x: x, lambda x, bound: x >= bound),
    "maximum": _bound("maximum", "number", lambda x: x, lambda x, bound: x <= bound),
    "exclusiveMinimum": _bound("exclusiveMinimum", "number", lambda x: x, lambda x, bound: x > bound),
    "exclusiveMaximum": _bound("exclusiveMaximum", "number", lambda x: x, lambda x, bound: x < bound),
    "minLength": _bound("minLength", "string", len, lambda x, bound: x >= bound),
    "maxLength": _bound("maxLength", "string", len, lambda x, bound: x <= bound),
    "minItems": _bound("minItems", "array", len, lambda x, bound: x >= bound),
    "maxItems": _bound("maxItems", "array", len, lambda x, bound: x <= bound),
}
