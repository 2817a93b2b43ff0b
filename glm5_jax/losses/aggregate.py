"""Sums over sequences, and from a term per token to one loss, such that the parts of a batch add up to the whole.

A sequence is a row or, where rows are packed, the tokens of one row that share a segment id; id 0 is padding. It may
not be split over parts. A mask says which tokens count, as booleans or as non-negative weights.

B batch, T positions, S sequences of a row, N items.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.core import masked

Aggregation = Literal["sequence_mean_of_token_means", "sequence_mean", "token_mean"]


def count(mask: jax.Array, segment_ids: jax.Array | None = None, *, aggregation: Aggregation) -> jax.Array:
    """What a loss is divided by, float32 []: summed over all parts of a batch it is the `denominator` of each part.

    For "token_mean" the sum of the mask [B, T], for the others the number of sequences in which a token counts. Raises
    ValueError naming the argument.
    """
    check_aggregation(aggregation)
    return _count(*read_mask(mask, segment_ids), aggregation)


def sequence_count(mask_BT: jax.Array, sequence_BT: jax.Array | None) -> jax.Array:
    """In how many sequences a token counts, a scalar of the mask's dtype."""
    return jnp.sum(_sums((mask_BT != 0).astype(jnp.int32), sequence_BT) > 0, dtype=mask_BT.dtype)


def aggregate(term_BT: jax.Array, mask_BT: jax.Array, sequence_BT: jax.Array | None, *, aggregation: Aggregation,
              denominator: jax.Array | float | None, one_per_sequence: bool = False) -> jax.Array:
    """The sum of the terms that count over `denominator`, by default the `count` of what is given; a scalar.

    "token_mean" adds up all terms, "sequence_mean" those of a sequence, and "sequence_mean_of_token_means" takes their
    mean there. Where a sequence has but one term, which all its tokens hold, "sequence_mean" takes it once. 0 where
    nothing counts. Raises ValueError for a denominator that is no scalar, or a number that is not positive.
    """
    share_BT = mask_BT
    if aggregation == "sequence_mean_of_token_means" or (aggregation == "sequence_mean" and one_per_sequence):
        share_BT = mask_BT / sequence_length(mask_BT, sequence_BT)
    if denominator is None:
        denominator = _count(mask_BT, sequence_BT, aggregation)
    elif jnp.ndim(denominator) or isinstance(denominator, (int, float)) and not denominator > 0:
        raise ValueError(f"denominator: expected a scalar, the positive count of the whole batch (see `count`), "
                         f"found {denominator}")
    return masked.masked_sum(term_BT, share_BT) / jnp.where(denominator > 0, denominator, 1)


def sequence_sum(x_BT: jax.Array, sequence_BT: jax.Array | None) -> jax.Array:
    """The sum over the sequence of each token, [B, T]."""
    sums_BS = _sums(x_BT, sequence_BT)
    if sequence_BT is None:
        return jnp.broadcast_to(sums_BS, x_BT.shape)
    return jnp.take_along_axis(sums_BS, sequence_BT, axis=1)


def sequence_length(mask_BT: jax.Array, sequence_BT: jax.Array | None) -> jax.Array:
    """How many tokens count in the sequence of each token, [B, T]; 1 where none does."""
    length_BT = sequence_sum(mask_BT, sequence_BT)
    return jnp.where(length_BT > 0, length_BT, 1)


def read_mask(mask: Any, segment_ids: Any = None, shape: tuple[int, ...] | None = None, dtype: Any = jnp.float32
              ) -> tuple[jax.Array, jax.Array | None]:
    """The mask as weights of `dtype`, 0 on padding, and the number of each token's sequence in its row; [B, T] both.

    The numbers are None without segment ids. Raises ValueError for a shape other than `shape` (None: any [B, T]), and
    for segment ids as `read_ids` does.
    """
    mask = jnp.asarray(mask)
    if mask.ndim != 2 or shape not in (None, mask.shape):
        raise ValueError(f"mask: expected shape {shape or '[B, T]'}, found {mask.shape}")
    mask_BT = mask.astype(jnp.promote_types(dtype, jnp.float32))
    if segment_ids is None:
        return mask_BT, None
    segment_ids = read_ids("segment_ids", segment_ids, mask.shape)
    return jnp.where(segment_ids != 0, mask_BT, 0), renumber(segment_ids)


def read_ids(name: str, ids: Any, shape: tuple[int, ...]) -> jax.Array:
    """Integers of `shape` that are equal where `ids` are, and 0 where these are 0.

    Raises ValueError for another shape or dtype.
    """
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers of shape {shape}, found {ids.dtype} of shape {ids.shape}")
    if isinstance(ids, np.ndarray):  # their ranks, because jax would cut integers of 64 bits, such as hashes, to 32
        ids = np.where(ids == 0, 0, 1 + np.unique(ids, return_inverse=True)[1].reshape(shape))
    return jnp.asarray(ids)


def renumber(ids: jax.Array) -> jax.Array:
    """Numbers from 0 to N - 1 for integers [..., N], equal ones where those of one row are equal; int32."""
    order = jnp.argsort(ids, axis=-1)
    ordered = jnp.take_along_axis(ids, order, axis=-1)
    rises = jnp.cumsum(ordered[..., 1:] != ordered[..., :-1], axis=-1, dtype=jnp.int32)
    numbers = jnp.concatenate([jnp.zeros_like(rises, shape=(*ids.shape[:-1], 1)), rises], axis=-1)
    return jnp.take_along_axis(numbers, jnp.argsort(order, axis=-1), axis=-1)


def check_aggregation(aggregation: str) -> None:
    """Raises ValueError for an aggregation that does not exist."""
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation: expected one of {get_args(Aggregation)}, found {aggregation!r}")


def _count(mask_BT: jax.Array, sequence_BT: jax.Array | None, aggregation: Aggregation) -> jax.Array:
    return jnp.sum(mask_BT) if aggregation == "token_mean" else sequence_count(mask_BT, sequence_BT)


def _sums(x_BT: jax.Array, sequence_BT: jax.Array | None) -> jax.Array:
    """Sums over sequences, [B, S]: S is 1 where a row is a sequence, else T."""
    if sequence_BT is None:
        return jnp.sum(x_BT, axis=1, keepdims=True)
    return jax.vmap(lambda x_T, sequence_T: jax.ops.segment_sum(x_T, sequence_T, len(x_T)))(x_BT, sequence_BT)
