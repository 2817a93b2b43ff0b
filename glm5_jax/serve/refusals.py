"""Requests that are refused: with which status of HTTP, why, and for which field."""

import logging
from collections.abc import Mapping
from typing import Any

from glm5_jax.infer.request import RequestTooLong
from glm5_jax.serve.generator import Closed, EngineLost, Overloaded, UnknownSession
from glm5_jax.text import schema, values
from glm5_jax.text.template import ChatError

log = logging.getLogger(__name__)
LONGEST = 1_000  # letters of a message: it may quote what was sent


class Refused(Exception):
    """What a client is told; `field` is the path of the field at fault, `retry_after` in seconds."""

    def __init__(self, status: int, message: str, *, field: str | None = None, code: str | None = None,
                 retry_after: int | None = None):
        message = message if len(message) <= LONGEST else message[:LONGEST] + " ..."
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.retry_after = status, message, field, code, retry_after


def of(error: Exception) -> Refused:
    """The refusal that an error of the gateway, or any other, amounts to."""
    message = str(error)
    match error:
        case Refused():
            return error
        case RequestTooLong():
            return Refused(400, message, code="context_length_exceeded")
        case ChatError():
            return Refused(400, message, field=message.partition(": ")[0])
        case Overloaded():
            return Refused(429, message, code="overloaded", retry_after=1)
        case UnknownSession():
            return Refused(404, message)
        case Closed():
            return Refused(503, message, code="shutting_down", retry_after=1)
        case EngineLost():
            return Refused(500, message, code="engine_failed")
        case ValueError():
            return Refused(400, message)
    log.error("a request failed", exc_info=error)
    return Refused(500, f"{type(error).__name__}: {error}")


def parsed(body: bytes, wanted: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The fields of a request to a model, without the null ones; raises Refused where they are not JSON, not what the
    schema `wanted` asks for, or meant for another model.
    """
    try:
        fields = values.load(body.decode("utf-8"))
    except ValueError as error:
        raise Refused(400, f"body: expected JSON in UTF-8, found: {error}") from error
    if not isinstance(fields, dict):
        raise Refused(400, f"body: expected a JSON object, found {fields!r}")
    fields = {name: value for name, value in fields.items() if value is not None}
    for mismatch in schema.mismatches(fields, wanted):
        field = mismatch.path.removeprefix(".")
        raise Refused(400, f"{field}: {mismatch.detail}", field=field)
    check_model(fields["model"], model)
    return fields


def check_model(asked: str, model: str) -> None:
    """Raises Refused for a model that is not the one here."""
    if asked != model:
        raise Refused(404, f"model: expected {model!r}, found {asked!r}", field="model", code="model_not_found")
