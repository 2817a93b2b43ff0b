"""Gather of rows by the SparseCores of a TPU, from where they lie and into the order of a list of indices.

A TPU keeps bfloat16 rows in pairs: a 32-bit word holds one column of the rows 2i and 2i + 1. A SparseCore fetches words
by a list of indices, so it fetches the pair of each row, keeps the half that was asked for, and writes new pairs, of
rows that follow each other in the list: two rows are read for each that is written. Nothing else moves, and the
TensorCore, which would need 31 bundles to start the copy of one row, is not involved.

S rows, N indices, R width.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
import jax.numpy as jnp

LANES = 128  # columns of a tile of the memory
ROWS = 32  # of one step of a subcore
WIDEST = 640  # two buffers of the pairs of 32 such rows, and two of the result, fill the memory of a subcore


class SparseCores(NamedTuple):
    """Of one chip: its SparseCores, the vector subcores of each, and 32-bit lanes of a vector."""

    cores: int
    subcores: int
    lanes: int


def of_target() -> SparseCores | str:
    """The SparseCores of the chip that is traced for, or why there are none to use.

    The chip is that of the mesh set by `jax.set_mesh`, else the default device.
    """
    if jax.__version_info__ < (0, 10):  # has tpu_sc, but with other arguments and without this question
        return f"SparseCores need jax 0.10, found {jax.__version__}"
    try:
        info = plsc.get_sparse_core_info()
    except (RuntimeError, ValueError) as error:  # a TPU without, or no TPU
        return f"no SparseCores: {error}; a chip that is not here is told by jax.set_mesh"
    return SparseCores(info.num_cores, info.num_subcores, info.num_lanes)


def _fetch(words_ref: Any, pairs: jax.Array, place_ref: Any, semaphore: Any) -> list:
    return [pltpu.make_async_copy(words_ref.at[pairs], place_ref, semaphore)]


class Memory(NamedTuple):
    """What a worker is handed: rows as words of two, indices and result in HBM; then its own buffers and semaphores."""

    words: Any
    indices: Any
    out: Any
    index: Any
    pairs: Any
    packed: Any
    listed: Any
    fetched: Any
    stored: Any


def buffers(R: int) -> list:
    """What `Memory` has beside its arrays, for rows of width R."""
    one, two = pltpu.SemaphoreType.DMA(()), pltpu.SemaphoreType.DMA((2,))
    return [pltpu.VMEM((4, ROWS), jnp.int32), pltpu.VMEM((2, ROWS, R), jnp.int32),
            pltpu.VMEM((2, ROWS // 2, R), jnp.int32), one, two, two]


def gather_kernel(ref: Memory, *, steps: int, lanes: int, worker: jax.Array, loop: Callable[..., Any],
                  fetch: Callable[..., list] = _fetch) -> None:
    """Steps of one worker: while one is packed, the rows of the next are on their way, and the indices of the third."""
    def index_of(step: jax.Array, first: int) -> jax.Array:
        return ref.index[step % 4, pl.ds(first, lanes)]

    def indices(step: jax.Array) -> Any:
        place = pl.ds((worker * steps + jnp.minimum(step, steps - 1)) * ROWS, ROWS)
        return pltpu.make_async_copy(ref.indices.at[place], ref.index.at[step % 4], ref.listed)

    def rows(step: jax.Array) -> list:
        slot = step % 2
        return [copy for first in range(0, ROWS, lanes) for copy in fetch(
            ref.words, jnp.maximum(index_of(step, first), 0) >> 1, ref.pairs.at[slot, pl.ds(first, lanes)],
            ref.fetched.at[slot])]

    def store(step: jax.Array) -> Any:
        place = pl.ds((worker * steps + step) * (ROWS // 2), ROWS // 2)
        return pltpu.make_async_copy(ref.packed.at[step % 2], ref.out.at[place], ref.stored.at[step % 2])

    def begin(step: jax.Array) -> None:
        indices(step).wait()
        for copy in rows(step):
            copy.start()
        indices(step + 1).start()

    def pack(step: jax.Array) -> None:
        slot = step % 2

        @pl.loop(0, ROWS, step=lanes)
        def _(first):
            index = index_of(step, first)
            of_row = lambda row: jnp.broadcast_to(index[row], (lanes,))
            halves = [_halves(of_row(row), of_row(row + 1)) for row in range(0, lanes, 2)]

            @loop(0, ref.words.shape[1], step=lanes)
            def _(column):
                at = pl.ds(column, lanes)
                for i, (right, low, left, high) in enumerate(halves):
                    even, odd = (ref.pairs[slot, first + 2 * i + which, at] for which in (0, 1))
                    ref.packed[slot, (first >> 1) + i, at] = (
                        lax.shift_right_logical(even, right) & low | lax.shift_left(odd, left) & high)

    indices(jnp.int32(0)).start()
    begin(jnp.int32(0))

    @pl.loop(0, steps)
    def _(step):
        @pl.when(step + 1 < steps)
        def _():
            begin(step + 1)

        for copy in rows(step):
            copy.wait()

        @pl.when(step >= 2)
        def _():
            store(step - 2).wait()

        pack(step)
        store(step).start()

    indices(jnp.int32(steps)).wait()
    for step in range(max(0, steps - 2), steps):
        store(jnp.int32(step)).wait()


def _halves(even: jax.Array, odd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """By how much to shift the words of two rows, and what to keep of them: nothing of a row that is -1."""
    return (16 * (even & 1), jnp.where(even < 0, 0, 0xffff), 16 * (1 - (odd & 1)), jnp.where(odd < 0, 0, -1 << 16))


def gather(kv_SR: jax.Array, indices_N: jax.Array, chip: SparseCores, *, interpret: Any = False) -> jax.Array:
    """Rows of bfloat16 [S, R] in the order of their indices, zeros for -1, as words of two rows: int32 [>= N/2, R].

    S is even, R a multiple of 128, at most 640. What follows the N rows is zeros. `interpret=True` runs the subcores
    one after the other, on any platform.
    """
    workers, (_, R) = chip.cores * chip.subcores, kv_SR.shape
    indices_N = jnp.pad(indices_N, (0, -len(indices_N) % (workers * ROWS)), constant_values=-1)
    kernel = functools.partial(gather_kernel, steps=len(indices_N) // (workers * ROWS), lanes=chip.lanes)
    memory = lambda kv_ref, *others: Memory(kv_ref.bitcast(jnp.int32), *others)
    out = jax.ShapeDtypeStruct((len(indices_N) // 2, R), jnp.int32)
    if interpret:  # as a kernel of the TensorCore, for there is no interpreter of a SparseCore
        in_place = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            lambda *refs: kernel(memory(*refs), worker=pl.program_id(0), loop=pl.loop), grid=(workers,), out_shape=out,
            in_specs=[in_place, in_place], out_specs=in_place, scratch_shapes=buffers(R), interpret=interpret,
        )(kv_SR, indices_N)
    mesh = plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore", num_cores=chip.cores,
                                  num_subcores=chip.subcores)

    @pl.kernel(out_type=out, mesh=mesh, scratch_types=buffers(R), name="gather_rows")
    def run(*refs: Any) -> None:
        worker = lax.axis_index("core") * chip.subcores + lax.axis_index("subcore")
        kernel(memory(*refs), worker=worker, loop=plsc.parallel_loop)

    return run(kv_SR, indices_N)
