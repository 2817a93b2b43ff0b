"""Which steps are not taken: a loss, a gradient or what an indexer scores is not finite, or a gradient is out of line.

A skipped step leaves parameters and optimiser as they were; its batch is gone, so that a resumed run does alike.
"""

from flax import struct
import jax
import jax.numpy as jnp

WINDOW = 64  # accepted norms whose median is the measure
LEAST = 8    # of them before the measure counts: the first steps of a run differ widely


@struct.dataclass
class Guard:
    """What a run remembers of its gradients."""

    norms_W: jax.Array   # float32, of the last accepted steps; NaN where there was none yet
    accepted: jax.Array  # int32
    in_row: jax.Array    # int32, steps skipped since the last accepted one


def fresh() -> Guard:
    """Nothing is known yet: at the start of a run, and of a stage that changes what is optimised."""
    return Guard(jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(guard: Guard, loss: jax.Array, norm: jax.Array, index_nan: jax.Array, ratio: float) -> dict[str, jax.Array]:
    """Why this step must be skipped, bool [] each; it is taken if none is true.

    `not_finite`: loss or gradient norm; `index_nan`: the model's count of that name is not 0, so that an indexer scored
    what is not finite; `norm`: more than `ratio` times the running median of gradient norms.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    large = (guard.accepted >= LEAST) & (norm > ratio * jnp.nanmedian(guard.norms_W))
    return {"not_finite": ~finite, "index_nan": finite & (index_nan > 0), "norm": finite & (index_nan == 0) & large}


def after(guard: Guard, norm: jax.Array, taken: jax.Array) -> Guard:
    """The guard after a step that was taken or skipped."""
    return Guard(jnp.where(taken, guard.norms_W.at[guard.accepted % WINDOW].set(norm), guard.norms_W),
                 guard.accepted + taken, jnp.where(taken, 0, guard.in_row + 1))
