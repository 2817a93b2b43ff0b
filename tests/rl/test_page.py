"""The report as a reader of HTML sees it: points and ticks by hand, and text of a model that tries to be markup."""

import base64
import dataclasses
import hashlib
from html.parser import HTMLParser
import json
import math
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.core.metrics import collect
from glm5_jax.losses import policy
from glm5_jax.records import Completion, Group, Trajectory, Turn, extend
from glm5_jax.rl import chart, page
from glm5_jax.rl.page import Sample, Token
from glm5_jax.rl.report import measure, Since, Times
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train.report import read_rows

NAN, INF = math.nan, math.inf
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "div", "table", "thead", "tbody", "tr",
        "th", "td", "a", "section", "p", "figure", "figcaption", "svg", "line", "text", "path", "g", "rect", "ul", "li",
        "details", "summary", "span"}
HOSTILE = ('<script>alert(1)</script></style></title></div></details><img src=x onerror=alert(1)>"\' onclick="x" '
           '&lt;b&gt;<!-- ]]> \x00\x08\r\x1b[31m\x7f\x9b\ud800\u202e')
SHOWN = ('<script>alert(1)</script></style></title></div></details><img src=x onerror=alert(1)>"\' onclick="x" '
         '&lt;b&gt;<!-- ]]> ␀␈␍␛[31m\ufffd\ufffd\ufffd\ufffd')


@dataclasses.dataclass(eq=False)
class Element:
    tag: str
    attributes: dict[str, str]
    children: list = dataclasses.field(default_factory=list)  # elements and strings

    def all(self, tag: str, kind: str | None = None) -> list["Element"]:
        """Those below it in their order, of a class if one is named."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (kind is None or kind in child.attributes.get("class", "").split()):
                    found.append(child)
                found += child.all(tag, kind)
        return found

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Reader(HTMLParser):
    """A tree of elements; what is not nested as it should be is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag, attributes):
        self.open[-1].children.append(Element(tag, dict(attributes)))
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(html: str) -> Element:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.open) == 1 and reader.tags <= TAGS
    return reader.open[0]


def report(folder, **options) -> Element:
    path = folder / "report.html"
    page.write(path, **{"runs": {}, "title": "A run"} | options)
    return read(path.read_bytes().decode("utf-8"))


def rows(**metrics: list[float]) -> list[dict[str, float]]:
    """Rows of steps 1, 2, ...; a double underscore stands for a slash."""
    names = [name.replace("__", "/") for name in metrics]
    return [{"step": step, **dict(zip(names, values))} for step, values in enumerate(zip(*metrics.values()), 1)]


def figures(tree: Element) -> dict[str, Element]:
    return {figure.all("figcaption")[0].text: figure for figure in tree.all("figure")}


def paths(figure: Element) -> list[Element]:
    """The first one is drawn on top of the others."""
    return figure.all("svg")[0].all("path")[::-1]


def curves(figure: Element) -> list[str]:
    return [path.attributes["d"] for path in paths(figure)]


def points(path: str) -> list[list[tuple[float, float]]]:
    """The pieces of a path."""
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", piece)]
            for piece in path.split("M")[1:]]


def labels(figure: Element, axis: str) -> dict[str, float]:
    """Where the ticks of an axis are."""
    return {text.text: float(text.attributes[axis]) - (4 if axis == "y" else 0) for text in figure.all("text", axis)}


def test_points_stand_where_the_ticks_say():
    figure = read(chart.lines("speed, m/s", {"a": ([10, 20, 40], [0.0, 2.0, 1.0])}))
    [[first, second, third]] = points(*curves(figure))
    across, up = labels(figure, "x"), labels(figure, "y")
    assert first == pytest.approx((across["10"], up["0"]), abs=0.11)
    assert second == pytest.approx((across["20"], up["2"]), abs=0.11)
    assert third == pytest.approx((across["40"], up["1"]), abs=0.11)
    assert first[1] > third[1] > second[1]  # upwards
    bands = [float(band.attributes["x"]) for band in figure.all("rect")]
    assert bands[1:] == pytest.approx([(first[0] + second[0]) / 2, (second[0] + third[0]) / 2], abs=0.11)
    assert figure.all("figcaption")[0].text == figure.all("svg")[0].attributes["aria-label"] == "speed, m/s"


def test_what_is_no_number_is_a_gap():
    values = [1.0, 2.0, NAN, 3.0, INF, 5.0, 4.0]
    html = chart.lines("a", {"gaps": (range(7), values), "none": (range(7), [NAN] * 7), "b": ([3], [-INF])})
    figure = read(html)
    [path] = curves(figure)
    assert [len(piece) for piece in points(path)] == [2, 1, 2]
    assert re.fullmatch(r"M[\d. ]+h0", "M" + path.split("M")[2])  # a line of no length, drawn as a dot
    assert [band.text for band in figure.all("rect")] == [
        "step 0\ngaps: 1", "step 1\ngaps: 2", "step 2", "step 3\ngaps: 3", "step 4", "step 5\ngaps: 5",
        "step 6\ngaps: 4"]
    assert not re.search(r"\b(nan|inf)", html, re.IGNORECASE)
    assert chart.lines("a", {"none": ([1], [NAN])}) == chart.lines("a", {}) == chart.bars("a", {}, below="b") == ""


def test_a_legend_names_every_curve_and_repeats_no_look():
    figure = read(chart.lines("a", {f"task {i}": ([1, 2], [i, i]) for i in range(24)}))
    looks = [path.attributes["class"] for path in paths(figure)]
    keys = [(key.text, key.all("path")[0].attributes["class"]) for key in figure.all("li")]
    assert keys == [(f"task {i}", look) for i, look in enumerate(looks)] and len(set(looks)) == 24


def test_long_runs_are_drawn_whole_and_shown_in_part():
    figure = read(chart.lines("a", {"x": (range(1, 1001), [step % 7 for step in range(1, 1001)])}))
    assert sum(map(len, points(*curves(figure)))) == 1000
    bands = figure.all("rect")
    assert [band.text for band in bands[:2]] == ["step 1\nx: 1", "step 6\nx: 6"] and len(bands) == 200
    ends = [(float(band.attributes["x"]), float(band.attributes["width"])) for band in bands]
    assert all(x + width == pytest.approx(after, abs=0.11) for (x, width), (after, _) in zip(ends, ends[1:]))


@pytest.mark.parametrize("steps, values, floor", [
    ([5], [0.0], 0.0), ([5], [0.0], None), ([5], [-2.0], None), ([1, 2], [3.4e38, -3.4e38], None),
    ([10**6, 10**6 + 1], [1.0, 1 + 1e-12], None), ([1, 2], [1e-40, 0.0], 0.0), ([1, 2], [-1.0, -0.5], 0.0)])
def test_every_range_has_its_ticks(steps, values, floor):
    """Inside the plane, and few; the points are inside, too."""
    figure = read(chart.lines("a", {"x": (steps, values)}, floor=floor))
    across, up = labels(figure, "x"), labels(figure, "y")
    assert 1 <= len(across) <= 6 and 2 <= len(up) <= 6
    assert all(60 <= x <= 412 for x in across.values()) and all(10 <= y <= 182 for y in up.values())
    assert all(60 <= x <= 412 and 10 <= y <= 182 for piece in points(*curves(figure)) for x, y in piece)
    assert all(float(label) == int(label) for label in across)
    assert floor is None or up["0"] == (182 if min(values) >= 0 else 10)


def test_ticks_are_round():
    assert chart.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert chart.ticks(-3, 47) == [0, 10, 20, 30, 40] and chart.ticks(0.5, 2.5, whole=True) == [1, 2]


def test_bars_are_as_high_as_their_numbers():
    figure = read(chart.bars("ages", {"0": 0.5, "1": 0.25, "2": 0.0, "3": NAN}, below="steps"))
    bars = figure.all("rect", "bar")
    heights = [float(bar.attributes["height"]) for bar in bars]
    assert heights == pytest.approx([2 * heights[1], heights[1], 0], abs=0.11) and heights[0] > 100
    assert [bar.text for bar in bars] == ["0: 0.5", "1: 0.25", "2: 0"]


PANELS = {
    "reward per rollout": (["reward/mean", "reward/maze", "reward/sums"], []),
    "entropy": (["surprisal"], []),
    "nats per token": (["mismatch/k1", "mismatch/k3", "mismatch/log_mean"], []),
    "worst token": (["mismatch/log_max"], []),
    "difference of probabilities": (["mismatch/probability_mean", "mismatch/probability_max"], []),
    "correlation": (["mismatch/pearson"], []),
    "clipped": (["clip/low", "clip/high", "weight/low", "weight/high"], []),
    "staleness of rollouts: training": (["staleness/mean", "staleness/max"], []),
    "length": (["length/consumed", "length/sampled", "length/p50", "length/p99"], []),
    "dropped": (["groups/dropped/stale"], ["groups/dropped/worker"]),
    "failed": (["rollouts/failed/reward"], ["rollouts/failed/timeout"]),
}


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_has_its_metrics_and_no_others(title, tmp_path):
    names, silent = PANELS[title]
    values = {name: [float(number), number + 0.5, 7.0] for number, name in enumerate(names, 1)}
    run = rows(**values, **{name: [0.0, 0.0, NAN] for name in silent}, other=[1.0, 2.0, 3.0])
    [(caption, figure)] = figures(report(tmp_path, runs={"a": run})).items()
    assert title in caption and ":" in caption
    assert [len(piece) for path in curves(figure) for piece in points(path)] == [3] * len(names)
    assert figure.all("rect")[1].text == "\n".join(["step 2"] + [f"{name}: {values[name][1]:.4g}" for name in names])
    assert [key.text for key in figure.all("li")] == names


def test_the_histogram_is_the_mean_over_steps(tmp_path):
    run = rows(staleness__share_0=[1.0, 0.5, NAN], staleness__share_8_and_more=[0.0, 0.1, NAN],
               staleness__share_10=[0.0, 0.0, 0.0], staleness__share_2=[0.0, 0.4, NAN])
    [figure] = figures(report(tmp_path, runs={"a": run})).values()
    assert [bar.text for bar in figure.all("rect")] == ["0: 0.75", "2: 0.2", "8+: 0.05", "10: 0"]


def rollout(name: str, reward: float, *, version: int = 1, end: str = "done") -> Trajectory:
    completion = Completion([5, 6], [-0.5, -0.25], [version, version + 1], "stop")
    turn = Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": ""}, (1, 2), completion,
                reward=reward)
    return Trajectory(name, "sums", 1, [turn], end)


def test_the_metrics_of_the_library_fill_every_panel(tmp_path):
    since = Since(sampled=[2])
    since.dropped["stale"], since.failed["worker"] = 1, 2
    batch = [Group("a", 2, [rollout("a-0", 1.0), rollout("a-1", 0.0)])]
    _, metrics = policy.icepop(jnp.array([[-1.0, -2.0]]), logp_behaviour=jnp.array([[-1.5, -1.0]]),
                               advantage=jnp.ones(1), mask=jnp.ones((1, 2)))
    measured = measure(batch, 1, {1: 0, 2: 1}, since, times=Times(1.0, 1.0, 4.0), in_flight=0, queued=0)
    tree = report(tmp_path, runs={"reasoning": [{"step": 1, **collect({**measured, **metrics})}]})
    found = figures(tree)
    assert len(found) == len(PANELS) + 1 and all(any(title in caption for caption in found) for title in PANELS)
    assert all(figure.all("rect", "bar") or curves(figure) for figure in found.values())
    assert [cell.text for cell in tree.all("tr")[1].children] == ["reasoning", "1", "0.5 → 0.5", "1", "4", "1"]


def test_the_table_has_a_line_for_each_stage(tmp_path):
    """Rows hold means over the steps since the row before: here two and three of them."""
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "reward/mean": NAN, "staleness/max": 1, "tokens/trained": 1000, "tokens/per_second": 10},
             {"step": 5, "reward/mean": 0.25, "staleness/max": 4, "tokens/trained": 100, "tokens/per_second": NAN},
             {"step": 6, "reward/mean": 0.75, "staleness/max": NAN, "tokens/trained": 7, "tokens/per_second": 3000}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tree = report(tmp_path, runs={"a": read_rows(metrics), "b": [{"step": 3, "loss": 1.0}], "c": []})
    head, *body = ([cell.text for cell in line.children] for line in tree.all("tr"))
    assert len(head) == 6 and body == [["a", "6", "0.25 → 0.75", "4", "2,307", "1,505"],
                                       ["b", "3", "–", "–", "–", "–"], ["c", "0", "–", "–", "–", "–"]]
    links = [link.attributes["href"] for link in tree.all("a")]
    assert links == [f"#{section.attributes['id']}" for section in tree.all("section")]
    assert [section.all("h2")[0].text for section in tree.all("section")] == ["a", "b", "c"]
    assert "nothing to draw" in tree.all("section")[2].text and not tree.all("section")[2].all("svg")


def test_a_run_of_no_stage_is_a_page(tmp_path):
    tree = report(tmp_path, title="Nothing & <nobody>")
    assert tree.all("title")[0].text == tree.all("h1")[0].text == "Nothing & <nobody>"
    assert len(tree.all("tr")) == 1 and not tree.all("section")


def test_the_page_needs_nothing_and_runs_nothing(tmp_path):
    tree = report(tmp_path, runs={"a": rows(surprisal=[1.0, 2.0])}, samples={"a": [Sample("r", "t", 1, "done", [])]})
    [policy] = [meta.attributes["content"] for meta in tree.all("meta") if "http-equiv" in meta.attributes]
    style = tree.all("style")[0].text
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ")[:2] == ["default-src 'none'", f"style-src 'sha256-{digest}'"]
    elements = [element for tag in TAGS for element in tree.all(tag)]
    assert not [one for one in elements if {"style", "src", "onclick"} & one.attributes.keys()]
    assert all(one.attributes.get("href", "#").startswith("#") for one in elements)
    assert "url(" not in style and "@import" not in style
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    used = set(re.findall(r"var\((--\w+)\)", style))
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used) and len(used) == 12
    assert [meta for meta in tree.all("meta") if meta.attributes.get("name") == "viewport"]


def test_what_a_model_wrote_stays_text(tmp_path):
    shown = Sample(HOSTILE, HOSTILE, 0.5, HOSTILE, [Token(HOSTILE), Token(HOSTILE, True, -1.0, -1.0, 3)])
    run = [{"step": 1, "reward/mean": 1.0, f"reward/{HOSTILE}": 1.0, f"staleness/share_0_{HOSTILE}": 1.0}]
    tree = report(tmp_path, runs={HOSTILE: run}, samples={HOSTILE: [shown]}, title=HOSTILE)
    assert [span.text for span in tree.all("div", "tokens")[0].all("span")] == [SHOWN, SHOWN]
    assert tree.all("h1")[0].text == tree.all("title")[0].text == tree.all("h2")[0].text == SHOWN
    assert tree.all("summary")[0].text.count(SHOWN) == 3
    assert tree.all("li")[1].text == f"reward/{SHOWN}"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


@pytest.mark.parametrize("gap, shade, outside", [
    (0.0, "r0", False), (math.log(2), "r14", False), (-math.log(2), "r-14", False), (math.log(2) / 2, "r7", False),
    (0.7, "r14", True), (-3.0, "r-14", True), (-INF, "r-14", True), (NAN, "unknown", True)])
def test_a_sampled_token_is_coloured_by_its_ratio(gap, shade, outside, tmp_path):
    one = Sample("r", "t", None, "failed", [Token("x", True, 0.0, gap, 41), Token("y")])
    tree = report(tmp_path, runs={"a": []}, samples={"a": [one]})
    token, given = tree.all("div", "tokens")[0].all("span")
    assert token.attributes["class"] == shade + " outside" * outside
    assert f"trainer {gap:.3f}, engine 0.000, difference {gap:+.3f}; policy 41" in token.attributes["title"]
    assert given.attributes == {"class": "given"}
    assert "no reward" in tree.all("summary")[0].text
    assert f"sampled tokens: 1, outside the band: {int(outside)}" in tree.all("summary")[0].text


def test_shades_diverge_from_white(tmp_path):
    style = report(tmp_path).all("style")[0].text
    colours = {int(shade): tuple(bytes.fromhex(colour)) for shade, colour
               in re.findall(r"\.r(-?\d+)\{background:#(\w{6})", style)}
    assert sorted(colours) == list(range(-14, 15)) and colours[0] == (255, 255, 255)
    reds, blues = ([colours[sign * shade] for shade in range(15)] for sign in (-1, 1))
    assert all(a[2] > b[2] for a, b in zip(reds, reds[1:])) and all(a[0] > b[0] for a, b in zip(blues, blues[1:]))
    assert all(red > blue for red, _, blue in reds[1:]) and all(red < blue for red, _, blue in blues[1:])


def test_every_sample_is_shown_and_lines_of_it_end(tmp_path):
    both = [Sample("r-0", "sums", 1, "done", [Token("a\n"), Token("\n", True)]), Sample("r-1", "maze", 0, "turns", [])]
    tree = report(tmp_path, runs={"a": [], "b": []}, samples={"b": both})
    assert [one.text for one in tree.all("div", "tokens")] == ["a↵\n↵\n", ""]
    assert ["rollout r-0 · sums", "rollout r-1 · maze"] == [one.text[:18] for one in tree.all("summary")]
    assert not tree.all("section")[0].all("details") and len(tree.all("section")[1].all("details")) == 2
    assert all("open" in one.attributes for one in tree.all("details"))


def test_samples_of_no_stage_are_refused_and_the_page_before_stays(tmp_path, monkeypatch):
    report(tmp_path, title="first")
    with pytest.raises(ValueError, match=r"samples: expected stages of runs, \['a'\], found \['b'\]"):
        report(tmp_path, runs={"a": []}, samples={"b": []})
    with monkeypatch.context() as patched, pytest.raises(OSError, match="killed"):
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        report(tmp_path, title="second")
    assert "first" in (tmp_path / "report.html").read_text(encoding="utf-8")
    report(tmp_path, title="third")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


TOKENIZER = Tokenizer.packaged()


def spoken(name: str) -> Trajectory:
    """A turn, one that extends it, and a fork of the first; the answers are characters of several bytes."""
    asked, sure, other = ({"role": "user", "content": text} for text in ("Who?", "Sure?", "Or?"))
    ids = {text: tuple(TOKENIZER.encode(text)) for text in ("Who?", "Ωmega 😀", "Sure?", "Or?", "né", "x")}
    said = lambda text, version: Completion(ids[text], [-0.5] * len(ids[text]), [version] * len(ids[text]), "stop")
    first = Turn([asked], {"role": "assistant", "content": "Ωmega 😀"}, ids["Who?"], said("Ωmega 😀", 2))
    start = ids["Who?"] + ids["Ωmega 😀"]
    second = extend([first], [asked, first.reply, sure], {"role": "assistant", "content": "né"},
                    prompt=start + ids["Sure?"], completion=said("né", 3))
    third = extend([first, second], [asked, first.reply, other], {"role": "assistant", "content": "x"},
                   prompt=start + ids["Or?"], completion=said("x", 4), reward=0.5)
    return Trajectory(name, "sums", 1, [first, second, third], "done")


def test_samples_are_what_was_sampled_with_the_log_probs_of_their_tokens():
    """The trainer of this test finds each id i with the log-probability -i / 1000."""
    trajectories = [spoken("c"), rollout("a", 1.0)]
    batch = page.contexts(trajectories, length=64, multiple=4)
    assert batch.tokens.shape == (4, 64) and not batch.segment_ids[3].any()
    found = page.samples(trajectories, batch.targets / -1000, TOKENIZER)
    assert [(one.rollout, one.task, one.reward, one.end) for one in found] == [
        ("c, context 1 of 2", "sums", 0.5, "done"), ("c, context 2 of 2", "sums", 0.5, "done"),
        ("a", "sums", 1.0, "done")]
    texts, ids = ("Who?", "Ωmega 😀", "Sure?", "né"), []
    for part in texts:
        ids += TOKENIZER.encode(part)
    tokens = found[0].tokens
    assert [token.text for token in tokens] == [TOKENIZER.decode([id]) for id in ids]
    assert any("\ufffd" in token.text for token in tokens)  # the smiley is no token of its own
    sizes = [len(TOKENIZER.encode(part)) for part in texts]
    versions = np.repeat([-1, 2, -1, 3], sizes)
    assert [token.version for token in tokens] == list(versions)
    assert [token.sampled for token in tokens] == list(versions >= 0)
    assert [token.logp_trainer for token in tokens] == pytest.approx(np.where(versions >= 0, ids, 0) / -1000)
    assert [token.logp_behaviour for token in tokens] == list(np.where(versions >= 0, -0.5, 0))
    assert [token.version for token in found[1].tokens if token.sampled] == [4]  # the first turn is in context 1


def test_tokens_that_nobody_can_read_or_predict():
    """Without a prompt nothing predicts the first token; a model's vocabulary may be larger than the tokenizer's."""
    turn = Turn([], {"role": "assistant", "content": ""}, (),
                Completion((5, TOKENIZER.vocab_size), (-0.5, -0.5), (1, 1), "stop"))
    [one] = page.samples([Trajectory("a", "sums", 1, [turn], "aborted")], [[-0.25, -9.0]], TOKENIZER)
    first, second = one.tokens
    assert math.isnan(first.logp_trainer) and (second.text, second.logp_trainer) == ("\ufffd", -0.25)
    assert one.reward is None and one.end == "aborted"


def test_what_does_not_fit_is_refused():
    trajectories = [spoken("c"), rollout("a", 1.0)]
    with pytest.raises(ValueError, match=r"log_probs: expected .* at least 3 contexts .* found shape \(2, 64\)"):
        page.samples(trajectories, np.zeros((2, 64)), TOKENIZER)
    with pytest.raises(ValueError, match=r"log_probs: expected .* of 4 tokens, found shape \(1, 3\)"):
        page.samples(trajectories[1:], np.zeros((1, 3)), TOKENIZER)
    with pytest.raises(ValueError, match=r"rollout 'a': expected at most 3 tokens in a context \(length\), found 4"):
        page.contexts(trajectories[1:], length=3)
    with pytest.raises(ValueError, match=r"trajectories: expected tokens, found none in \['e'\]"):
        page.contexts([Trajectory("e", "sums", 1, [], "done")], length=8)
