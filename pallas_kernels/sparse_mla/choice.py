"""Which implementation of sparse latent attention runs on which platform and for which shapes.

The Pallas kernels are compiled for their chips and interpreted in the tests, but have not run on one yet; and a Pallas
call is not split over a mesh by itself. So they are named, not chosen.
"""

from typing import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def prefer(platform: str, shapes: Shapes) -> tuple[str, str]:
    """The implementation of the forward pass for a platform and shapes, and the reason."""
    return "xla", "gathers the selected rows of one block of queries at a time"


def refuse(implementation: str, shapes: Shapes) -> str | None:
    """Why a Pallas kernel cannot take these shapes; None where it can."""
    return None


def prefer_backward(platform: str, shapes: Shapes) -> tuple[str, str]:
    """The implementation of the backward pass for a platform and shapes, and the reason."""
    return "xla", "gathers anew, one block of queries at a time, and adds up in float32"


def refuse_backward(implementation: str, shapes: Shapes) -> str | None:
    """Why a Pallas kernel of the backward pass cannot take these shapes; None where it can."""
    return None
