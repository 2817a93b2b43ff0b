"""The one door between documents and the device: token documents are laid end to end, cut into rows, and batched."""

import functools
from typing import Any, Sequence

import grain
import jax
import numpy as np

from glm5_jax.core.batch import Batch
from glm5_jax.data.sources import Document
from glm5_jax.text.tokenizer import Tokenizer

# A Batch of numpy arrays on the host whose first axis counts all rows there are, instead of one batch of them.
Rows = Batch


def tokenise(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each document, int32 [tokens], ended by `<|endoftext|>`; markers spelled in a text stay text."""
    return [np.array(tokenizer.encode(document.text) + [tokenizer.eos_id], np.int32) for document in documents]


def pack(token_docs: Sequence[np.ndarray], length: int) -> Rows:
    """Rows of `length` tokens: the documents in the given order, laid end to end without a gap, and cut.

    A document may be cut by a row border; the position before the cut still has its target, so every token but the
    first of each document is predicted once, and the weights sum to tokens minus documents. A segment is the part of
    one document inside one row: its ids count from 1 in each row and its positions from 0. The last row is filled
    with padding (segment 0). Arrays are [rows, length], int32, the weights float32. Raises ValueError for an empty
    document, no document at all, or a length below 1.
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1 token per row, found {length}")
    if not token_docs:
        raise ValueError("token_docs: expected at least one document, found none")
    sizes = np.array([len(tokens) for tokens in token_docs])
    if not sizes.all():
        raise ValueError(f"token_docs[{np.argmin(sizes)}]: expected at least one token (its end), found none")
    ends = np.cumsum(sizes)
    count = int(ends[-1])

    index = np.arange(count)
    document = np.repeat(np.arange(len(sizes)), sizes)
    document_start = np.repeat(ends - sizes, sizes)
    row_start = index - index % length
    tokens = np.concatenate(token_docs)
    has_target = np.ones(count, bool)
    has_target[ends - 1] = False

    def rows(values: np.ndarray, dtype: type) -> Any:  # the fields of Batch are annotated for the device
        return np.pad(values.astype(dtype), (0, -count % length)).reshape(-1, length)

    return Rows(
        tokens=rows(tokens, np.int32),
        targets=rows(np.where(has_target, np.roll(tokens, -1), 0), np.int32),
        weights=rows(has_target, np.float32),
        segment_ids=rows(1 + document - document[row_start], np.int32),
        positions=rows(index - np.maximum(document_start, row_start), np.int32),
    )


def batches(rows: Rows, *, batch_size: int, seed: int, shuffle: bool = True) -> grain.IterDataset:
    """Endless batches of `batch_size` rows (a `Batch` of numpy arrays), every row once per epoch.

    Each epoch has its own order, a function of `seed` (0 to 2^32 - 1) and the epoch; a batch may straddle two epochs.
    The iterator's `get_state()` is a dictionary that survives JSON, and `set_state` resumes exactly there.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    indices = grain.MapDataset.range(len(rows.tokens))
    if shuffle:
        indices = indices.shuffle(seed=seed)
    dataset = indices.repeat().batch(batch_size).map(functools.partial(_take, rows))
    # The rows are in memory: reader threads would only contend, and worker processes need absl flags parsed.
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def held_out_batches(rows: Rows, batch_size: int) -> list[Batch]:
    """All rows once, in order; the last batch is filled up with padding (segment 0, weight 0): one shape for all."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    count = len(rows.tokens)
    full = jax.tree.map(lambda x: np.pad(x, ((0, -count % batch_size), (0, 0))), rows)
    return [_take(full, np.arange(start, start + batch_size)) for start in range(0, count, batch_size)]


def _take(rows: Rows, indices: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: x[indices], rows)
