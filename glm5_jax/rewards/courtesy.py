"""The rewards of `envs.courtesy`, of all three kinds: rules, a small trained outcome model, and a scripted judge.

The exact marks of tone and quality are held out, so that the monitor can tell what the others are worth.
"""

from collections.abc import Callable

from glm5_jax.envs import courtesy
from glm5_jax.envs.courtesy import Marks
from glm5_jax.records import Trajectory
from glm5_jax.rewards import anchors, judge, outcome, rules
from glm5_jax.rewards.base import Dimension, final_text
from glm5_jax.rewards.blend import Blend, Weighted, Weights
from glm5_jax.rewards.outcome import Example, OutcomeModel

RUBRIC = ("The answer begins with a few words that fit what the user tells: joy for good news, sympathy for bad news, "
          "comfort for a fear, good wishes for a wish. It sounds natural and is not longer than it has to be.")
EXAMPLES = 600


def marks_of(trajectory: Trajectory) -> Marks:
    """The exact marks of the last reply."""
    return courtesy.marks(courtesy.request(trajectory.seed), final_text(trajectory))


def tone_pairs(count: int = EXAMPLES) -> list[tuple[Example, Example]]:
    """Pairs of replies to the last `count` seeds, the better one with a fitting acknowledgement, the worse without."""
    seeds = range(courtesy.COUNT - count, courtesy.COUNT)
    return [(outcome.example(courtesy.good(seed)),
             outcome.example(courtesy.flawed(seed, "cold" if seed % 2 else "unfitting"))) for seed in seeds]


def references(count: int = 100) -> tuple[str, ...]:
    """Good replies to the last `count` seeds. They stand in for what people have written."""
    return tuple(courtesy.good(seed)[1]["content"] for seed in range(courtesy.COUNT - count, courtesy.COUNT))


def opinion(question: str, answer: str) -> float:
    """What the scripted judge thinks of an answer's tone; `question` is a conversation of one message."""
    return courtesy.marks(courtesy.read(question.removeprefix("user: ")), answer).tone


def blend(tone_model: OutcomeModel | None = None, generate: judge.Generate | None = None,
          weights: Weights = Weights()) -> Blend:
    """The blend of the task. Without `tone_model` one is trained on `tone_pairs`, a second or two; without `generate`
    the judge is scripted."""
    style = anchors.Anchors(references())
    model = outcome.fit_pairs(tone_pairs()) if tone_model is None else tone_model
    asked = judge.Judge(judge.scripted(opinion) if generate is None else generate, RUBRIC)
    form = rules.every(rules.words(least=3, most=courtesy.MOST_WORDS), rules.matches("[A-Z].*[.]"), rules.fresh(2))
    correctness, tone, quality = Dimension
    return Blend((
        Weighted(rules.Rule("fact", correctness, _mark("correctness"))),
        Weighted(outcome.OutcomeScorer("tone_model", tone, model)),
        Weighted(judge.PointScorer("tone_judge", tone, asked, anchors.for_judge(style, 2))),
        Weighted(rules.Rule("form", quality, rules.final(form))),
        Weighted(anchors.AnchorScorer("style", quality, style)),
        Weighted(rules.Rule("exact_tone", tone, _mark("tone")), 0.0),
        Weighted(rules.Rule("exact_quality", quality, _mark("quality")), 0.0),
    ), weights)


def _mark(name: str) -> Callable[[Trajectory], float]:
    return lambda trajectory: getattr(marks_of(trajectory), name)
