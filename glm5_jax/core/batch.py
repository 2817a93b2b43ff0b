"""The one batch that reaches a device: tokens, what to predict, with which weight, and who may see whom."""

from flax import struct
import jax


@struct.dataclass
class Batch:
    """Packed rows of tokens. B rows, T positions.

    `targets[b, t]` is what position t must predict (the next token of the same segment) and `weights[b, t]` how much
    it counts: 0 where there is nothing to predict. `segment_ids` are 1, 2, ... per packed document and 0 for padding.
    `positions` restart at 0 with every segment. `streams` holds named per-token float32 values, such as log-probs of
    the behaviour policy and advantages, all [B, T].
    """

    tokens: jax.Array        # int32 [B, T]
    targets: jax.Array       # int32 [B, T]
    weights: jax.Array       # float32 [B, T]
    segment_ids: jax.Array   # int32 [B, T]
    positions: jax.Array     # int32 [B, T]
    streams: dict[str, jax.Array] = struct.field(default_factory=dict)
