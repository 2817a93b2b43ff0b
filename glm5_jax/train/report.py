"""What a run did, read from its metrics file alone: the numbers of each stage, one table, one picture."""

import itertools
import json
from collections.abc import Mapping
import os
import pathlib
import statistics
from typing import Any

Rows = list[dict[str, float]]


def read_rows(metrics: str | os.PathLike[str]) -> Rows:
    """The rows of a `metrics.jsonl`, one dictionary per written step."""
    return [json.loads(line) for line in pathlib.Path(metrics).read_text(encoding="utf-8").splitlines()]


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The steps at which `name` was written, and its values there."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def tokens_per_second(rows: Rows) -> float:
    """The median over rows, which a pause of the machine does not bend; NaN where nothing was timed."""
    return statistics.median(series(rows, "tokens_per_second")[1] or [float("nan")])


def ends(steps: Mapping[str, int]) -> dict[str, int]:
    """The last step of each stage, counted through all, from their own steps in order."""
    return dict(zip(steps, itertools.accumulate(steps.values())))


def stages(rows: Rows, ends: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What each stage did: its steps, tokens, median tokens per second, and {"before": ..., "after": ...} of each
    measure, from the metrics named `<stage>/<measure>/before` and `/after`."""
    found, start = {}, 0
    for name, end in ends.items():
        own = [row for row in rows if start < row["step"] <= end]
        steps = [b["step"] - a for a, b in zip([start, *(row["step"] for row in own)], own)]
        summary: dict[str, Any] = {
            "steps": end - start, "tokens_per_second": tokens_per_second(own),
            "tokens": round(sum(row["tokens"] * count for row, count in zip(own, steps) if "tokens" in row))}
        for row in rows:
            for key, value in row.items():
                if key.startswith(f"{name}/"):
                    _, measure, when = key.split("/")
                    summary.setdefault(measure, {})[when] = value
        found[name], start = summary, end
    return found


def table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each stage and measure, as text."""
    lines: list[tuple[str, ...]] = [("stage", "steps", "tokens", "tokens/s", "held out", "before", "after")]
    for name, summary in stages.items():
        first = (name, f"{summary['steps']:,}", f"{summary['tokens']:,}", f"{summary['tokens_per_second']:,.0f}")
        for measure, values in summary.items():
            if isinstance(values, Mapping):
                lines.append((*first, measure, *(f"{values.get(when, float('nan')):.4f}"
                                                 for when in ("before", "after"))))
                first = ("", "", "", "")
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) if number in (0, 4) else cell.rjust(width)
                               for number, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def draw(rows: Rows, path: str | os.PathLike[str], *, ends: Mapping[str, int]) -> None:
    """Draws over the steps, into a PNG file: losses, what was held out before and after each stage, the indexer's KL
    and the expert load; `ends` gives the last step of each stage, in order.

    Raises ImportError, with the remedy, without matplotlib.
    """
    try:
        from matplotlib import ticker
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib, which is not installed: pip install 'glm5-jax[viz]'"
                          ) from error
    names = sorted({name for row in rows for name in row})
    mtp = {name: f"MTP, token t+{int(name.split('/')[1]) + 1}" for name in names if name.startswith("mtp_loss/")}
    panels: list[tuple[str, dict[str, str], float | None]] = [
        ("training loss, nats per token", {"lm_loss": "next token", **mtp}, None),
        ("held out, from before to after each stage", {}, 0.0),
        ("indexer KL, nats", {"indexer_kl": "mean over layers"}, 0.0),
        ("load of the busiest expert / mean", {"expert_load": "mean over layers"}, 1.0),
    ]
    figure = Figure(figsize=(16, 3.8), layout="constrained")
    grid = figure.subplots(1, len(panels))
    _draw_held_out(grid[1], stages(rows, ends), ends)
    for axes, (label, curves, floor) in zip(grid, panels):
        for name, text in curves.items():
            axes.plot(*series(rows, name), label=text, linewidth=1.5)
        for end in list(ends.values())[:-1]:
            axes.axvline(end, color="0.7", linewidth=1, linestyle="--")
        _name_stages(axes, ends)
        axes.set(xlabel="step", title=label, xlim=(0, max(ends.values())))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if floor is not None:
            axes.set_ylim(bottom=floor)
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_held_out(axes: Any, summaries: Mapping[str, Mapping[str, Any]], ends: Mapping[str, int]) -> None:
    """A line for each stage, from its first step to its last, of each measure that is a loss."""
    labels = {"bits_per_byte": ("text, bits per byte", "C0"),
              "nats_per_learned_token": ("answers, nats per token", "C1")}
    start = 0
    for name, end in ends.items():
        for measure, (label, colour) in labels.items():
            if values := summaries[name].get(measure):
                axes.plot([start, end], [values["before"], values["after"]], colour, marker="o", markersize=3,
                          label=label)
                labels[measure] = (f"_{label}", colour)  # each once in the legend
        start = end


def _name_stages(axes: Any, ends: Mapping[str, int]) -> None:
    start = 0
    for name, end in ends.items():
        axes.text(start, 1.0, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=7, color="0.4",
                  rotation=90)
        start = end
