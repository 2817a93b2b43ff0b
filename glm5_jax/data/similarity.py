"""How alike two texts are: hashed character shingles, their MinHash signature, and texts nearly equal to earlier ones.

Characters, not words, so that it works in any language. All constants are fixed: equal texts give equal numbers on
every machine.
"""

from collections.abc import Iterable

import numpy as np

SHINGLE = 16  # characters
HASHES, BANDS = 128, 32  # four hashes a band: of pairs that share 0.8 of their shingles, all but 1 in 10^7 meet

_BASE = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str, size: int = SHINGLE) -> np.ndarray:
    """A hash of every run of `size` characters, uint64 [characters - size + 1]; of the whole of a shorter text.

    Case and the kind of white space do not count. An empty text has none.
    """
    normal = " ".join(text.casefold().split())
    codes = np.frombuffer(normal.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    size = min(size, len(codes))
    if not size:
        return codes
    hashes = np.zeros(len(codes) - size + 1, np.uint64)
    for start in range(size):
        hashes = hashes * _BASE + codes[start:start + len(hashes)]
    return _mixed(hashes)


def signature(text: str) -> np.ndarray:
    """MinHash of the text's shingles, uint64 [HASHES]: two agree in each place with the probability `jaccard` of them.

    Broder (1997). An empty text has the largest values, which no other has.
    """
    hashes = np.unique(shingles(text))
    if not len(hashes):
        return np.full(HASHES, np.iinfo(np.uint64).max)
    seeds = _mixed(np.arange(1, HASHES + 1, dtype=np.uint64) * _BASE) | np.uint64(1)
    return np.array([(hashes * seed).min() for seed in seeds])


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Estimate, from two signatures, of the shingles in both texts over those in either; its error is about 0.04."""
    return float(np.mean(one == other))


def near_duplicates(texts: Iterable[str], threshold: float = 0.8) -> list[int | None]:
    """For each text the number of an earlier one with `jaccard` of at least `threshold`, or None.

    Texts are compared with those that got None, so of a group of near duplicates the first one stays. Only texts that
    agree in a whole band are compared. Raises ValueError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a number above 0, at most 1, found {threshold}")
    found: list[int | None] = []
    kept: dict[int, np.ndarray] = {}
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for number, text in enumerate(texts):
        own = signature(text)
        keys = [(band, values.tobytes()) for band, values in enumerate(np.split(own, BANDS))]
        candidates = sorted({candidate for key in keys for candidate in buckets.get(key, ())})
        found.append(next((one for one in candidates if jaccard(own, kept[one]) >= threshold), None))
        if found[-1] is None:
            kept[number] = own
            for key in keys:
                buckets.setdefault(key, []).append(number)
    return found


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the input reaches every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
