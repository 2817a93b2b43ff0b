"""What changes the parameters: `build` makes the optimiser of a tree of `ParamSpec`, `schedules` its numbers."""

from glm5_jax.optim.partition import build

__all__ = ["build"]
