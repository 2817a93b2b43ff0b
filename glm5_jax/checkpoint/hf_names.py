"""The released tensor names, and one list of invertible operations between them and our parameters.

An `Entry` says which slices of which parameters make one checkpoint tensor, and how, in both directions. Checkpoint
matrices are [out, in] with heads folded into a dimension; ours are [in, ..., out] with heads apart.
"""

import collections
import functools
from typing import Any, Callable, Iterator, NamedTuple

import jax
import numpy as np

from glm5_jax.core.params import is_spec, path_name
from glm5_jax.model import mtp, stacks
from glm5_jax.model.config import LayerKind, ModelConfig
from glm5_jax.model.transformer import param_specs

Path = tuple[str, ...]


class Op(NamedTuple):
    """An invertible map between parameter slices and a checkpoint tensor, and what it does to their shapes."""

    to_hf: Callable[..., np.ndarray]
    from_hf: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # views where it can
    shape: Callable[..., tuple[int, ...]]


class Entry(NamedTuple):
    """One checkpoint tensor: its name and shape, the slices (path and leading index) it is made of, and how."""

    name: str
    shape: tuple[int, ...]
    slices: tuple[tuple[Path, tuple[int, ...]], ...]
    op: Op


class Piece(NamedTuple):
    """What one checkpoint tensor gives a parameter: result number `part` of `entry.op.from_hf`, at a leading index."""

    entry: Entry
    part: int
    at: tuple[int, ...]


SAME = Op(lambda x: x, lambda x: (x,), lambda shape: shape)
TRANSPOSED = Op(lambda x: x.T, lambda x: (x.T,), lambda shape: shape[::-1])


def heads_out(heads: int) -> Op:
    """[R, H, C] <-> [H*C, R]."""
    return Op(lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
              lambda x: (x.reshape(heads, -1, x.shape[-1]).transpose(2, 0, 1),),
              lambda shape: (shape[1] * shape[2], shape[0]))


def heads_in(heads: int) -> Op:
    """[H, C, D] <-> [D, H*C]."""
    return Op(lambda x: x.transpose(2, 0, 1).reshape(x.shape[-1], -1),
              lambda x: (x.reshape(x.shape[0], heads, -1).transpose(1, 2, 0),),
              lambda shape: (shape[2], shape[0] * shape[1]))


def key_value_heads(heads: int, key_dim: int) -> Op:
    """[R, H, key] and [R, H, value] <-> [H*(key+value), R], the rows of each head together, keys first."""
    both = heads_out(heads)
    return Op(lambda k, v: both.to_hf(np.concatenate([k, v], -1)),
              lambda x: tuple(np.split(both.from_hf(x)[0], [key_dim], -1)),
              lambda k, v: (k[1] * (k[2] + v[2]), k[0]))


def _layer(config: ModelConfig, kind: LayerKind) -> Iterator[tuple[str, tuple[Path, ...], Op]]:
    """(name within the layer, our paths within the layer, operation); expert tensors have `{e}` in their name."""
    heads = config.num_attention_heads
    yield "input_layernorm.weight", (("input_norm",),), SAME
    yield "post_attention_layernorm.weight", (("post_attention_norm",),), SAME
    attention: list[tuple[str, tuple[str, ...], Op]] = [
        ("q_a_proj.weight", ("q_a",), TRANSPOSED), ("q_a_layernorm.weight", ("q_a_norm",), SAME),
        ("q_b_proj.weight", ("q_b",), heads_out(heads)), ("kv_a_proj_with_mqa.weight", ("kv_a",), TRANSPOSED),
        ("kv_a_layernorm.weight", ("kv_a_norm",), SAME),
        ("kv_b_proj.weight", ("k_b", "v_b"), key_value_heads(heads, config.qk_nope_head_dim)),
        ("o_proj.weight", ("o",), heads_in(heads))]
    if config.attention_bias:
        attention += [("q_a_proj.bias", ("q_a_bias",), SAME), ("kv_a_proj_with_mqa.bias", ("kv_a_bias",), SAME),
                      ("o_proj.bias", ("o_bias",), SAME)]
    for name, ours, op in attention:
        yield f"self_attn.{name}", tuple(("attention", our) for our in ours), op
    if kind.indexer == "full":
        yield "self_attn.indexer.wq_b.weight", (("indexer", "q"),), heads_out(config.index_n_heads)
        yield "self_attn.indexer.wk.weight", (("indexer", "k"),), TRANSPOSED
        yield "self_attn.indexer.k_norm.weight", (("indexer", "k_norm", "scale"),), SAME
        yield "self_attn.indexer.k_norm.bias", (("indexer", "k_norm", "bias"),), SAME
        yield "self_attn.indexer.weights_proj.weight", (("indexer", "weights"),), TRANSPOSED
    if kind.mlp == "dense":
        for part in ("gate", "up", "down"):
            yield f"mlp.{part}_proj.weight", (("mlp", part),), TRANSPOSED
        return
    yield "mlp.gate.weight", (("moe", "router"),), TRANSPOSED
    yield "mlp.gate.e_score_correction_bias", (("moe", "router_bias"),), SAME
    for part in ("gate", "up", "down"):
        yield f"mlp.experts.{{e}}.{part}_proj.weight", (("moe", "experts", part),), TRANSPOSED
        yield f"mlp.shared_experts.{part}_proj.weight", (("moe", "shared", part),), TRANSPOSED


def _all(config: ModelConfig) -> Iterator[tuple[str, tuple[tuple[Path, tuple[int, ...]], ...], Op]]:
    def of_layer(prefix: str, kind: LayerKind, root: Path, index: tuple[int, ...]) -> Iterator[Any]:
        for name, paths, op in _layer(config, kind):
            for e in range(config.n_routed_experts) if "{e}" in name else (None,):
                own = index if e is None else (*index, e)
                yield prefix + name.format(e=e), tuple((root + path, own) for path in paths), op

    yield "model.embed_tokens.weight", ((("embedding",), ()),), SAME
    yield "model.norm.weight", ((("norm",), ()),), SAME
    if not config.tie_word_embeddings:
        yield "lm_head.weight", ((("head",), ()),), TRANSPOSED
    for segment in stacks.plan(config.layer_kinds):
        for run in segment:
            for index, i in np.ndenumerate(run.layers):
                yield from of_layer(f"model.layers.{i}.", run.kind, ("layers", run.name), index)
    if config.num_nextn_predict_layers:
        prefix = f"model.layers.{config.num_hidden_layers}."
        yield from of_layer(prefix, mtp.KIND, ("mtp", "layer"), ())
        for name, ours, op in (("enorm", "embed_norm", SAME), ("hnorm", "hidden_norm", SAME),
                               ("eh_proj", "projection", TRANSPOSED), ("shared_head.norm", "norm", SAME)):
            yield f"{prefix}{name}.weight", ((("mtp", ours), ()),), op


@functools.lru_cache(maxsize=8)
def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """Every tensor of a checkpoint of this config; together they cover every element of every parameter once."""
    specs = param_specs(config)
    cached: dict[Any, tuple[int, ...]] = {}
    out = []
    for name, slices, op in _all(config):
        kind = tuple((path[:1] + path[2:] if path[0] == "layers" else path, len(index)) for path, index in slices)
        if kind not in cached:
            cached[kind] = op.shape(*(leaf_at(specs, path).shape[len(index):] for path, index in slices))
        out.append(Entry(name, cached[kind], slices, op))
    return tuple(out)


def count(config: ModelConfig) -> int:
    """How many tensors `entries` has, without making them."""
    def of_layer(kind: LayerKind) -> int:
        return sum(config.n_routed_experts if "{e}" in name else 1 for name, _, _ in _layer(config, kind))

    kinds = collections.Counter(config.layer_kinds)
    return (sum(times * of_layer(kind) for kind, times in kinds.items()) + 3 - config.tie_word_embeddings
            + (of_layer(mtp.KIND) + 4) * config.num_nextn_predict_layers)


@functools.lru_cache(maxsize=8)
def pieces(config: ModelConfig) -> dict[Path, tuple[Piece, ...]]:
    """For each parameter, the checkpoint tensors that fill it."""
    found: dict[Path, list[Piece]] = {}
    for entry in entries(config):
        for part, (path, index) in enumerate(entry.slices):
            found.setdefault(path, []).append(Piece(entry, part, index))
    return {path: tuple(own) for path, own in found.items()}


def ignored_names(config: ModelConfig) -> frozenset[str]:
    """Tensors that some checkpoints repeat though they are shared: the MTP layer's tables, a tied head."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    names = {prefix + "embed_tokens.weight", prefix + "shared_head.head.weight"}
    return frozenset(names | {"lm_head.weight"} if config.tie_word_embeddings else names)


def leaf_at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def to_hf(config: ModelConfig, tree: Any) -> dict[str, np.ndarray]:
    """The released names and layouts of a parameter tree, or of any tree of its form, such as gradients.

    Raises ValueError naming the parameters that are missing, unknown or of another shape than `config` says.
    """
    check_tree(config, tree)
    host = jax.tree.map(np.asarray, tree)
    parts = lambda entry: (leaf_at(host, path)[index] for path, index in entry.slices)
    return {entry.name: np.ascontiguousarray(entry.op.to_hf(*parts(entry))) for entry in entries(config)}


def check_tree(config: ModelConfig, tree: Any) -> None:
    """Raises ValueError naming the parameters that are missing, unknown or of another shape than `config` says."""
    expected = {path_name(path): spec.shape for path, spec in
                jax.tree_util.tree_flatten_with_path(param_specs(config), is_leaf=is_spec)[0]}
    found = {path_name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    faults = [f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
              for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if faults:
        raise ValueError(f"the tree is not of this config: {'; '.join(faults[:4])}{'; ...' if len(faults) > 4 else ''}")
