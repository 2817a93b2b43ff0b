"""Which implementation of an operation runs: its name, the choice by target platform and shape, and the reason.

Every operation has an exact `reference`, an `xla` form that runs everywhere, and Pallas kernels for some platforms and
shapes. `implementation=None` chooses by the platform a program is compiled for, not by the devices of the host: a
program that a CPU host compiles for a TPU takes the TPU's branch. A named implementation runs or raises.

The rules of an operation are two pure functions in the `choice.py` beside it, listed in `RULES`.
"""

import functools
import logging
from typing import Any, Callable, Mapping, NamedTuple

from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pallas_kernels.lightning_indexer import choice as lightning_indexer
from pallas_kernels.moe_dispatch import choice as moe_dispatch
from pallas_kernels.sparse_mla import choice as sparse_mla

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
PLATFORMS = ("cpu", "tpu", "cuda")
PALLAS_PLATFORM = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}

Shapes = Mapping[str, tuple[int, ...]]

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """What runs, and why."""

    implementation: str
    reason: str


class Rules(NamedTuple):
    """The rules of one operation; `arguments` are the names that `shapes` has to hold."""

    arguments: tuple[str, ...]
    prefer: Callable[[str, Shapes], tuple[str, str]]  # platform, shapes -> implementation, reason
    refuse: Callable[[str, Shapes], str | None]  # Pallas implementation, shapes -> why it cannot run, or None


RULES: Mapping[str, Rules] = {
    "index_scores": Rules(("q_BTIC", "k_BSC", "w_BTI"),
                          lightning_indexer.prefer_scores, lightning_indexer.refuse_scores),
    "select_topk": Rules(("q_BTIC", "k_BSC", "w_BTI", "top_k"),
                         lightning_indexer.prefer_selection, lightning_indexer.refuse_selection),
    "sparse_mla": Rules(("q_BTHR", "kv_BSR", "indices_BTK", "value_dim"), sparse_mla.prefer, sparse_mla.refuse),
    "sparse_mla_backward": Rules(("q_BTHR", "kv_BSR", "indices_BTK", "value_dim"),
                                 sparse_mla.prefer_backward, sparse_mla.refuse_backward),
    "grouped_matmul": Rules(("x_NK", "w_EKM"), moe_dispatch.prefer, moe_dispatch.refuse),
}


def explain(op: str, platform: str, shapes: Shapes) -> Choice:
    """The implementation that `implementation=None` takes for `op` on `platform`, and why. Pure.

    `platform` is "cpu", "tpu" or "cuda"; any other platform takes "xla". `shapes` maps the names of the operation's
    array arguments to their shapes, and sizes that are no array to a tuple of one, as in `{"top_k": (2048,)}`.
    Raises ValueError for an unknown operation, an unknown platform and a missing shape.
    """
    _check_name("op", op, tuple(RULES))
    _check_name("platform", platform, PLATFORMS)
    return Choice(*RULES[op].prefer(platform, _complete(op, shapes)))


def call(op: str, implementations: Mapping[str, Callable[..., Any]], *args: Any, shapes: Shapes,
         implementation: str | None = None, interpret: Any = False) -> Any:
    """`implementations[name](*args)` with the named implementation, or the one for the platform it is compiled for.

    `implementations` holds "reference", "xla" and the kernels there are; the first of `args` is an array.
    `interpret` is True, or parameters of a Pallas interpreter, where a Pallas implementation is to run on any platform.
    Raises ValueError for a name that does not exist, and NotImplementedError, with the reason, where a named
    implementation cannot run: at once for its shapes, when compiling for its platform.
    """
    shapes = _complete(op, shapes)
    if implementation is not None:
        _check_name(f"{op}: implementation", implementation, IMPLEMENTATIONS)
    if interpret and implementation not in PALLAS_PLATFORM:
        raise ValueError(f"{op}: interpret: expected the name of a Pallas implementation beside it, found "
                         f"implementation={implementation!r}")
    if implementation is None:
        chosen = {platform: explain(op, platform, shapes) for platform in PLATFORMS}
        _announce(op, tuple(chosen.items()))
        branches = {platform: implementations[choice.implementation] for platform, choice in chosen.items()}
        if len({choice.implementation for choice in chosen.values()}) == 1:
            return branches["cpu"](*args)
        return lax.platform_dependent(*args, default=implementations["xla"], **branches)

    platform = PALLAS_PLATFORM.get(implementation)
    if platform is None:
        return implementations[implementation](*args)
    reason = RULES[op].refuse(implementation, shapes)
    if reason is None and implementation not in implementations:
        reason = "there is no such kernel"
    if reason is not None:
        raise NotImplementedError(f"{op}: {implementation} cannot run: {reason}")
    kernel = implementations[implementation]
    if interpret:
        return kernel(*args)
    reason = f"{op}: {implementation} runs on {platform} alone; elsewhere pass interpret=True or another implementation"
    refused = lambda first, *rest: implementations["xla"](_refusal_p.bind(first, reason=reason), *rest)
    return lax.platform_dependent(*args, default=refused, **{platform: kernel})


def bind(kernels: Mapping[str, Callable[..., Any]], interpret: Any, **options: Any) -> dict[str, Callable[..., Any]]:
    """Every implementation with its options; those of Pallas are told whether to interpret."""
    return {name: functools.partial(kernel, **options, **({"interpret": interpret} if name in PALLAS_PLATFORM else {}))
            for name, kernel in kernels.items()}


def _complete(op: str, shapes: Shapes) -> Shapes:
    missing = [name for name in RULES[op].arguments if name not in shapes]
    if missing:
        raise ValueError(f"{op}: shapes: expected {', '.join(RULES[op].arguments)}, found no {', '.join(missing)}")
    return {name: tuple(shapes[name]) for name in RULES[op].arguments}


def _check_name(what: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, found {found!r}")


@functools.cache
def _announce(op: str, chosen: tuple[tuple[str, Choice], ...]) -> None:
    """Logged once per operation, and again only where other shapes change the choice."""
    _log.info("%s: %s", op, "; ".join(f"on {platform} {choice.implementation} ({choice.reason})"
                                      for platform, choice in chosen))


# Identity when traced, an error when compiled: the trace of a program that is compiled for one platform holds the
# branches of the others too.
_refusal_p = Primitive("pallas_kernels_refusal")
_refusal_p.def_abstract_eval(lambda x, reason: x)
batching.defvectorized(_refusal_p)


@_refusal_p.def_impl
def _refuse(*_: Any, reason: str) -> Any:
    raise NotImplementedError(reason)


mlir.register_lowering(_refusal_p, _refuse)
