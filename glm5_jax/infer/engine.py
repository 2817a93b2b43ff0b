"""The host half of the engine: who waits, who holds which slot, and what each has drawn.

A request takes a slot as soon as one is free, feeds its prompt chunk by chunk, and is then continued block by block
with all others; nothing is compiled but the two programs of `slots`. What it draws depends on the weights, its own ids,
its sampling and how its prompt was cut into chunks: on no other request.
"""

import collections
import contextlib
import dataclasses
from typing import Any, cast, ContextManager, Hashable, Literal, Sequence

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from glm5_jax.core.params import path_name
from glm5_jax.infer import slots as device
from glm5_jax.infer.fp8 import quantised
from glm5_jax.infer.request import RequestTooLong, Result, Sampling
from glm5_jax.infer.slot import Request, Slot, STOP_IDS
from glm5_jax.model.cache import Cache, take_row
from glm5_jax.model.config import ModelConfig
from glm5_jax.records import StopReason


@dataclasses.dataclass
class Counts:
    """Tokens of an engine since its start."""

    drawn: int = 0
    fed: int = 0  # of prompts, through the model
    reused: int = 0  # of prompts, found in the cache of their session
    again: int = 0  # held by the cache of what runs, and fed once more because of a push with "recompute", or a failure


class Engine:
    """Continuous batching over a fixed set of slots, each with room for `max_len` tokens.

    `chunk` is how many tokens of a prompt are fed at once, `block` how many rounds of drawing pass between two looks of
    the host; with `drafts` a round draws one token and as many more as the MTP layer guessed right, up to `drafts`,
    which `chunk` may not be less than. The cache is made once, of `slots.cache_bytes(config, slots, max_len, drafts)`,
    and never grows. Weights are used where they lie: who donates them to a training step hands over a copy. Those on a
    mesh make the engine run on it, with the slots split as `config.sharding` splits a batch; a prompt is fed by all
    devices. With `fp8` weights are quantised (see `infer.fp8`) here and at every push, and `quantisation_error` says
    how far they are from what was handed over. Not for several threads. Raises ValueError naming what is out of range,
    and where the mesh does not fit.
    """

    def __init__(self, params: Any, config: ModelConfig, *, slots: int, max_len: int, chunk: int = 128, block: int = 16,
                 drafts: int = 0, fp8: bool = False, version: int = 0):
        self.config, self.max_len, self.version = device.adapted(config, drafts), max_len, version
        for name, value, least in (("slots", slots, 1), ("max_len", max_len, 2), ("chunk", chunk, max(drafts, 1)),
                                   ("block", block, 1), ("version", version, 0)):
            if value < least:
                raise ValueError(f"Engine: {name}: expected at least {least}, found {value}")
        self._chunk, self._block, self._fp8 = min(chunk, max_len), block, fp8
        params = jax.device_put(params)
        self._given = jax.eval_shape(lambda: params)
        # Placed once and for all: an argument that moves between devices would be compiled for anew.
        self._placement = jax.tree.map(lambda x: x.sharding, params)
        sharding = jax.tree.leaves(self._placement)[0]
        self._mesh = cast(Mesh, sharding.mesh) if isinstance(sharding, NamedSharding) else None
        if self._mesh is not None:
            device.check_mesh(self.config, self._mesh, slots, fp8)
        self._take_weights(params)
        self._drafts: Any = np.zeros((slots, drafts), np.int32)
        self._cache: Any = None
        self._empty_cache()
        self._slots = [Slot(np.zeros(max_len, np.int32)) for _ in range(slots)]
        self._waiting: collections.deque[Request] = collections.deque()
        self._results: list[Result] = []
        self._submitted = self._time = self._rounds = 0
        self.counts = Counts()
        self._paused = self._stale = False

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return sum(slot.request is not None for slot in self._slots)

    @property
    def accept_length(self) -> float:
        """Tokens drawn in a round of a slot, on average since the start: 1 without drafts; NaN before the first."""
        return self.counts.drawn / self._rounds if self._rounds else float("nan")

    def submit(self, ids: Sequence[int] | np.ndarray, sampling: Sampling, *, session: Hashable | None = None,
               drawn: int = 0) -> int:
        """Queues a completion of `ids`; returns the number of the request. It waits until a slot is free.

        Requests of one `session` find there what the cache of an earlier one holds of their first ids. To resume what
        was aborted, append its tokens to the ids and say how many: `drawn`. They count as new tokens of this sampling;
        the result holds the rest of them.

        Raises RequestTooLong where prompt and new tokens exceed `max_len`, and ValueError naming what else is wrong.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids: expected a list of at least one token id, found {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"ids: expected 0 to {self.config.vocab_size - 1} (config.vocab_size), found {ids.min()} "
                             f"to {ids.max()}")
        if not 0 <= drawn < min(len(ids), sampling.max_new_tokens):
            raise ValueError(f"drawn: expected 0 or more, less than the {len(ids)} ids and less than max_new_tokens = "
                             f"{sampling.max_new_tokens}, found {drawn}")
        if len(sampling.stop_ids) > STOP_IDS or max(sampling.stop_ids, default=0) >= self.config.vocab_size:
            raise ValueError(f"stop_ids: expected at most {STOP_IDS} ids from 0 to {self.config.vocab_size - 1}, found "
                             f"{sampling.stop_ids}")
        length = len(ids) - drawn + sampling.max_new_tokens
        if length > self.max_len:
            raise RequestTooLong(f"ids and max_new_tokens: expected at most max_len = {self.max_len} in all, found "
                                 f"{len(ids) - drawn} + {sampling.max_new_tokens} = {length}; ask for fewer new tokens "
                                 f"or make an engine with a larger max_len")
        request = Request(self._submitted, ids.astype(np.int32), sampling, session, drawn)
        self._submitted += 1
        self._waiting.append(request)
        return request.id

    def step(self) -> bool:
        """Feeds every new request one chunk and continues every other by one block.

        Returns whether there was anything to do: `while engine.step(): ...` runs until nothing is left, or nothing may
        move because the engine is paused. Raises FloatingPointError where the weights give no finite log-probs, and
        what a program raises; then the next step goes on, from the ids where the cache is gone.
        """
        if self._paused:
            return False
        self._admit()
        if self._cache is None or any(x.is_deleted() for x in jax.tree.leaves((self._cache, self._drafts))):
            self._begin_anew()  # a program had been given it, and failed
        with self._on_mesh():
            for index, slot in enumerate(self._slots):
                if slot.spoiled and slot.request is not None:
                    self._cache = device.cleared(self.config, self._cache, np.int32(index))
                    slot.spoiled = False
                if slot.request is not None and not slot.ready:
                    self._feed(index, slot)
            if any(slot.ready for slot in self._slots):
                self._draw()
        return self.running > 0 or self.waiting > 0

    def results(self) -> list[Result]:
        """What has ended since the last call, in the order of its end."""
        results, self._results = self._results, []
        return results

    def progress(self, request: int, since: int = 0) -> Result:
        """What a request has drawn so far, as `abort` would return it, but for the first `since` tokens; it goes on.

        Raises LookupError as `abort` does.
        """
        return self._find(request)[0].result(StopReason.ABORT, since)

    def abort(self, request: int) -> Result:
        """Calls a request back and returns what it has drawn; its cache stays with its session.

        Raises LookupError for one that neither waits nor runs.
        """
        found, slot = self._find(request)
        if slot is None:
            self._waiting.remove(found)
        else:
            self._leave(slot)
        return found.result(StopReason.ABORT)

    def hand_over(self, session: Hashable) -> tuple[tuple[int, ...], Cache] | None:
        """The ids that the cache holds of a session without a running request, and their row, for `adopt` of another
        engine; None where it holds none."""
        for index, slot in enumerate(self._slots):
            if slot.request is None and slot.session == session and slot.held:
                row = device.handed_over(self._cache, np.int32(index))
                return tuple(slot.ids[:slot.held].tolist()), row
        return None

    def adopt(self, session: Hashable, ids: Sequence[int], row: Cache, version: int) -> bool:
        """Takes the row of a session from an engine of the same config, `max_len` and `drafts`, of whose weights
        `version` is; the session's next request finds `ids` in the cache.

        Returns False, and takes nothing, where the weights are others or no slot is idle. Raises ValueError for a row
        that does not fit.
        """
        idle = [(index, slot) for index, slot in enumerate(self._slots) if slot.request is None]
        if version != self.version or not idle:
            return False
        expected, found = ([x.shape for x in jax.tree.leaves(cache)] for cache in (
            jax.eval_shape(take_row, self._cache, 0), row))
        if expected != found or len(ids) > self.max_len:
            raise ValueError(f"row: expected one of an engine of this config, max_len and drafts, with arrays of "
                             f"{expected}, found {found}")
        index, slot = max(idle, key=lambda one: (one[1].session == session, one[1].session is None, -one[1].left_at))
        with self._on_mesh():
            self._cache = device.adopted(self.config, self._cache, np.int32(index), row)
        slot.ids[:len(ids)] = ids
        slot.session, slot.held, slot.length, slot.spoiled, slot.cut_back = session, len(ids), len(ids), False, False
        self._leave(slot)
        return True

    def pause(self) -> None:
        """Holds everything where it is: `step` does nothing until `resume`. Requests can come and be aborted."""
        self._paused = True

    def push_weights(self, params: Any, version: int) -> None:
        """Replaces the weights of a paused engine; from now on tokens are stamped with `version`.

        Raises RuntimeError where the engine is not paused and ValueError, leaving all as it is, for a version that is
        not above the present one or for parameters of other names, shapes or dtypes.
        """
        if not self._paused:
            raise RuntimeError("push_weights: expected a paused engine; call pause() before and resume() after it")
        if version <= self.version:
            raise ValueError(f"version: expected above {self.version}, the present one, found {version}")
        _require_same(self._given, params)
        self._take_weights(params)
        self.version, self._stale = version, True

    def resume(self, cache: Literal["keep", "recompute"] = "recompute") -> None:
        """Lets the engine go on after `pause`.

        After a push, what the cache holds was made by older weights. "recompute" makes it anew from the ids, so that
        every later token is what the new weights alone would draw; "keep" goes on with it at no cost.
        """
        if cache not in ("keep", "recompute"):
            raise ValueError(f"cache: expected 'keep' or 'recompute', found {cache!r}")
        self._paused = False
        if self._stale and cache == "recompute":
            self._begin_anew()

    def _take_weights(self, params: Any) -> None:
        params, error = jax.device_put(params, self._placement), 0.0
        if self._fp8:
            params, found = quantised(self.config, params)
            error = float(found)
        self._params, self.quantisation_error = params, error

    def _begin_anew(self) -> None:
        """Every row is fed again, from its ids."""
        for slot in self._slots:
            self.counts.again += slot.held if slot.request else 0
            slot.held = 0
        self._empty_cache()
        self._stale = False

    def _empty_cache(self) -> None:
        """Not only cut back: where the weights gave NaN, rows would keep it, and 0 times NaN is NaN."""
        self._cache = None  # freed before the next one is made
        with self._on_mesh():
            made = device.empty(self.config, *self._drafts.shape, self.max_len)
        if self._mesh is None:
            made = jax.device_put(made, jax.tree.leaves(self._placement)[0])
        self._cache, self._drafts = made

    def _on_mesh(self) -> ContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _admit(self) -> None:
        """First come, first served: in its session's slot, in one that nobody will ask for again, in the oldest."""
        while self._waiting and (idle := [slot for slot in self._slots if slot.request is None]):
            request = self._waiting.popleft()
            slot = max(idle, key=lambda slot: (slot.reusable(request), slot.session is None, -slot.left_at))
            slot.take(request, self._drafts.shape[1])
            self.counts.reused += request.reused

    def _feed(self, index: int, slot: Slot) -> None:
        count = min(self._chunk, slot.length - 1 - slot.held)
        tokens = np.zeros(self._chunk, np.int32)
        tokens[:count] = slot.ids[slot.held:slot.held + count]
        self._cache = device.prefill(self._params, self.config, self._cache, np.int32(index), np.int32(slot.held),
                                     tokens, np.int32(count), np.bool_(slot.cut_back), self._drafts.shape[1])
        slot.held, slot.cut_back = slot.held + count, False
        self.counts.fed += count

    def _draw(self) -> None:
        rows = device.rows_of([slot.row() for slot in self._slots])
        self._cache, self._drafts, drawn = device.decode(self._params, self.config, self._cache, rows, self._drafts,
                                                         np.bool_(bool(self._waiting)), self._block)
        drawn = jax.device_get(drawn)
        self._rounds += int(drawn.rounds_B.sum())
        for slot, tokens, *logprobs in zip(self._slots, drawn.tokens_BN, drawn.logprobs_BN, drawn.model_logprobs_BN):
            count = int((tokens >= 0).sum())
            if slot.request is not None and count:
                self._append(slot, slot.request, *(x_N[:count] for x_N in (tokens, *logprobs)))

    def _append(self, slot: Slot, request: Request, new: np.ndarray, logprobs: np.ndarray,
                model_logprobs: np.ndarray) -> None:
        if not np.isfinite(logprobs).all():
            slot.held, slot.session, slot.spoiled = 0, None, True  # the row holds NaN: it is made anew from the ids
            raise FloatingPointError(f"request {request.id}: expected finite log-probs, found {logprobs.min()} under "
                                     f"version {self.version} of the weights; abort it or push other weights")
        slot.ids[slot.length:slot.length + len(new)] = new
        slot.length += len(new)
        slot.held += len(new)
        request.new += new.tolist()
        request.logprobs += logprobs.tolist()
        request.model_logprobs += model_logprobs.tolist()
        request.versions += [self.version] * len(new)
        self.counts.drawn += len(new)
        stopped = request.new[-1] in request.sampling.stop_ids
        if stopped or request.left == 0:
            self._leave(slot)
            self._results.append(request.result(StopReason.STOP if stopped else StopReason.LENGTH))

    def _find(self, request: int) -> tuple[Request, Slot | None]:
        """A request that waits or runs, and the slot it runs in."""
        for slot in self._slots:
            if slot.request is not None and slot.request.id == request:
                return slot.request, slot
        for waiting in self._waiting:
            if waiting.id == request:
                return waiting, None
        state = "one that has ended" if request in range(self._submitted) else "one that was never submitted"
        raise LookupError(f"request: expected one that waits or runs, found {request!r}, {state}")

    def _leave(self, slot: Slot) -> None:
        self._time += 1
        slot.leave(self._time)


def _require_same(present: Any, params: Any) -> None:
    """Raises ValueError at the first parameter whose name, shape or dtype is another."""
    described = lambda tree: {path_name(path): f"{x.dtype} {list(x.shape)}"
                              for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    expected, found = described(present), described(params)
    for name in sorted(expected | found):
        if expected.get(name) != found.get(name):
            raise ValueError(f"params: {name}: expected {expected.get(name, 'no such parameter')}, found "
                             f"{found.get(name, 'none')}")
