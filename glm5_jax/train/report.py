"""What a run did, read from its metrics file alone: the numbers for a table, and one picture."""

import json
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


def draw(rows: Rows, path: str | os.PathLike[str], *, title: str, stages: dict[str, int]) -> None:
    """Draws loss curves, the indexer's KL and the expert load over steps into a PNG file.

    `stages` gives the last step of each stage, in order. Raises ImportError, with the remedy, without matplotlib.
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
        ("loss, nats per token", {"lm_loss": "next token", **mtp}, None),
        ("indexer KL, nats", {"indexer_kl": "mean over layers"}, 0.0),
        ("load of the busiest expert / mean", {"expert_load": "mean over layers"}, 1.0),
    ]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (label, curves, floor) in zip(figure.subplots(1, len(panels)), panels):
        for name, text in curves.items():
            axes.plot(*series(rows, name), label=text, linewidth=1.5)
        for end in list(stages.values())[:-1]:
            axes.axvline(end, color="0.7", linewidth=1, linestyle="--")
        _name_stages(axes, stages)
        axes.set(xlabel="step", title=label, xlim=(0, max(stages.values())))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if floor is not None:
            axes.set_ylim(bottom=floor)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


def _name_stages(axes: Any, stages: dict[str, int]) -> None:
    start = 0
    for name, end in stages.items():
        if end > start:
            axes.text(start, 1.0, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=8, color="0.4")
        start = end
