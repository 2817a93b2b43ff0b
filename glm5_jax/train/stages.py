"""The stages of a training run: each an objective on a model, composed here by name, and walked in order.

    pretrain     dense attention; indexers wait
    midtrain     the same on longer rows, with another rotary base; one stage per length
    dsa_warmup   dense attention; indexers alone train, to predict it
    dsa_sparse   attention to what indexers select; all train: indexers on their KL, the rest on the language
    sft          the same on conversations

GLM-5 report, sections 2.1 and 3 and appendix A.
"""

import dataclasses
import itertools
from typing import Any, Callable, Mapping, Sequence

import optax

from glm5_jax.checkpoint.store import Store
from glm5_jax.core import metrics as core_metrics
from glm5_jax.model.config import ModelConfig
from glm5_jax.train import dsa_adapt, loop, state as train_state, step as train_step
from glm5_jax.train.state import TrainState
from glm5_jax.train.step import Options


def pretrain(options: Options) -> Options:
    """Dense attention; what only the indexer needs is not computed. Mid-training is the same on longer rows."""
    return dataclasses.replace(options, attention="dense", indexer_loss=None, frozen={*options.frozen, "indexer"})


def sft(options: Options) -> Options:
    """As the sparse stage of `dsa_adapt`; the data say which tokens are learned."""
    return dsa_adapt.sparse(options)


KINDS: Mapping[str, Callable[[Options], Options]] = {
    "pretrain": pretrain, "midtrain": pretrain, "dsa_warmup": dsa_adapt.warmup, "dsa_sparse": dsa_adapt.sparse,
    "sft": sft}


@dataclasses.dataclass(frozen=True)
class Stage:
    """`steps` steps of `options` on `config`, whose parameters all stages share, by an `optimizer` for the same
    `frozen` and `trainable` tags. It begins anew, or with `keep` it remembers the stage before, which must be of the
    same kind. Schedules count the tokens of the stage."""

    name: str
    steps: int
    config: ModelConfig
    options: Options
    optimizer: optax.GradientTransformationExtraArgs
    keep: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Stage {self.name}: expected at least 1 step, found {self.steps}")


def run(stages: Sequence[Stage], *, params: Callable[[], Any], batches: Callable[[Stage], loop.Batches],
        store: Callable[[Stage], Store], writer: core_metrics.JsonlWriter, cadence: loop.Cadence,
        evaluate: Callable[[Stage, Any], Mapping[str, float]] = lambda stage, params: {},
        say: Callable[[str], None] = print) -> TrainState:
    """Walks the stages, from the newest checkpoint where there is one; returns the state after the last.

    Steps count through all stages. `params` makes the first parameters; `batches` gives the data of a stage; `store`
    opens the one directory of checkpoints, where a checkpoint at the border of two stages belongs to the first of them.
    What `evaluate` says of a stage's parameters is written at its last step as `<stage>/<measure>/after`, and in the
    row before its first step as `<stage>/<measure>/before`. Raises as `loop.run` does, and ValueError for two stages
    of one name.
    """
    ends = list(itertools.accumulate(stage.steps for stage in stages))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"stages: expected at least one, each with a name of its own, found {names}")
    measured = lambda stage, when, params: {f"{stage.name}/{name}/{when}": value
                                            for name, value in evaluate(stage, params).items()}
    with store(stages[0]) as opened:
        saved = opened.latest_step() or 0
    first = next((index for index, end in enumerate(ends) if saved <= end), None)
    if first is None:
        raise ValueError(f"the newest checkpoint is of step {saved}, but the stages end at {ends[-1]}; pass the stages "
                         f"it was made with")
    state: TrainState | None = None
    for index in range(first, len(stages)):
        stage, data = stages[index], batches(stages[index])
        step = train_step.make_train_step(stage.config, stage.optimizer, stage.options)

        def at_end(state: TrainState, index: int = index) -> dict[str, float]:
            found = measured(stages[index], "after", state.params)
            return found | (measured(stages[index + 1], "before", state.params) if index + 1 < len(stages) else {})

        with store(stage) as opened:
            if state is not None:
                state = train_state.settled(train_state.next_stage(state, stage.optimizer, keep=stage.keep))
            elif (state := loop.resume(opened, train_state.abstract(stage.config, stage.optimizer), data)) is not None:
                writer.truncate_after(int(state.step))
                say(f"Resumed from step {int(state.step)} of {ends[-1]}, in the stage {stage.name}.")
            else:
                state = train_state.settled(train_state.from_params(params(), stage.optimizer))
                writer.truncate_after(-1)
                writer.write(0, measured(stage, "before", state.params))
            state = loop.run(state, step, data, until=ends[index], store=opened, writer=writer, name=stage.name,
                             cadence=dataclasses.replace(cadence, eval_every=ends[-1]), evaluate=at_end)
    assert state is not None
    return state
