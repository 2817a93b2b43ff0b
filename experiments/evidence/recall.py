"""Facts in a haystack and questions about them: rows to learn from, and needles to be tested by.

A row is words of filler with facts among them (`fact key value`), and at its end questions with their answers
(`ask key value`). Rows to learn from are drawn here; those of a test are laid out by `glm5_jax.data.long_context`, and
its scorer counts the answers. Words are of its `terse` style, numbered anew so that the vocabulary is small.

N rows, T positions, Q questions of a row.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from glm5_jax.core.batch import Batch
from glm5_jax.data import long_context
from glm5_jax.data.long_context import Recall, Style
from glm5_jax.losses import token
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.text.tokenizer import Tokenizer

Attention = Literal["dense", "sparse"]
FACT = QUESTION = 3  # tokens of each


class Words(NamedTuple):
    """The style and its tokenizer; `ids` are the tokens of its words, in whose order models number them."""

    tokenizer: Tokenizer
    style: Style
    ids: np.ndarray

    def numbers(self, *words: str) -> np.ndarray:
        """What models call these words, int32."""
        return np.searchsorted(self.ids, [self.tokenizer.encode(f" {word}")[0] for word in words]).astype(np.int32)

    @property
    def fact(self) -> str:
        return self.style.fact.split()[0]

    @property
    def ask(self) -> str:
        return self.style.ask_codes.split()[0]


class Needles(NamedTuple):
    """Tasks of the library, and their rows, in which every question stands for itself and has its answer behind it."""

    tasks: list[Recall]
    batch: Batch
    asked_NQ: np.ndarray  # the positions that predict an answer


def words(count: int) -> Words:
    """So many keys, values and words of filler."""
    tokenizer = Tokenizer.packaged()
    style = long_context.terse(tokenizer, keys=count, values=count, filler=count)
    plain = Words(tokenizer, style, np.zeros(0))
    spoken = (plain.fact, plain.ask, *style.keys, *style.values, *style.filler)
    return plain._replace(ids=np.sort([tokenizer.encode(f" {word}")[0] for word in spoken]))


def rows(words: Words, seed: int, count: int, length: int, *, facts: int, questions: int, rest: float) -> Batch:
    """Rows to learn from: an answer has weight 1, every other token `rest`. Every fact is asked for once before any is
    asked for again."""
    rng = np.random.default_rng(seed)
    haystack = length - QUESTION * questions
    named = lambda all, of: all[np.argsort(rng.random((count, len(all))))[:, :of]]
    keys, values = (named(words.numbers(*of), facts) for of in (words.style.keys, words.style.values))
    tokens = words.numbers(*words.style.filler)[rng.integers(len(words.style.filler), size=(count, length))]
    gaps = np.argsort(rng.random((count, haystack - (FACT - 1) * facts)))[:, :facts]
    row, places = np.arange(count)[:, None], np.sort(gaps) + (FACT - 1) * np.arange(facts)
    rounds = [np.argsort(rng.random((count, facts))) for _ in range(-(-questions // facts))]
    order = np.concatenate(rounds, 1)[:, :questions]
    asked = np.broadcast_to(haystack + QUESTION * np.arange(questions) + 1, (count, questions))
    for at, what in ((places, words.numbers(words.fact)), (places + 1, keys), (places + 2, values),
                     (asked - 1, words.numbers(words.ask)), (asked, keys[row, order]), (asked + 1, values[row, order])):
        tokens[row, at] = what
    return _batch(tokens, asked, rest)


def needles(words: Words, seed: int, count: int, length: int, *, facts: int) -> Needles:
    """`count` rows of a test, in each of which all of its facts are asked for, once."""
    question = 1 + facts  # the library asks for all at once
    tasks = [long_context.needles(words.tokenizer, words.style, length - QUESTION * facts + question, seed + number,
                                  keys=facts, queries=facts) for number in range(count)]
    tokens = np.empty((count, length), np.int32)
    for row, task in zip(tokens, tasks):
        ids = np.searchsorted(words.ids, task.ids)
        ask, keys = ids[-question], ids[-facts:]
        answers = words.numbers(*task.answers)
        row[:] = [*ids[:-question], *np.stack([np.full(facts, ask), keys, answers], 1).ravel()]
    asked = np.broadcast_to(length - QUESTION * np.arange(facts, 0, -1) + 1, (count, facts))
    return Needles(tasks, _batch(tokens, asked, 0.0), asked)


def _batch(tokens: np.ndarray, asked: np.ndarray, rest: float) -> Any:
    """One segment to a row; `Batch` is annotated for the device."""
    count, length = tokens.shape
    weights = np.full((count, length), rest, np.float32)
    weights[np.arange(count)[:, None], asked] = 1.0
    weights[:, -1] = 0.0
    targets = np.roll(tokens, -1, 1)
    targets[:, -1] = 0
    return Batch(tokens=tokens, targets=targets, weights=weights, segment_ids=np.ones_like(tokens),
                 positions=np.tile(np.arange(length, dtype=np.int32), (count, 1)))


class Answers(NamedTuple):
    """The share of the needles that was found, nats per answer, and nats per token of the rows, all tokens alike."""

    found: float
    answer_nats: float
    token_nats: float


def answers(params: Any, config: ModelConfig, words: Words, needles: Needles, *, rows: int, attention: Attention
            ) -> Answers:
    """The likeliest word after each question, given the right answers to those before it; `rows` rows at a time."""
    found, answer_nats, token_nats = [], [], []
    for start in range(0, len(needles.tasks), rows):
        part = jax.tree.map(lambda x: x[start:start + rows], needles.batch)
        best, nats = (np.asarray(x) for x in _predictions(params, config, part, attention))
        token_nats.append(nats[:, :-1].mean())
        for task, at, best_T, nats_T in zip(needles.tasks[start:], needles.asked_NQ[start:], best, nats):
            found.append(task.score(words.tokenizer.decode([int(id) for id in words.ids[best_T[at]]])))
            answer_nats.append(nats_T[at].mean())
    return Answers(*(float(np.mean(each)) for each in (found, answer_nats, token_nats)))


@functools.partial(jax.jit, static_argnums=(1, 3))
def _predictions(params: Any, config: ModelConfig, batch: Batch, attention: Attention) -> tuple[jax.Array, jax.Array]:
    """The likeliest next tokens, and the nats of the right ones, [N, T] each."""
    logits = transformer.forward(params, config, batch.tokens, attention=attention).logits
    return logits.argmax(-1), token.cross_entropy(logits, batch.targets)
