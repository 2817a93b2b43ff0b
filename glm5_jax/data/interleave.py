"""Similar documents packed into one another, so that a long sequence is full of near misses. GLM-5 report, section 2.3.

Documents that share rare runs of letters are put into one group; of a group, each document in turn gives its next
chunk. What continues a chunk then stands far behind it, among text that looks the same. The sequences are packed with
`packing.pack_best_fit(tokens, length, loss_weights=weights)`.

N documents.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from glm5_jax.data.packing import tokenise
from glm5_jax.data.similarity import shingles
from glm5_jax.data.sources import Document
from glm5_jax.text.tokenizer import Tokenizer

# Characters in a run, and bits of its hash: of 4 to 16 and 12 to 16 the best at telling which halves are of one text.
SHINGLE, BITS = 6, 16


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """One sequence of several documents; each of them is whole, and in its own order: `tokens[documents == d]`."""

    tokens: np.ndarray     # int32 [tokens]
    weights: np.ndarray    # float32 [tokens], of predicting each token: 0 where another document's chunk begins
    documents: np.ndarray  # int32 [tokens], which document each token is of


def interleave(documents: Sequence[Document], tokenizer: Tokenizer, length: int, *, chunk: int, at_least: float = 0.15
               ) -> list[Interleaved]:
    """Sequences of at most `length` tokens of similar documents, in chunks of `chunk` tokens of one after the other.

    Every document, with its end, is in one sequence. One that is longer than `length`, or not similar by `at_least` to
    another, is a sequence of its own and stays in one piece. Raises ValueError for a length or a chunk below 1, or no
    document at all.
    """
    for name, value in (("length", length), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1 token, found {value}")
    if not documents:
        raise ValueError("documents: expected at least one, found none")
    token_docs = tokenise(documents, tokenizer)
    similarities = cosines([document.text for document in documents])
    grouped = groups(similarities, [len(tokens) for tokens in token_docs], length, at_least=at_least)
    return [_woven(token_docs, members, chunk) for members in grouped]


def cosines(texts: Sequence[str]) -> np.ndarray:
    """The cosine between the TF-IDF vectors of texts, float32 [N, N], 0 to 1; an empty text is like none.

    A term is the hash of a run of characters: log(1 + count) (1 + log((1 + N) / (1 + texts that have it))). Memory is
    N 2^BITS floats.
    """
    shift = np.uint64(64 - BITS)
    vectors = np.empty((len(texts), 2**BITS), np.float32)
    for vector, text in zip(vectors, texts):
        vector[:] = np.log1p(np.bincount((shingles(text, SHINGLE) >> shift).astype(np.int64), minlength=2**BITS))
    vectors *= 1 + np.log((1 + len(texts)) / (1 + np.count_nonzero(vectors, axis=0))).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    # Rounded, so that the last bits of a product do not decide between two equals on another machine.
    return np.round(vectors @ vectors.T, 5).clip(0, 1)


def groups(similarities: np.ndarray, sizes: Sequence[int], length: int, *, at_least: float) -> list[list[int]]:
    """Documents by index, each in one group of at most `length` tokens, unless it alone is longer.

    A group begins with the first document left over; to it comes, as long as one fits, the document that is most
    similar to its members on average, the first of equals, if by `at_least`.
    """
    room_for = np.asarray(sizes)
    left = np.ones(len(room_for), bool)
    found = []
    for first in range(len(room_for)):
        if not left[first]:
            continue
        group = [first]
        left[first] = False
        room, total = length - room_for[first], similarities[first].astype(np.float64)
        while True:
            mean = np.where(left & (room_for <= room), total / len(group), -1)
            best = int(np.argmax(mean))
            if mean[best] < at_least or mean[best] < 0:
                break
            group.append(best)
            left[best] = False
            room, total = room - room_for[best], total + similarities[best]
        found.append(group)
    return found


def _woven(token_docs: Sequence[np.ndarray], members: Sequence[int], chunk: int) -> Interleaved:
    turns = -(-max(len(token_docs[member]) for member in members) // chunk)
    spans = [(member, turn * chunk) for turn in range(turns) for member in members]
    pieces = [(member, token_docs[member][start:start + chunk]) for member, start in spans]
    documents = np.concatenate([np.full(len(piece), member, np.int32) for member, piece in pieces])
    weights = np.ones(len(documents), np.float32)
    weights[1:] = documents[1:] == documents[:-1]
    return Interleaved(np.concatenate([piece for _, piece in pieces]), weights, documents)
