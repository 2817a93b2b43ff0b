"""Which implementation of the indexer runs on which platform and for which shapes.

The Pallas kernels are compiled for their chips and interpreted in the tests, but have not run on one yet; and a Pallas
call is not split over a mesh by itself. So they are named, not chosen.
"""

from typing import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def prefer_scores(platform: str, shapes: Shapes) -> tuple[str, str]:
    """The implementation of `index_scores` for a platform and shapes, and the reason."""
    return "xla", "one product per head, added up: memory is that of the result"


def refuse_scores(implementation: str, shapes: Shapes) -> str | None:
    """Why a Pallas kernel of `index_scores` cannot take these shapes; None where it can."""
    return None


def prefer_selection(platform: str, shapes: Shapes) -> tuple[str, str]:
    """The implementation of `select_topk` for a platform and shapes, and the reason."""
    return "xla", "scores and selects one block of queries at a time"


def refuse_selection(implementation: str, shapes: Shapes) -> str | None:
    """Why a Pallas kernel of `select_topk` cannot take these shapes; None where it can."""
    return None
