"""What training carries from step to step, and nothing else: a checkpoint of it resumes exactly."""

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from glm5_jax.core import mesh as core_mesh, params as core_params
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.train import guard

_UNIT = 10**6


@struct.dataclass
class TrainState:
    """Steps done, parameters, what the optimiser remembers, tokens seen in all and in this stage, and the guard over
    gradients.

    Tokens are int32 [2], millions and the rest: one int32 ends at two billion, and float32 stops counting.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    tokens_seen: jax.Array
    stage_tokens: jax.Array
    guard: guard.Guard


def create(config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step, with parameters drawn from `key`."""
    return from_params(transformer.init(config, key), optimizer)


def from_params(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step that starts from given parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params), jnp.zeros(2, jnp.int32),
                      jnp.zeros(2, jnp.int32), guard.fresh())


def next_stage(state: TrainState, optimizer: optax.GradientTransformation, *, keep: bool = False) -> TrainState:
    """The state with which another stage begins: the parameters, steps and tokens in all as they are, the tokens of
    the stage 0, the guard fresh; what the optimiser remembers is as new, or with `keep` as it was.

    Raises ValueError for `keep` where the optimiser keeps something else than the one before.
    """
    kept, wanted = (jax.tree_util.tree_flatten_with_path(tree)[0]
                    for tree in (state.opt_state, jax.eval_shape(optimizer.init, state.params)))
    if keep and [path for path, _ in kept] != [path for path, _ in wanted]:
        raise ValueError("keep: expected an optimiser for the same parameters as in the stage before, found another; "
                         "begin it anew, with keep=False")
    opt_state = state.opt_state if keep else jax.jit(optimizer.init)(state.params)
    return TrainState(state.step, state.params, opt_state, state.tokens_seen, jnp.zeros(2, jnp.int32), guard.fresh())


def settled(state: TrainState) -> TrainState:
    """The state with all arrays committed to the device of its parameters, as what is restored is.

    A step that is handed a mixture, and then what it made of it, is compiled twice. A state whose parameters are split
    over devices stays as it is.
    """
    return beside(state, state)


def beside(state: TrainState, tree: Any) -> Any:
    """Any arrays, committed to the device of the state's parameters, or as they are where those are split."""
    home = jax.device_put(jax.tree.leaves(state.params)[0]).sharding
    return jax.device_put(tree, home) if len(home.device_set) == 1 else tree


def abstract(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh | None = None
             ) -> TrainState:
    """The state as `jax.ShapeDtypeStruct` with shardings, the target of a restore; nothing is allocated.

    With a mesh, parameters and what the optimiser keeps for each are split as `config.sharding` says, the rest is
    whole everywhere; without one, all is on the default device.
    """
    specs = transformer.param_specs(config)
    state = jax.eval_shape(functools.partial(from_params, optimizer=optimizer), core_params.abstract(specs))
    if mesh is None:
        whole: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: _placed(x, whole), state)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = core_mesh.param_shardings(specs, mesh, config.sharding)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, _placed, state.opt_state, split, transform_non_params=lambda x: _placed(x, whole),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode))  # what a group of the optimiser leaves to another
    return TrainState(_placed(state.step, whole), jax.tree.map(_placed, state.params, split), opt_state,
                      _placed(state.tokens_seen, whole), _placed(state.stage_tokens, whole),
                      jax.tree.map(lambda x: _placed(x, whole), state.guard))


def add_tokens(tokens_seen: jax.Array, new: jax.Array) -> jax.Array:
    """`tokens_seen` after `new` more, an int32 below two billion."""
    rest = tokens_seen[1] + new
    return jnp.stack([tokens_seen[0] + rest // _UNIT, rest % _UNIT])


def as_float(tokens_seen: jax.Array) -> jax.Array:
    """Tokens seen as float32 [], near enough for a schedule."""
    return tokens_seen[0].astype(jnp.float32) * _UNIT + tokens_seen[1].astype(jnp.float32)


def _placed(x: Any, sharding: jax.sharding.Sharding) -> Any:
    if isinstance(x, optax.MaskedNode):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
