"""The report of a run as one HTML file that needs nothing else: curves of its stages, and transcripts token by token.

Nothing in it can run: the page forbids scripts, and whatever a model wrote is text.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import math
import os
import pathlib
import statistics
from typing import Any

import jax
import numpy as np

from glm5_jax.core.batch import Batch
from glm5_jax.data import packing
from glm5_jax.records import Trajectory
from glm5_jax.rl import assemble, chart
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train.report import Rows, series

BAND = math.log(2)  # IcePop's, of log ratios, with the beta of GLM-5; colours are deepest at its ends
_SHADES = 14  # of each colour
_SHARES = "staleness/share_"


@dataclasses.dataclass(frozen=True)
class Token:
    """A piece of a transcript. Where the policy did not sample it, log-probs are 0 and the version is -1."""

    text: str
    sampled: bool = False
    logp_behaviour: float = 0.0  # of the engine that sampled it
    logp_trainer: float = 0.0
    version: int = -1  # of the policy that sampled it

    @property
    def log_ratio(self) -> float:
        """log(pi_trainer / pi_behaviour)."""
        return self.logp_trainer - self.logp_behaviour

    @property
    def outside(self) -> bool:
        """Whether IcePop drops it: the ratio is not in [1/2, 2], or is no number. GLM-5 report, section 3.2."""
        return self.sampled and not abs(self.log_ratio) <= BAND


@dataclasses.dataclass(frozen=True)
class Sample:
    """A transcript to show: one context of a rollout."""

    rollout: str
    task: str
    reward: float | None  # None for a rollout that failed or was called back
    end: str
    tokens: Sequence[Token]


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A chart of some metrics. A name that ends in "/" stands for all that begin with it."""

    title: str
    names: Sequence[str]
    floor: float | None = 0.0
    quiet: bool = False  # whether curves that are 0 throughout are left out


_PANELS = (
    _Panel("reward per rollout: mean, and of each task", ["reward/mean", "reward/"], floor=None),
    _Panel("entropy, by the surprisal of what was sampled: nats per token", ["surprisal"]),
    _Panel("mismatch of trainer and engine: nats per token", ["mismatch/k1", "mismatch/k3", "mismatch/log_mean"]),
    _Panel("mismatch of trainer and engine, the worst token: nats", ["mismatch/log_max"]),
    _Panel("mismatch of trainer and engine: difference of probabilities",
           ["mismatch/probability_mean", "mismatch/probability_max"]),
    _Panel("mismatch of trainer and engine: correlation of probabilities", ["mismatch/pearson"], floor=None),
    _Panel("clipped (clip) and outside the band (weight): share of tokens",
           ["clip/low", "clip/high", "weight/low", "weight/high"]),
    _Panel("staleness of rollouts: training steps", ["staleness/mean", "staleness/max"]),
    _Panel("length of rollouts: sampled tokens", ["length/consumed", "length/sampled", "length/p50", "length/p99"]),
    _Panel("groups dropped: per training step", ["groups/dropped/"], quiet=True),
    _Panel("rollouts failed: per training step", ["rollouts/failed/"], quiet=True),
)


def write(path: str | os.PathLike[str], *, runs: Mapping[str, Rows], samples: Mapping[str, Sequence[Sample]] = {},
          title: str) -> None:
    """Writes the page, whole or not at all: a table with a line for each stage, its charts, its samples.

    `runs` has the rows of each stage's `metrics.jsonl` (`train.report.read_rows`), in the order to show, and `samples`
    transcripts of some of these stages. Charts whose metrics a stage does not have are left out. Raises ValueError for
    samples of another stage.
    """
    if strange := samples.keys() - runs.keys():
        raise ValueError(f"samples: expected stages of runs, {list(runs)}, found {sorted(strange)}")
    sections = [_section(number, stage, rows, samples.get(stage, ())) for number, (stage, rows)
                in enumerate(runs.items())]
    style = _STYLE + chart.STYLE + _shades()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    text = "\n".join([
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'sha256-{digest}\'; '
        'base-uri \'none\'; form-action \'none\'">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{chart.escaped(title)}</title><style>{style}</style></head>",
        f"<body><h1>{chart.escaped(title)}</h1>", _table(runs), *sections, "</body></html>\n"])
    target = pathlib.Path(path)
    temporary = target.with_name(target.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def contexts(trajectories: Sequence[Trajectory], *, length: int, multiple: int = 1) -> Batch:
    """What `samples` needs the log-probs of: a row of `length` tokens for each context of the rollouts, in order, and
    padding up to a multiple of `multiple` rows; numpy arrays [rows, length].

    Raises ValueError for a context longer than a row, and where there is none.
    """
    found = [row for one in trajectories for row in assemble.rows(one)]
    if not found:
        raise ValueError(f"trajectories: expected tokens, found none in {[one.id for one in trajectories]}")
    for row in found:
        if len(row.ids) > length:
            raise ValueError(f"rollout {row.rollout!r}: expected at most {length} tokens in a context (length), found "
                             f"{len(row.ids)}")
    packed = [packing.pack([np.array(row.ids, np.int32)], length) for row in found]
    return jax.tree.map(lambda *rows: np.pad(np.concatenate(rows), ((0, -len(found) % multiple), (0, 0))), *packed)


def samples(trajectories: Sequence[Trajectory], log_probs: Any, tokenizer: Tokenizer) -> list[Sample]:
    """The transcripts of rollouts, one for each context (`assemble.rows`).

    `log_probs` are the trainer's, [rows, length]: in row i, at t, that of token t + 1 of context i, as
    `PolicyStep.log_probs` gives them for `contexts`. A token that is not whole characters, or that the tokenizer does
    not have, is shown as U+FFFD. Raises ValueError where the log-probs are too few, and as `assemble.rows`.
    """
    logp_BT = np.asarray(log_probs, np.float64)
    found = [(one, row, number, len(rows)) for one in trajectories for rows in [assemble.rows(one)]
             for number, row in enumerate(rows, 1)]
    longest = max((len(row.ids) for _, row, _, _ in found), default=0)
    if logp_BT.ndim != 2 or len(logp_BT) < len(found) or logp_BT.shape[1] < longest:
        raise ValueError(f"log_probs: expected [rows, length] of at least {len(found)} contexts of {longest} tokens, "
                         f"found shape {logp_BT.shape}; take those of `contexts`")
    shown = []
    for (one, row, number, count), logp_T in zip(found, logp_BT):
        tokens = tuple(
            Token(tokenizer.decode([id]) if id < tokenizer.vocab_size else "\ufffd", sampled, behaviour,
                  float(trainer) if sampled else 0.0, version)
            for id, sampled, behaviour, version, trainer
            in zip(row.ids, row.trained, row.logprobs, row.versions, [math.nan, *logp_T]))  # nothing predicts the first
        name = one.id if count == 1 else f"{one.id}, context {number} of {count}"
        shown.append(Sample(name, one.task, one.reward, one.end.value, tokens))
    return shown


def _table(runs: Mapping[str, Rows]) -> str:
    """A line for each stage."""
    heads = ["stage", "steps", "reward, first → last", "staleness, max", "tokens trained", "tokens/s, median"]
    lines = []
    for number, (stage, rows) in enumerate(runs.items()):
        rewards, stale, rates = (_numbers(rows, name)[1] for name in ("reward/mean", "staleness/max",
                                                                      "tokens/per_second"))
        steps, counts = _numbers(rows, "tokens/trained")
        # A row holds the mean over the steps since the row before.
        trained = sum(count * (step - before) for before, step, count in zip([0, *steps], steps, counts))
        cells = [f"{rows[-1]['step']:,.0f}" if rows else "0",
                 f"{rewards[0]:.3g} → {rewards[-1]:.3g}" if rewards else "–",
                 f"{max(stale):g}" if stale else "–",
                 f"{trained:,.0f}" if counts else "–",
                 f"{statistics.median(rates):,.0f}" if rates else "–"]
        lines.append(f'<tr><th><a href="#stage-{number}">{chart.escaped(stage)}</a></th>'
                     + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return ('<div class="table"><table><thead><tr>' + "".join(f"<th>{head}</th>" for head in heads)
            + f'</tr></thead><tbody>{"".join(lines)}</tbody></table></div>')


def _section(number: int, stage: str, rows: Rows, samples: Sequence[Sample]) -> str:
    charts = [chart.lines(panel.title, _curves(panel, rows), floor=panel.floor) for panel in _PANELS]
    ages = sorted({name.removeprefix(_SHARES) for row in rows for name in row if name.startswith(_SHARES)},
                  key=lambda age: int(age.split("_")[0]))
    shares = {age.replace("_and_more", "+"): _numbers(rows, _SHARES + age)[1] for age in ages}
    charts.append(chart.bars("staleness of rollouts: share, mean over steps",
                             {age: statistics.fmean(found) for age, found in shares.items() if found},
                             below="training steps"))
    shown = [found for found in charts if found]
    parts = [f'<section id="stage-{number}"><h2>{chart.escaped(stage)}</h2>',
             f'<div class="charts">{"".join(shown)}</div>' if shown else "<p>There is nothing to draw.</p>"]
    if samples:
        parts += ["<h3>Samples</h3>", _KEY, *map(_transcript, samples)]
    return "\n".join([*parts, "</section>"])


def _curves(panel: _Panel, rows: Rows) -> dict[str, tuple[list[float], list[float]]]:
    known = sorted({name for row in rows for name in row})
    names = [name for wanted in panel.names for name in known
             if name == wanted or wanted.endswith("/") and name.startswith(wanted)]
    curves = {name: series(rows, name) for name in names}
    return {name: curve for name, curve in curves.items()
            if not panel.quiet or any(chart.is_number(value) and value != 0 for value in curve[1])}


def _numbers(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """`series` without what is no number."""
    found = [(step, value) for step, value in zip(*series(rows, name)) if chart.is_number(value)]
    return [step for step, _ in found], [value for _, value in found]


def _transcript(sample: Sample) -> str:
    sampled = sum(token.sampled for token in sample.tokens)
    facts = [f"rollout {sample.rollout}", sample.task,
             "no reward" if sample.reward is None else f"reward {sample.reward:.4g}", f"end: {sample.end}",
             f"sampled tokens: {sampled}, outside the band: {sum(token.outside for token in sample.tokens)}"]
    return (f'<details open><summary>{chart.escaped(" · ".join(facts))}</summary>'
            f'<div class="tokens">{"".join(map(_span, sample.tokens))}</div></details>')


def _span(token: Token) -> str:
    text = chart.escaped(token.text).replace("\n", "↵\n")  # a token that is a line's end alone can be seen, too
    if not token.sampled:
        return f'<span class="given">{text}</span>'
    shade = "unknown"
    if not math.isnan(token.log_ratio):
        shade = f"r{round(_SHADES * min(max(token.log_ratio / BAND, -1), 1))}"
    return (f'<span class="{shade}{" outside" if token.outside else ""}" title="log-prob: trainer '
            f'{token.logp_trainer:.3f}, engine {token.logp_behaviour:.3f}, difference {token.log_ratio:+.3f}; '
            f'policy {token.version}">{text}</span>')


def _shades() -> str:
    """The style of each shade, from white to the colour of its sign."""
    ends = {-1: (240, 112, 96), 1: (96, 160, 240)}
    mixed = lambda shade, end: [round(255 + (value - 255) * abs(shade) / _SHADES) for value in end]
    return ".unknown{background:#fff;color:#111}\n" + "".join(
        ".r{}{{background:#{:02x}{:02x}{:02x};color:#111}}\n".format(shade, *mixed(shade, ends[1 if shade > 0 else -1]))
        for shade in range(-_SHADES, _SHADES + 1))


_KEY = f"""<p class="key">Sampled tokens by log(trainer / engine): <span class="r{-_SHADES}">−0.7 or less: the engine
gave it more</span> <span class="r{-_SHADES // 2}">−0.35</span> <span class="r0">0</span>
<span class="r{_SHADES // 2}">0.35</span> <span class="r{_SHADES}">0.7 or more: the trainer gives it more</span>
<span class="r0 outside">outlined: the ratio is outside IcePop's band, [1/2, 2]</span>
<span class="given">grey: from the environment, or trained on in another context</span></p>"""
_STYLE = """:root{color-scheme:light dark;--page:#fff;--ink:#1b1d22;--faint:#6d7480;--mark:#000;
--c0:#2563c9;--c1:#c75b07;--c2:#16853f;--c3:#b3261e;--c4:#7c4dbd;--c5:#86592c;--c6:#bd3f97;--c7:#3f7880}
@media (prefers-color-scheme:dark){:root{--page:#15171b;--ink:#e4e6ea;--faint:#979eaa;--mark:#fc0;
--c0:#7aa7f5;--c1:#f0a35e;--c2:#6ccf8e;--c3:#f0857d;--c4:#b99af0;--c5:#cfa57a;--c6:#ee92d0;--c7:#8fc1c8}}
body{background:var(--page);color:var(--ink);font:16px/1.45 system-ui,sans-serif;max-width:84rem;margin:0 auto;
padding:1rem}
a{color:inherit}
.table{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem .25rem 0;text-align:right;white-space:nowrap}
th:first-child{text-align:left}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1.2rem}
summary{cursor:pointer;margin-top:.8rem;overflow-wrap:anywhere}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;font:.9rem/1.6 ui-monospace,monospace}
.key{font-size:.85rem}
.given{color:var(--faint)}
.outside{outline:2px solid var(--mark);outline-offset:-1px}
"""
