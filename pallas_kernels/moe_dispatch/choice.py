"""Which implementation of the grouped product runs on which platform and for which shapes."""

from typing import Mapping

Shapes = Mapping[str, tuple[int, ...]]

# 128 columns of a float32 matrix as deep as this fill the room of one block in a TPU core.
TPU_DEEPEST = 16_384


def prefer(platform: str, shapes: Shapes) -> tuple[str, str]:
    """The implementation for a platform and shapes, and the reason; forward and backward take the same one.

    The Pallas kernels are compiled for their chips and interpreted in the tests, but have not run on one yet; and a
    Pallas call is not split over a mesh by itself. So they are named, not chosen.
    """
    return "xla", "a loop over tiles of rows, each with its own group's matrix"


def refuse(implementation: str, shapes: Shapes) -> str | None:
    """Why a Pallas kernel cannot take these shapes; None where it can."""
    _, depth, width = shapes["w_EKM"]
    if implementation == "pallas_tpu" and max(depth, width) > TPU_DEEPEST:
        return (f"w_EKM: expected K and M of at most {TPU_DEEPEST}, found {depth} and {width}: "
                f"128 columns of that depth do not fit the kernel's block")
    return None
