"""Whether two checkpoints say the same: weight by weight, then by what the model answers on a text."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from glm5_jax.checkpoint import hf_names
from glm5_jax.checkpoint.errors import CheckpointError
from glm5_jax.checkpoint.sources import Source
from glm5_jax.model.config import DTYPE_FIELDS, ModelConfig
from glm5_jax.model.transformer import forward


@dataclasses.dataclass(frozen=True)
class WeightDifference:
    """A tensor that differs: by how much at most, and the root mean square of it over that of the first tensor."""

    name: str
    max_abs: float
    relative_rms: float


@dataclasses.dataclass(frozen=True)
class AnswerDifference:
    """How the second model's answers differ from the first's, over the positions of a text."""

    max_error: float              # of a logit
    mean_kl: float                # nats, KL(first || second) of the next token
    max_kl: float
    top_agreement: dict[int, float]  # {k: mean share of the first's k likeliest tokens among the second's}
    first_layer: int | None       # whose output is the first to differ; 0 is the embedding, None where none does
    layer_errors: tuple[float, ...]  # by layer: root mean square of the difference over that of the first

    def __str__(self) -> str:
        where = "no layer differs" if self.first_layer is None else (
            f"the output of {self.first_layer} layers is the first to differ "
            f"({self.layer_errors[self.first_layer]:.2e} relative), after the last {self.layer_errors[-1]:.2e}")
        top = ", ".join(f"top-{k} {share:.2%}" for k, share in self.top_agreement.items())
        return (f"logits differ by at most {self.max_error:.3e}; KL mean {self.mean_kl:.3e}, worst {self.max_kl:.3e} "
                f"nats; agreement {top}; {where}")


def check_same_model(one: Source, other: Source) -> None:
    """Raises CheckpointError naming the fields in which the two configs differ."""
    differ = [f"{field.name}: {ours!r} and {theirs!r}" for field in dataclasses.fields(ModelConfig)
              if field.name not in DTYPE_FIELDS
              and (ours := getattr(one.config, field.name)) != (theirs := getattr(other.config, field.name))]
    if differ:
        raise CheckpointError(f"{one.path} and {other.path}: expected checkpoints of one model, found configs that "
                              f"differ in {'; '.join(differ)}")


def weights(one: Source, other: Source, *, progress: bool = False) -> list[WeightDifference]:
    """The tensors that differ, compared in float32, one at a time."""
    differ = []
    for entry in tqdm.tqdm(hf_names.entries(one.config), "weights", unit="tensor", disable=not progress):
        ours, theirs = one.read(entry), other.read(entry)
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
        if np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)):  # NaN too
            continue
        error = np.abs(ours - theirs)
        norm = float(np.sqrt(np.square(ours, dtype=np.float64).sum()))
        rms = float(np.sqrt(np.square(error, dtype=np.float64).sum())) / norm if norm else np.inf
        differ.append(WeightDifference(entry.name, float(error.max()), rms))
    return differ


def answers(one: Source, other: Source, tokens: np.ndarray, *, top: tuple[int, ...] = (1, 5),
            tolerance: float = 1e-5) -> AnswerDifference:
    """Runs both models over `tokens` int [T], in float32 and one after the other, and compares.

    A layer differs where the root mean square of the difference exceeds `tolerance` times that of its output.
    """
    (logits, layers), (logits_other, layers_other) = (_run(source, tokens) for source in (one, other))
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits_other)
    kl = np.asarray((jnp.exp(log_p) * (log_p - log_q)).sum(-1))
    rms = lambda x: float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
    errors = tuple(rms(a - b) / max(rms(a), 1e-30) for a, b in zip(layers, layers_other))
    first = next((i for i, error in enumerate(errors) if not error <= tolerance), None)
    agreement = {k: _agreement(logits, logits_other, k) for k in top}
    return AnswerDifference(float(np.abs(logits - logits_other).max()), float(kl.mean()), float(kl.max()), agreement,
                            first, errors)


def _agreement(logits: np.ndarray, logits_other: np.ndarray, k: int) -> float:
    chosen = (np.argsort(-x, axis=-1, kind="stable")[:, :k] for x in (logits, logits_other))
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*map(np.ndarray.tolist, chosen))]))


def _run(source: Source, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    config = source.config.replace(dtype="float32")
    params: Any = source.load()
    output = forward(params, config, jnp.asarray(tokens)[None], collect=("hidden",))
    names = [*range(config.num_hidden_layers), "final_norm"]
    layers = [np.asarray(output.collected[f"hidden/{name}"][0]) for name in names]
    return np.asarray(output.logits[0]), layers
