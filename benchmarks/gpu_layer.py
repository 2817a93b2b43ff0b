"""One whole layer of the model and its parts, by the kernels that are named.

The experts are those of one device among many; every token goes to each of them, as many rows as an even load brings.

T tokens, D model width.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.core import params as parameters
from glm5_jax.model import dsa, layer, mla, moe
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.primitives import Params, mlp, rms_norm, rope_table
import pallas_kernels


class Inputs(NamedTuple):
    params: Params
    x_1TD: jax.Array
    view: layer.View


def inputs(config: ModelConfig, tokens: int) -> Inputs:
    """One sequence."""
    params = jax.jit(lambda key: parameters.initialise(layer.specs(config, config.layer_kinds[0]), key))(
        jax.random.key(0))
    x_1TD = jax.random.normal(jax.random.key(1), (1, tokens, config.hidden_size)).astype(config.dtype)
    positions, ones = jnp.arange(tokens, dtype=jnp.int32)[None], jnp.ones((1, tokens), jnp.int32)
    rope = rope_table(positions, config.qk_rope_head_dim, config.rope_theta)
    return Inputs(params, x_1TD, layer.View(positions, ones, positions, ones, rope))


def whole(config: ModelConfig, view: layer.View, params: Params, x_1TD: jax.Array) -> jax.Array:
    request, nothing = layer.Request(), jnp.zeros((), jnp.int32)
    flow = layer.begin(config, x_1TD, x_1TD.shape[1], request)
    return layer.apply(params, config, config.layer_kinds[0], flow, view, nothing, nothing, request)[0].x_BTD


class Projected(NamedTuple):
    """What the kernels work on, made by everything else of the layer."""

    x_1TD: jax.Array
    q_1THR: jax.Array
    rows_1SR: jax.Array
    index: dsa.IndexInputs
    u_1TD: jax.Array
    routing: moe.Routing


def projections(config: ModelConfig, view: layer.View, params: Params, x_1TD: jax.Array) -> Projected:
    """All of the layer but selection, attention and experts; in place of attention's result stand the queries."""
    attention, eps = params["attention"], config.rms_norm_eps
    u = rms_norm(x_1TD, params["input_norm"], eps)
    latent = mla.query_latent(attention, config, u)
    rows = mla.latent_rows(attention, config, u, view.rope)
    index = dsa.index_inputs(params["indexer"], config, u, latent, view.rope)
    q = mla.absorb_queries(attention, config, mla.queries(attention, config, latent, view.rope))
    x_1TD += mla.output(attention, mla.values_from_latent(attention, q[..., :config.kv_lora_rank]))
    u = rms_norm(x_1TD, params["post_attention_norm"], eps)
    routing = moe.route(params["moe"], config, u.reshape(-1, u.shape[-1]))
    return Projected(x_1TD + mlp(params["moe"]["shared"], u), q, rows, index, u, routing)


def with_gradient(fn: Callable[..., Any], *args: Any) -> Any:
    """The gradients by all arguments, of a cotangent that is the floating results themselves."""
    floating = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    out, pull = jax.vjp(lambda *args: floating(fn(*args)), *args)
    return pull(out)


def programs(config: ModelConfig, given: Inputs) -> dict[str, tuple[Any, ...]]:
    """`function, *arguments` of the whole layer and of its parts, forward and backward."""
    made = jax.jit(lambda given: projections(config, given.view, given.params, given.x_1TD))(given)
    view = given.view
    sight = {"q_positions": view.positions_BT, "k_positions": view.key_positions_BS,
             "q_segments": view.segment_ids_BT, "k_segments": view.key_segment_ids_BS}

    def of_layer(fn: Callable[..., Any]) -> tuple[Any, Inputs]:
        return lambda given: with_gradient(functools.partial(fn, config, given.view), given.params, given.x_1TD), given

    def select(index: dsa.IndexInputs, sight: dict[str, jax.Array]) -> jax.Array:
        return pallas_kernels.select_topk(
            index.queries_BTIC, index.keys_BSC, index.weights_BTI, scale=1.0, **sight, **config.kernel_options,
            top_k=min(config.index_topk, index.keys_BSC.shape[1]))

    def attend(indices: jax.Array, *floating: jax.Array) -> Any:
        return with_gradient(lambda q, rows: pallas_kernels.sparse_mla(
            q, rows, indices, scale=config.qk_head_dim ** -0.5, value_dim=config.kv_lora_rank,
            **config.kernel_options), *floating)

    def mix(routing: moe.Routing, *floating: Any) -> Any:
        return with_gradient(lambda experts, u: moe.apply_experts(experts, config, routing, u), *floating)

    return {"whole": of_layer(whole), "projections": of_layer(projections), "selection": (select, made.index, sight),
            "attention": (attend, jax.jit(select)(made.index, sight), made.q_1THR, made.rows_1SR),
            "experts": (mix, made.routing, given.params["moe"]["experts"], made.u_1TD)}
