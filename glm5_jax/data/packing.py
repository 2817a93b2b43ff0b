"""The one door between documents and the device: token documents are laid end to end, cut into rows, and batched."""

import bisect
import functools
from typing import Any, Mapping, Sequence

import grain
import jax
import numpy as np

from glm5_jax.core.batch import Batch
from glm5_jax.data.sources import Document
from glm5_jax.text.tokenizer import Tokenizer

# A Batch of numpy arrays on the host whose first axis counts all rows there are, instead of one batch of them.
Rows = Batch
# The rows are in memory: reader threads would only contend, and worker processes need absl flags parsed.
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def tokenise(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each document, int32 [tokens], ended by `<|endoftext|>`; markers spelled in a text stay text."""
    return [np.array(tokenizer.encode(document.text) + [tokenizer.eos_id], np.int32) for document in documents]


def pack(token_docs: Sequence[np.ndarray], length: int, *, loss_weights: Sequence[np.ndarray] | None = None,
         offset: int = 0) -> Rows:
    """Rows of `length` tokens: the documents in the given order, laid end to end without a gap, and cut.

    A document may be cut by a row border; the position before the cut still has its target, so every token but the
    first of each document is predicted once, and the weights sum to tokens minus documents. A segment is the part of
    one document inside one row: its ids count from 1 in each row and its positions from 0. The last row is filled
    with padding (segment 0). Arrays are [rows, length], int32, the weights float32.

    `loss_weights` holds for each document an array like its tokens: how much predicting that token counts, instead of
    1 (the first token of a document is never predicted). The cuts fall `offset` tokens later in the documents: the
    first `offset` tokens of all come last. Random offsets are the random truncation of GLM-4.5.

    Raises ValueError for an empty document, no document at all, loss weights that do not fit their document, a length
    below 1, or a negative offset.
    """
    sizes = _sizes(token_docs, length)
    if offset < 0:
        raise ValueError(f"offset: expected at least 0, found {offset}")
    count = int(sizes.sum())
    borders = (offset + np.arange(0, count, length)) % count
    starts = np.unique(np.concatenate([np.cumsum(sizes) - sizes, borders, [0]]))
    pieces = np.diff(starts, append=count)
    cells = (starts - offset) % count
    return _lay_out(token_docs, sizes, loss_weights, starts, pieces, cells, length, {})


def pack_best_fit(token_docs: Sequence[np.ndarray], length: int, *, loss_weights: Sequence[np.ndarray] | None = None,
                  streams: Mapping[str, Sequence[np.ndarray]] | None = None) -> Rows:
    """Rows of `length` tokens with every document in one piece where it fits: best-fit decreasing.

    A document longer than a row is cut into full rows and a rest, and no token is lost. From the longest to the
    shortest, a piece goes to the row with the least room that still holds it; what stays free is padding. Fields,
    `loss_weights` and errors as in `pack`. `streams` hold more values of each token, in the form of `loss_weights`;
    they come to stand where the token is predicted, as `Batch.streams`.
    """
    sizes = _sizes(token_docs, length)
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    part = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(np.cumsum(sizes) - sizes, counts) + part * length
    pieces = np.minimum(sizes[document] - part * length, length)
    cells = np.empty_like(starts)
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    row_count = 0
    for piece in np.argsort(-pieces, kind="stable"):
        size = int(pieces[piece])
        best = bisect.bisect_left(open_rows, (size, 0))
        if best < len(open_rows):
            room, row = open_rows.pop(best)
        else:
            room, row = length, row_count
            row_count += 1
        cells[piece] = row * length + length - room
        if room > size:
            bisect.insort(open_rows, (room - size, row))
    return _lay_out(token_docs, sizes, loss_weights, starts, pieces, cells, length, streams or {})


def fill(rows: Rows) -> float:
    """The share of slots that hold a token, not padding."""
    return float(np.mean(rows.segment_ids > 0))


def _sizes(token_docs: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Tokens per document, after the checks that all ways of packing share."""
    if length < 1:
        raise ValueError(f"length: expected at least 1 token per row, found {length}")
    if not token_docs:
        raise ValueError("token_docs: expected at least one document, found none")
    sizes = np.array([len(tokens) for tokens in token_docs])
    if not sizes.all():
        raise ValueError(f"token_docs[{np.argmin(sizes)}]: expected at least one token (its end), found none")
    return sizes


def _of_tokens(name: str, values: Sequence[np.ndarray] | None, sizes: np.ndarray) -> np.ndarray:
    """One value per token of all documents, laid end to end, float32; 1 where there are none."""
    if values is None:
        return np.ones(sizes.sum(), np.float32)
    if len(values) != len(sizes):
        raise ValueError(f"{name}: expected one array per document, {len(sizes)}, found {len(values)}")
    for number, (found, size) in enumerate(zip(values, sizes)):
        if np.shape(found) != (size,):
            raise ValueError(f"{name}[{number}]: expected one value per token, shape ({size},), "
                             f"found {np.shape(found)}")
    return np.concatenate(values).astype(np.float32)


def _lay_out(token_docs: Sequence[np.ndarray], sizes: np.ndarray, loss_weights: Sequence[np.ndarray] | None,
             starts: np.ndarray, pieces: np.ndarray, cells: np.ndarray, length: int,
             streams: Mapping[str, Sequence[np.ndarray]]) -> Rows:
    """Rows in which piece i, `pieces[i]` tokens from `starts[i]` of the documents laid end to end, begins at cell
    `cells[i]` of the rows laid end to end. Every token is in one piece, and no piece crosses the end of a row."""
    weights = _of_tokens("loss_weights", loss_weights, sizes)
    others = {name: _of_tokens(f"streams[{name!r}]", values, sizes) for name, values in streams.items()}
    order = np.argsort(cells)
    starts, pieces, cells = starts[order], pieces[order], cells[order]
    row = cells // length
    segment = 1 + np.arange(len(row)) - np.searchsorted(row, row)
    position = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    source = np.repeat(starts, pieces) + position
    target_cell = np.repeat(cells, pieces) + position

    has_target = np.ones(len(weights), bool)
    has_target[np.cumsum(sizes) - 1] = False
    tokens = np.concatenate(token_docs)

    def rows(values: np.ndarray, dtype: type) -> Any:  # the fields of Batch are annotated for the device
        laid = np.zeros((row[-1] + 1) * length, dtype)
        laid[target_cell] = values
        return laid.reshape(-1, length)

    def predicted(values: np.ndarray, dtype: type) -> Any:
        """What belongs to a token, at the position that predicts it."""
        return rows(np.where(has_target, np.roll(values, -1), 0)[source], dtype)

    return Rows(
        tokens=rows(tokens[source], np.int32),
        targets=predicted(tokens, np.int32),
        weights=predicted(weights, np.float32),
        segment_ids=rows(np.repeat(segment, pieces), np.int32),
        positions=rows(position, np.int32),
        streams={name: predicted(values, np.float32) for name, values in others.items()},
    )


def batches(rows: Rows, *, batch_size: int, seed: int, shuffle: bool = True, process_index: int = 0,
            process_count: int = 1) -> grain.IterDataset:
    """Endless batches of `batch_size` rows over all processes (a `Batch` of numpy arrays), every row once per epoch.

    Each epoch has its own order, a function of `seed` (0 to 2^32 - 1) and the epoch; a batch may straddle two epochs.
    The iterator's `get_state()` is a dictionary that survives JSON, and `set_state` resumes exactly there. Process
    `process_index` of `process_count` gets its part of each batch; the state is that of all, and fits any number.
    """
    mine = process_rows(batch_size, process_index, process_count)
    dataset = _order(rows, seed, shuffle).batch(batch_size).map(functools.partial(_take_part, rows, mine))
    return dataset.to_iter_dataset(_NO_THREADS)


def single_rows(rows: Rows, *, seed: int, shuffle: bool = True) -> grain.IterDataset:
    """The same rows one by one, each a `Batch` of [length] arrays: packed rows as a source of `mixture.batches`."""
    return _order(rows, seed, shuffle).map(functools.partial(_take, rows)).to_iter_dataset(_NO_THREADS)


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that a process holds: equal runs, in the order of the processes.

    Raises ValueError for a batch size that the processes do not divide, or an index out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: expected 0 to {process_count - 1}, found {process_index}")
    if batch_size % process_count:
        raise ValueError(f"batch_size: expected a multiple of {process_count} processes, found {batch_size}")
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def held_out_batches(rows: Rows, batch_size: int) -> list[Batch]:
    """All rows once, in order; the last batch is filled up with padding (segment 0, weight 0): one shape for all."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    count = len(rows.tokens)
    full = jax.tree.map(lambda x: np.pad(x, ((0, -count % batch_size), (0, 0))), rows)
    return [_take(full, np.arange(start, start + batch_size)) for start in range(0, count, batch_size)]


def _order(rows: Rows, seed: int, shuffle: bool) -> grain.MapDataset:
    indices = grain.MapDataset.range(len(rows.tokens))
    return (indices.shuffle(seed=seed) if shuffle else indices).repeat()


def _take(rows: Rows, indices: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: x[indices], rows)


def _take_part(rows: Rows, part: slice, indices: np.ndarray) -> Batch:
    return _take(rows, indices[part])
