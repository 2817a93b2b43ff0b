"""Outcome reward models: a number for a whole reply, learned from examples; cheap, of low variance, and hackable.

The small default is a logistic regression on hashed words of the reply, pairs of neighbours, and pairs of a word of the
conversation with a word of the reply, trained on a CPU in seconds. Beside it, `TokenScorer` takes any function of
token ids, such as a head on a large model.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy

from glm5_jax.records import Message, Trajectory
from glm5_jax.rewards.base import Dimension, Judgement, ScorerFailed, asked, conversation, final_text, text

KIND = "glm5_jax.rewards.outcome 1"


class Example(NamedTuple):
    """A reply and what it answers, as `base.conversation` gives it."""

    asked: str
    reply: str


@dataclasses.dataclass(frozen=True)
class OutcomeModel:
    """`weights` float32 [features], `bias`, and the `seed` of the hash, 0 or more: two seeds confuse other words.

    Raises ValueError for a field that is something else.
    """

    weights: np.ndarray
    bias: float
    seed: int

    def __post_init__(self) -> None:
        if self.weights.dtype != np.float32 or self.weights.ndim != 1 or not self.weights.size:
            raise ValueError(f"OutcomeModel.weights: expected float32 [features], found {self.weights.dtype} "
                             f"{list(self.weights.shape)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"OutcomeModel.seed: expected 0 to 2**64 - 1, found {self.seed}")


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is fitted: full batches, from zero, by Adam. Raises ValueError for a number that is not positive."""

    features: int = 8192
    steps: int = 100
    learning_rate: float = 0.3
    decay: float = 1e-4  # of half the squared weights, added to the loss

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"Training.{field.name}: expected more than 0, found {getattr(self, field.name)!r}")


@dataclasses.dataclass(frozen=True)
class OutcomeScorer:
    """The scorer of a model: the sigmoid of its logit."""

    name: str
    dimension: Dimension
    model: OutcomeModel

    async def score(self, trajectories: Sequence[Trajectory]) -> tuple[Judgement, ...]:
        found = logits(self.model, [Example(asked(one), final_text(one)) for one in trajectories])
        return tuple(Judgement(self.name, self.dimension, np.exp(-np.logaddexp(0.0, -logit)), f"logit {logit:.3f}")
                     for logit in found)


@dataclasses.dataclass(frozen=True)
class TokenScorer:
    """The scorer of any function of the ids, prompt and reply, of the last turn; it gives a number from 0 to 1."""

    name: str
    dimension: Dimension
    function: Callable[[Sequence[int]], float]

    async def score(self, trajectories: Sequence[Trajectory]) -> tuple[Judgement, ...]:
        return tuple(Judgement(self.name, self.dimension, self.function(self._ids(one))) for one in trajectories)

    def _ids(self, trajectory: Trajectory) -> tuple[int, ...]:
        completion = trajectory.turns[-1].completion if trajectory.turns else None
        if completion is None:
            raise ScorerFailed(f"scorer {self.name}, trajectory {trajectory.id}: expected a last turn with tokens, "
                               f"found none")
        return trajectory.prompt(len(trajectory.turns) - 1) + completion.ids


def example(messages: Sequence[Message]) -> Example:
    """A conversation whose last message is the reply."""
    return Example(conversation(messages[:-1]), text(messages[-1]))


def fit_pairs(pairs: Sequence[tuple[Example, Example]], *, seed: int = 0, training: Training = Training(),
              ) -> OutcomeModel:
    """The model of pairs of a better and a worse reply: -log sigmoid(better - worse), as Bradley and Terry have it.

    Pairs say nothing of the level: the mean logit of all replies of the pairs is set to 0. Raises ValueError without
    pairs.
    """
    better, worse = (_features([pair[i] for pair in pairs], training.features, seed, "pairs") for i in (0, 1))
    weights, _ = _fit(better - worse, np.ones(len(pairs), np.float32), training, with_bias=False)
    return OutcomeModel(weights, -float(np.mean((better + worse) @ weights) / 2), seed)


def fit_labels(examples: Sequence[Example], labels: Sequence[float], *, seed: int = 0, training: Training = Training(),
               ) -> OutcomeModel:
    """The model of examples labelled from 0 to 1, by their cross-entropy. Raises ValueError without examples, for
    another number of labels, and for a label outside 0 to 1."""
    if len(labels) != len(examples) or not all(0 <= label <= 1 for label in labels):
        raise ValueError(f"labels: expected {len(examples)} from 0 to 1, found {len(labels)}: {labels!r:.100}")
    features = _features(examples, training.features, seed, "examples")
    weights, bias = _fit(features, np.array(labels, np.float32), training, with_bias=True)
    return OutcomeModel(weights, bias, seed)


def logits(model: OutcomeModel, examples: Sequence[Example]) -> np.ndarray:
    """float32 [examples]"""
    if not examples:
        return np.zeros(0, np.float32)
    return _features(examples, len(model.weights), model.seed, "examples") @ model.weights + np.float32(model.bias)


def save(model: OutcomeModel, path: str | os.PathLike[str]) -> None:
    """Writes the model as one safetensors file."""
    metadata = {"kind": KIND, "model": json.dumps({"bias": model.bias, "seed": model.seed})}
    safetensors.numpy.save_file({"weights": model.weights}, path, metadata)


def load(path: str | os.PathLike[str]) -> OutcomeModel:
    """The model that `save` has written; raises OSError without a file, ValueError for one that is something else."""
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(f"{path}: expected an outcome model, kind {KIND!r}, found {metadata.get('kind')!r}")
            return OutcomeModel(file.get_tensor("weights"), **json.loads(metadata["model"]))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected an outcome model as safetensors, found: {error}") from error


def _features(examples: Sequence[Example], size: int, seed: int, what: str) -> np.ndarray:
    """float32 [examples, size], each of length 1 so that a longer reply is not a better one."""
    if not examples:
        raise ValueError(f"{what}: expected one or more to learn from, found none")
    found = np.zeros((len(examples), size), np.float32)
    for row, one in zip(found, examples):
        before, words = _words(one.asked), ["", *_words(one.reply), ""]  # the empty words are the ends
        for key in {*words, *zip(words, words[1:]), *((word, "|", other) for word in before for other in words)}:
            row[_place(key if isinstance(key, str) else " ".join(key), size, seed)] += 1
        row /= np.linalg.norm(row)
    return found


def _place(key: str, size: int, seed: int) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8)).digest()
    return int.from_bytes(digest) % size


def _words(passage: str) -> list[str]:
    """Words in small letters, signs for themselves."""
    return re.findall(r"\w+|[^\w\s]", passage.lower())


def _fit(features: np.ndarray, labels: np.ndarray, training: Training, *, with_bias: bool) -> tuple[np.ndarray, float]:
    weights, bias = _minimise(jnp.asarray(features), jnp.asarray(labels), training, with_bias)
    return np.asarray(weights), float(bias)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _minimise(features: jax.Array, labels: jax.Array, training: Training, with_bias: bool) -> Any:
    optimizer = optax.adam(training.learning_rate)

    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, bias = params
        logit = features @ weights + (bias if with_bias else 0.0)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logit, labels)) + training.decay / 2 * jnp.sum(weights**2)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros(features.shape[1], jnp.float32), jnp.float32(0.0)
    (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=training.steps)
    return params
