"""Documents become packed rows while they are read, window by window, at a place that JSON can keep.

A window is as many documents as fill so many rows; it is packed as a whole. The place is (first document of the
window, rows given of it), whoever reads: threads and worker processes only read ahead, so a run may resume with
another number of either.
"""

from collections.abc import Sequence
import functools
from typing import Any, Literal

from absl import flags
import grain
import jax
import numpy as np

from glm5_jax.core.batch import Batch
from glm5_jax.data import packing
from glm5_jax.data.sources import Document
from glm5_jax.text.tokenizer import Tokenizer

Method = Literal["random_truncation", "best_fit"]


def token_documents(documents: Sequence[Document], tokenizer: Tokenizer, *,
                    seed: int | None = None) -> grain.MapDataset:
    """Endless token documents, int32 [tokens] each, by random access; with a `seed` each epoch has its own order.

    Raises ValueError where there is no document.
    """
    if not len(documents):
        raise ValueError("documents: expected at least one, found none")
    order = grain.MapDataset.source(documents)
    if seed is not None:
        order = order.shuffle(seed=seed)
    return order.repeat().map(functools.partial(_tokenise, tokenizer))


class PackedRows(grain.IterDataset[Batch]):
    """Rows of `length` tokens out of token documents: each a `Batch` of numpy arrays, [length].

    "random_truncation" lays the documents of a window end to end and cuts at a random offset (`packing.pack`), as in
    pre-training; "best_fit" keeps documents whole where it can (`packing.pack_best_fit`), as in mid-training. Each
    window is at least `window_rows` rows of tokens, held in memory (20 bytes a token); its last row is padded, so the
    larger the fuller. The rows of a window come in a random order. Offsets and order depend on `seed` and the window.

    `read_options` sets the reading threads. `workers` processes, where above 0, read in place of threads; each takes
    seconds to start, and a script that uses them needs `if __name__ == "__main__":`. The rows are the same for all.
    Raises ValueError for a number out of range or an unknown `method`.
    """

    def __init__(self, documents: grain.MapDataset, length: int, *, method: Method = "random_truncation",
                 seed: int = 0, window_rows: int = 128, read_options: grain.ReadOptions | None = None,
                 workers: int = 0):
        super().__init__()
        for field, value, least in (("length", length, 1), ("window_rows", window_rows, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{field}: expected at least {least}, found {value}")
        if method not in ("random_truncation", "best_fit"):
            raise ValueError(f"method: expected 'random_truncation' or 'best_fit', found {method!r}")
        self.documents, self.length, self.method, self.seed = documents, length, method, seed
        self.window_rows, self.workers = window_rows, workers
        self.read_options = read_options or grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)

    def __iter__(self) -> "PackedRowsIterator":
        return PackedRowsIterator(self)

    def read(self, start: int) -> grain.DatasetIterator:
        """The documents from number `start` on, in order; None for one that a `filter` of Grain took out."""
        read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0) if self.workers else self.read_options
        documents = self.documents.slice(slice(start, None)).to_iter_dataset(read_options, allow_nones=True)
        if not self.workers:
            return iter(documents)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags for its workers, which a notebook never parses
        return iter(documents.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers)))

    def pack(self, token_docs: Sequence[np.ndarray], start: int) -> packing.Rows:
        """The rows of the window that begins with document `start`."""
        rng = np.random.default_rng([self.seed, start])
        if self.method == "best_fit":
            rows = packing.pack_best_fit(token_docs, self.length)
        else:
            offset = int(rng.integers(sum(map(len, token_docs))))
            rows = packing.pack(token_docs, self.length, offset=offset)
        order = rng.permutation(len(rows.tokens))
        return jax.tree.map(lambda x: x[order], rows)


class PackedRowsIterator(grain.DatasetIterator[Batch]):
    """Where a `PackedRows` stands; `get_state` is {"document": first of the window, "row": rows given of it}."""

    def __init__(self, dataset: PackedRows):
        super().__init__()
        self._dataset = dataset
        self._documents: grain.DatasetIterator | None = None
        self.set_state({"document": 0, "row": 0})

    def __next__(self) -> Batch:
        if self._row == self._row_count:
            self._take_window()
        row = self._row
        self._row += 1
        return jax.tree.map(lambda x: x[row], self._rows)

    def get_state(self) -> dict[str, Any]:
        return {"document": self._start, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop_reading()
        self._start = self._next = state["document"]
        self._rows: packing.Rows | None = None
        self._row = self._row_count = 0
        if state["row"]:
            self._take_window()
            self._row = state["row"]
            if self._row > self._row_count:
                raise ValueError(f"state: expected a row of the {self._row_count} that begin with document "
                                 f"{self._start}, found {self._row}; resume with the documents and packing it is of")

    def close(self) -> None:
        self._stop_reading()
        super().close()

    def _take_window(self) -> None:
        if self._documents is None:
            self._documents = self._dataset.read(self._next)
        wanted = self._dataset.window_rows * self._dataset.length
        window: list[np.ndarray] = []
        taken = 0
        for document in self._documents:
            taken += 1
            if document is not None:
                window.append(document)
                wanted -= len(document)
            if wanted <= 0:
                break
        if not window:
            raise StopIteration
        self._start, self._next = self._next, self._next + taken
        self._rows = self._dataset.pack(window, self._start)
        self._row, self._row_count = 0, len(self._rows.tokens)

    def _stop_reading(self) -> None:
        if self._documents is not None:
            self._documents.close()
        self._documents = None


def _tokenise(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    return packing.tokenise([document], tokenizer)[0]
