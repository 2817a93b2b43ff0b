"""Thousands of random operations on an engine; whatever the schedule, every request is answered as if it were alone."""

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest

from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Result, Sampling
from tests.infer.replay import assert_ended, assert_replays, CONFIG, MAX_LEN, params

OPERATIONS, CHUNK = 800, 4


@dataclasses.dataclass
class Asked:
    """A request, with what it had drawn when it was aborted before."""

    ids: list[int]
    sampling: Sampling
    session: int | None
    before: Result | None = None

    @property
    def drawn(self) -> tuple[int, ...]:
        return self.before.completion.ids if self.before else ()

    def whole(self, result: Result) -> Result:
        if self.before is None:
            return result
        return dataclasses.replace(result, completion=self.before.completion + result.completion,
                                   model_logprobs=self.before.model_logprobs + result.model_logprobs)


class Schedule:
    """Submits, aborts, resumes, pushes and steps by chance, and keeps what was asked and answered."""

    def __init__(self, seed: int, cache: Literal["keep", "recompute"], *, sessions: int = 0, prompt: int = MAX_LEN,
                 **options: int):
        self.rng, self.cache, self.sessions, self.prompt = np.random.default_rng(seed), cache, sessions, prompt
        self.engine = Engine(params(0), CONFIG, max_len=MAX_LEN, chunk=CHUNK, **options)
        self.open: dict[int, Asked] = {}
        self.done: list[tuple[Asked, Result]] = []
        self.history: dict[int, list[int]] = {}
        self.counts = dict.fromkeys(("submit", "abort", "resume", "push", "step"), 0)

    def run(self) -> None:
        for _ in range(OPERATIONS):
            name = self.rng.choice(list(self.counts), p=[0.33, 0.1, 0.07, 0.05, 0.45])
            self.counts[name] += 1
            getattr(self, name)()
        while self.engine.step():
            pass
        self.collect()
        assert not self.open and self.engine.running == self.engine.waiting == 0

    def collect(self) -> None:
        for result in self.engine.results():
            asked = self.open.pop(result.request)
            whole = asked.whole(result)
            self.done.append((asked, whole))
            if asked.session is not None:
                self.history[asked.session] = [*asked.ids, *whole.completion.ids]

    def send(self, asked: Asked) -> None:
        number = self.engine.submit([*asked.ids, *asked.drawn], asked.sampling, session=asked.session,
                                    drawn=len(asked.drawn))
        self.open[number] = asked

    def submit(self) -> None:
        rng, new = self.rng, int(self.rng.integers(1, 8))
        session = int(rng.integers(self.sessions)) if self.sessions and rng.random() < 0.7 else None
        ids = rng.integers(0, CONFIG.vocab_size, rng.integers(1, min(self.prompt, MAX_LEN - new) + 1)).tolist()
        history = self.history.get(session, [])
        if history and rng.random() < 0.8:  # a further turn, or one that departs from the last
            ids = [*history[:rng.integers(1, len(history) + 1)], *ids[:4]][:MAX_LEN - new]
        self.send(Asked(ids, Sampling(
            new, temperature=float(rng.choice([0, 0.8, 1.0])), top_p=float(rng.choice([0.7, 1.0])),
            top_k=int(rng.choice([0, 4])), seed=int(rng.integers(16)), stop_ids=[int(rng.integers(16))]), session))

    def abort(self) -> None:
        """Calls one back; half of them come again at once, if they had not just ended."""
        if self.open:
            number = int(self.rng.choice(list(self.open)))
            try:
                result = self.engine.abort(number)
            except LookupError:
                return self.collect()
            asked = self.open.pop(number)
            whole = asked.whole(result)
            assert whole.completion.stop == "abort"
            if self.rng.random() < 0.5:
                self.send(dataclasses.replace(asked, before=whole))
            else:
                self.done.append((asked, whole))

    def resume(self) -> None:
        self.engine.pause()
        assert not self.engine.step()
        self.engine.resume(self.cache)

    def push(self) -> None:
        self.engine.pause()
        for _ in range(self.rng.integers(1, 3)):
            version = self.engine.version + 1
            self.engine.push_weights(params(version), version)
        if self.rng.random() < 0.5:
            self.submit()
        self.engine.resume(self.cache)

    def step(self) -> None:
        self.engine.step()
        if self.rng.random() < 0.5:
            self.collect()


@pytest.mark.parametrize("seed, options", [
    (0, dict(slots=3, block=3)), (1, dict(slots=3, block=1)), (2, dict(slots=1, block=3)),
    (3, dict(slots=3, block=3, drafts=3))])
def test_any_schedule_with_recomputed_caches(seed, options):
    """After a push everything is computed anew: each token is what the weights of its stamp draw after all before."""
    schedule = Schedule(seed, "recompute", sessions=5, **options)
    schedule.run()
    assert len(schedule.done) > 100
    for asked, result in schedule.done:
        if result.completion.stop != "abort":
            assert_ended(asked.sampling, result.completion)
    assert any(result.reused for _, result in schedule.done)
    assert any(len(set(result.completion.versions)) > 1 for _, result in schedule.done)
    assert_replays([(asked.ids, asked.sampling) for asked, _ in schedule.done],
                   [result for _, result in schedule.done])


@pytest.mark.parametrize("seed", [4, 5])
def test_any_schedule_with_kept_caches(seed):
    """After a push old keys stay: each request is run again, alone, with the pushes where its stamps have them."""
    schedule = Schedule(seed, "keep", prompt=CHUNK + 1, slots=3, block=1 + 2 * (seed % 2))
    schedule.run()
    alone = {}
    for asked, result in schedule.done:
        done = result.completion
        if asked.before is None and done.ids:  # what was resumed after a push had its cache made anew
            key = (*asked.ids, asked.sampling, done.versions)
            if key not in alone:
                alone[key] = run_alone(asked, done.versions)
            assert done.ids == alone[key].ids
            np.testing.assert_allclose(done.logprobs, alone[key].logprobs, atol=1e-5)
    assert len(alone) > 50


def run_alone(asked: Asked, versions: tuple[int, ...]) -> Any:
    """The completion of an idle engine that is handed the weights of each token just before it is drawn."""
    one = Engine(params(versions[0]), CONFIG, slots=3, max_len=MAX_LEN, chunk=CHUNK, block=1, version=versions[0])
    number = one.submit(asked.ids, asked.sampling)
    for version in versions:
        if version > one.version:
            one.pause()
            one.push_weights(params(version), version)
            one.resume("keep")
        one.step()
    found = one.results()
    return found[0].completion if found else one.abort(number).completion
