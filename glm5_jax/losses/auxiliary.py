"""The losses beside the language model's: how the balance of experts and the divergence of indexers are reduced.

The model hands out sums and counts; here sums are divided by the counts of the whole batch, so that micro-batches weigh
by what they hold, and layers are weighed against each other.

L layers (and steps of multi-token prediction), B batch, T positions, U steps.
"""

from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def counts(segment_ids_BT: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Tokens, and rows with at least one, that trunk and each prediction step see, float32 [1 + steps] both.

    Step k sees a token whose successor k places on is of the same segment; 0 is padding.
    """
    def seen(k: int) -> jax.Array:
        ahead = jnp.pad(segment_ids_BT, ((0, 0), (0, k)))[:, k:]
        return (ahead == segment_ids_BT) & (segment_ids_BT != 0)

    seen_UBT = jnp.stack([seen(k) for k in range(steps + 1)])
    return seen_UBT.sum((1, 2), dtype=jnp.float32), seen_UBT.any(2).sum(1, dtype=jnp.float32)


def index_groups(owners: Sequence[bool], steps: int = 0) -> np.ndarray:
    """Which indexer selects for each layer, int [L]: a layer without its own takes the last one's before it.

    `steps` of multi-token prediction follow the layers, served by one indexer more.
    """
    groups = np.cumsum(owners) - 1
    return np.concatenate([groups, np.full(steps, groups[-1] + 1)])


def indexer_loss(divergence_L: jax.Array, count_L: jax.Array, groups_L: np.ndarray) -> jax.Array:
    """The mean over indexers of the mean KL of the layers each serves, float32 [].

    `divergence_L` is KL(attention || index) summed over tokens, `count_L` the number of those tokens in the whole
    batch. The mean over a group has the gradient of the KL from the average of its attentions, since their entropies
    are constant: IndexCache, arXiv 2603.12201. DeepSeek-V3.2 report, section 2.1.
    """
    members = np.bincount(groups_L)
    share_L = 1 / (members[groups_L] * len(members))
    return jnp.sum(share_L * divergence_L / jnp.maximum(count_L, 1))


def balance_loss(balance_L: jax.Array, rows_L: jax.Array) -> jax.Array:
    """The mean over layers of the sequence-level balance loss, float32 []; 0 where there is no layer.

    `balance_L` is summed over sequences, `rows_L` the number of those in the whole batch. DeepSeek-V3 report,
    equations 17 to 20.
    """
    return jnp.sum(balance_L / jnp.maximum(rows_L, 1)) / max(len(balance_L), 1)
