"""Which parameter gets which update: read from the tags of the `ParamSpec` tree, never from names."""

from typing import Any, Collection

import jax
import jax.numpy as jnp
import optax

from glm5_jax.core import params as core_params
from glm5_jax.optim.schedules import Schedule, constant

NEVER_TRAINED = frozenset({"router_bias"})  # moved by the load rule of the trainer


def build(specs: Any, *, learning_rate: float | Schedule, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.95,
          eps: float = 1e-8, frozen: Collection[str] = ()) -> optax.GradientTransformationExtraArgs:
    """AdamW for a parameter tree that `specs` describes, with decoupled weight decay on the tag `matrix` alone.

    `learning_rate` may be a schedule over tokens: `update` then takes `tokens_seen`, float32 []. Parameters with a tag
    of `frozen`, and those tagged `router_bias`, get an update of exactly 0. Raises ValueError for an unknown tag.
    """
    if unknown := set(frozen) - core_params.TAGS:
        raise ValueError(f"frozen: unknown tags {sorted(unknown)}; known are {sorted(core_params.TAGS)}")
    still = NEVER_TRAINED | set(frozen)
    groups = core_params.map_specs(lambda spec: "frozen" if spec.tags & still else "trained", specs)
    decays = core_params.map_specs(lambda spec: "matrix" in spec.tags and not spec.tags & still, specs)
    adamw = optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(weight_decay, mask=decays),
        descend(learning_rate),
    )
    return optax.partition({"trained": adamw, "frozen": optax.set_to_zero()}, groups)


def descend(learning_rate: float | Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the learning rate; keeps no count of its own: the train state knows the tokens seen."""
    schedule = learning_rate if callable(learning_rate) else constant(learning_rate)

    def update(updates: Any, state: optax.EmptyState, params: Any = None, *, tokens_seen: jax.Array, **_: Any
               ) -> tuple[Any, optax.EmptyState]:
        rate = schedule(tokens_seen)
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
