"""What is wrong with a checkpoint, all of it at once."""

import reprlib
from typing import Any

_SHOWN = 8


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be.

    `faults` has one sentence for each fault: which file, tensor or field, what was expected, what was found, what to
    do. The message is one paragraph of them.
    """

    def __init__(self, *faults: str):
        super().__init__(_paragraph(faults))
        self.faults = faults


class ConfigError(CheckpointError):
    """A config.json that is missing, broken, or of a model that this library does not have."""


def _paragraph(faults: tuple[str, ...]) -> str:
    if len(faults) == 1:
        return faults[0]
    shown = "; ".join(f"({number}) {fault}" for number, fault in enumerate(faults[:_SHOWN], 1))
    rest = len(faults) - _SHOWN
    return f"{len(faults)} faults: {shown}" + (f"; and {rest} more" if rest > 0 else "")


def short(value: Any) -> str:
    """A value for a message: a hostile one may be long, or nested as deep as the stack."""
    if isinstance(value, str):
        return repr(value if len(value) <= 200 else value[:200] + "...")
    return reprlib.repr(value)
