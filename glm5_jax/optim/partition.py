"""Which parameter gets which update: read from the tags of the `ParamSpec` tree, never from names."""

from typing import Any, Collection, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from glm5_jax.core import params as core_params
from glm5_jax.core.params import ParamSpec
from glm5_jax.optim import muon_split, schedules
from glm5_jax.optim.schedules import Schedule

Optimizer = Literal["muon_split", "muon", "adamw"]
Group = Literal["muon", "adamw", "frozen"]

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
NEVER_TRAINED = frozenset({"router_bias"})  # moved by the load rule of the trainer


def build(specs: Any, *, learning_rate: float | Schedule, optimizer: Optimizer = "muon_split",
          weight_decay: float = 0.1, frozen: Collection[str] = (), trainable: Collection[str] | None = None,
          momentum: float = 0.95, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
          ) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a parameter tree that `specs` describes: every parameter is in one of the `groups`.

    "muon_split" and "muon" (with `momentum`) move what is tagged `matrix`: routers and indexers too, as the GLM-4.5
    report, section 2.4, excepts embeddings, biases and norms alone (the output head, where it says nothing, is taken
    for an embedding). AdamW (with `b1`, `b2`, `eps`) moves the rest, or all. The learning rate is one: Muon's update is
    scaled to the root mean square that AdamW's tends to. Weight decay is decoupled and falls on the tag `matrix` alone.

    A `learning_rate` that is a schedule over tokens makes `update` take `tokens_seen`, float32 []: the train state
    knows it, so that no optimiser counts for itself.

    Parameters with a tag of `frozen`, without any of `trainable` (None: all train), or tagged `router_bias` get an
    update of exactly 0, and nothing is kept for them. Gradients may be of any dtype; all is computed and kept in
    float32. Raises ValueError for an unknown tag or optimiser, and for a `matrix` that Muon cannot take apart, by name.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {OPTIMIZERS}, found {optimizer!r}")
    split = optimizer == "muon_split"
    labels = groups(specs, optimizer=optimizer, frozen=frozen, trainable=trainable)
    _check_blocks(specs, labels, split)
    decays = core_params.map_specs(lambda spec: "matrix" in spec.tags, specs)
    descent = optax.add_decayed_weights(weight_decay, mask=decays), descend(learning_rate)
    transforms: dict[str, Any] = {
        "muon": optax.chain(muon_split.scale_by_muon(specs, split=split, momentum=momentum), *descent),
        "adamw": optax.chain(_in_float32(optax.scale_by_adam(b1=b1, b2=b2, eps=eps)), *descent),
        "frozen": optax.set_to_zero(),
    }
    return optax.partition({group: transforms[group] for group in sorted(set(jax.tree.leaves(labels)))}, labels)


def groups(specs: Any, *, optimizer: Optimizer, frozen: Collection[str] = (),
           trainable: Collection[str] | None = None) -> Any:
    """The tree of the `Group` that each parameter is in. Raises ValueError for an unknown tag."""
    for field, tags in (("frozen", frozen), ("trainable", trainable or ())):
        if unknown := set(tags) - core_params.TAGS:
            raise ValueError(f"{field}: unknown tags {sorted(unknown)}; known are {sorted(core_params.TAGS)}")
    still = NEVER_TRAINED | set(frozen)

    def group(spec: ParamSpec) -> Group:
        if spec.tags & still or not (trainable is None or spec.tags & set(trainable)):
            return "frozen"
        return "muon" if "matrix" in spec.tags and optimizer != "adamw" else "adamw"

    return core_params.map_specs(group, specs)


def descend(learning_rate: float | Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the learning rate; of a schedule, at the `tokens_seen` that `update` is given."""
    def update(updates: Any, state: optax.EmptyState, params: Any = None, *, tokens_seen: jax.Array | None = None,
               **_: Any) -> tuple[Any, optax.EmptyState]:
        if callable(learning_rate) and tokens_seen is None:
            raise ValueError("update: expected tokens_seen, since the learning rate is a schedule over tokens, found "
                             "none; pass update(..., tokens_seen=...)")
        rate = schedules.at(learning_rate, tokens_seen)
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _in_float32(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule on float32 gradients, as of float32 parameters: squares in bfloat16 have no digits left to average."""
    widened = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    return optax.GradientTransformation(
        lambda params: rule.init(widened(params)),
        lambda gradients, state, params=None: rule.update(widened(gradients), state, params))


def _check_blocks(specs: Any, labels: Any, split: bool) -> None:
    leaves, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=core_params.is_spec)
    for (path, spec), group in zip(leaves, jax.tree.leaves(labels)):
        if group == "muon":
            try:
                muon_split.blocks(spec, split=split)
            except ValueError as error:
                raise ValueError(f"parameter {core_params.path_name(path)}: {error}") from error
