"""What an experiment found: a dated file that replaces nothing, and tables for the reader."""

import datetime
import pathlib
from typing import Any, Mapping, NamedTuple, Sequence

import jax

from glm5_jax.core import rundir

RESULTS = pathlib.Path(__file__).parent / "results"


class Claim(NamedTuple):
    """A sentence, the number that was expected, in words, the number that was found, and whether it holds."""

    says: str
    expected: str
    found: float
    holds: bool


def write(folder: pathlib.Path, name: str, *, settings: Mapping[str, Any], results: Any, claims: Sequence[Claim],
          seconds: float) -> pathlib.Path:
    """Writes `<name>-<date>-<platform>.json`, numbered from -2 on where that is taken, and returns its path.

    `settings` and `results` are JSON values; versions, device and date are added. What is `quick` by its settings is
    so by its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    name += "-quick" * bool(settings.get("quick"))
    stem = f"{name}-{date}-{jax.default_backend()}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    rundir.write_json(path, {
        "date": date, "seconds": round(seconds, 1), "versions": rundir.versions(), "settings": dict(settings),
        "claims": [claim._asdict() for claim in claims], "results": results})
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns; numbers with four significant digits."""
    cells = [list(head), *([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
                           for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def claims_table(claims: Sequence[Claim]) -> str:
    return table(["claim", "expected", "found", "holds"],
                 [[claim.says, claim.expected, claim.found, "yes" if claim.holds else "NO"] for claim in claims])
