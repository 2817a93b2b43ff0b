"""Every way of scheduling on real processes, beside what the simulator foretells for them.

    python benchmarks/async_rl.py            (`--toy` runs all of it in a minute; sizes are options)

One process is an engine behind HTTP (`rl.worker`), on a core of its own; this one is loop and trainer, on another.
Lengths and tool waits are scripted by the laws of `rl.modelled`, the same for every mode, and tools really sleep: all
that differs is when things happen. The engine's t0 and kappa, the trainer's time per token and per step, and the push
are fitted on the sync run alone; with these the same scheduler runs on the simulator. Ratios of trained tokens per
second over sync, measured beside foretold, are written as they are found. Aims: within 10 %, and async at least twice
as fast as sync on the agent workload.

Writes benchmarks/results/async_rl-<date>-<device>.json.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import random
import secrets
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import uvicorn

import glm5_jax as glm5
from glm5_jax.checkpoint.store import Store
from glm5_jax.core.metrics import Metric
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Sampling
from glm5_jax.losses import policy
from glm5_jax.optim import partition
from glm5_jax.records import Completion, EndReason, Group, PolicyVersion, StopReason, Trajectory, Turn
from glm5_jax.rl import trainer, weights, worker
from glm5_jax.rl.ledger import Ledger, Order
from glm5_jax.rl.loop import Loop, Problem
from glm5_jax.rl.modelled import Machine, Simulation, Workload
from glm5_jax.rl.remote import Remote
from glm5_jax.rl.schedule import April, Async, OneStepOff, Scheduler, Sync
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.http import listening
from glm5_jax.train import state as train_state
from glm5_jax.train.policy_step import Options, PolicyStep

import measure

PROMPT = tuple(range(1, 9))
TOOL_SAYS = (9, 10, 11, 12)
GROUPS, ROLLOUTS = 4, 4
WORKLOADS = {
    "math": Workload("math", GROUPS, 96, 0.9, rollouts=ROLLOUTS, cap=384),
    "agent": Workload("agent", GROUPS, 96, 0.6, turns=6.0, tool_median=0.12, tool_sigma=1.2, rollouts=ROLLOUTS,
                      cap=320, most_turns=16, longest_tool=3.0)}
MODES: dict[str, Scheduler] = {
    "sync": Sync(GROUPS), "one-step": OneStepOff(GROUPS), "april 2": April(GROUPS, 2.0),
    **{f"async {bound}": Async(GROUPS, bound, "wait") for bound in (1, 2, 4)}}
AIM_ERROR, AIM_SPEED = 0.10, 2.0


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run."""

    steps: int = 24
    warm_up: int = 4
    slots: int = 32
    max_len: int = 512
    block: int = 4
    shrink: float = 1.0  # of lengths and tool waits


TOY = Size(steps=3, warm_up=1, slots=4, max_len=160, block=2, shrink=0.1)


class Script:
    """A workload whose group number n is the same in every run."""

    def __init__(self, workload: Workload, shrink: float):
        self.law = dataclasses.replace(
            workload, median=workload.median * shrink, cap=round(workload.cap * shrink),
            tool_median=workload.tool_median * shrink, longest_tool=workload.longest_tool * shrink)

    def group(self, number: int) -> list[list[tuple[int, float]]]:
        """Of each rollout its turns: tokens, and the seconds of the tool behind them."""
        rng = random.Random(f"{self.law.name} {number}")
        return [[(tokens, self.law.tool(rng)) for tokens in self.law.split(length, rng)]
                for length in self.law.lengths(rng)]


class Foretold:
    """The script as the simulator asks for a workload: group after group, in the order of dispatch."""

    def __init__(self, script: Script):
        self.name, self.rollouts, self.tool = script.law.name, script.law.rollouts, script.law.tool
        self._groups = map(script.group, itertools.count())
        self._turns: Iterator[list[int]] = iter(())

    def lengths(self, _: random.Random) -> list[int]:
        turns = [[tokens for tokens, _ in rollout] for rollout in next(self._groups)]
        self._turns = iter(turns)
        return list(map(sum, turns))

    def split(self, *_: Any) -> list[int]:
        return next(self._turns)


class Apart(Simulation):
    """One engine and one trainer in every mode, sync too."""

    def __init__(self, workload: Any, machine: Machine, scheduler: Scheduler):
        super().__init__(workload, machine, scheduler, 0.5, 0)
        self.generators = self.trainers = 1
        self.engines = self.engines[:1]


class Scripted:
    """Plays what the script says: every turn has its number of tokens, and then its tool sleeps."""

    def __init__(self, script: Script, engine: Remote):
        self._script, self._engine = script, engine
        self._called_back: dict[str, asyncio.Event] = {}

    def restore(self, tasks: Mapping[str, Any]) -> None:
        pass

    def next(self, number: int) -> Problem:
        return Problem(self._script.law.name, number, self._script.law.rollouts)

    async def play(self, order: Order, id: str, so_far: Trajectory | None) -> Trajectory:
        event = self._called_back[id] = asyncio.Event()
        turns = list(so_far.turns) if so_far else []
        drawn = None
        if turns and turns[-1].completion.stop is StopReason.ABORT:
            drawn = turns.pop().completion
        script = self._script.group(order.seed)[int(id.rpartition("-")[2])]
        ids = [one for turn in turns for one in turn.prompt + turn.completion.ids]
        end = EndReason.DONE
        for place, (tokens, tool) in list(enumerate(script))[len(turns):]:
            new = TOOL_SAYS if place else PROMPT
            completion = await self._draw(id, [*ids, *new], tokens, drawn)
            drawn, ids = None, [*ids, *new, *completion.ids]
            turns.append(Turn([{"role": "tool" if place else "user", "content": ""}], {"role": "assistant"}, new,
                              completion, place - 1 if place else None, float(sum(completion.ids) % 2)))
            if completion.stop is StopReason.ABORT:
                end = EndReason.ABORTED
                break
            if place + 1 < len(script):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), tool)
                if event.is_set():
                    end = EndReason.ABORTED
                    break
        del self._called_back[id]
        return Trajectory(id, order.task, order.seed, turns, end)

    async def _draw(self, id: str, ids: list[int], tokens: int, drawn: Completion | None) -> Completion:
        known = drawn.ids if drawn else ()
        pieces = [piece async for piece in self._engine.stream(
            [*ids, *known], Sampling(tokens, seed=len(ids)), session=id, drawn=len(known))]
        return sum(pieces, drawn or Completion((), (), (), StopReason.ABORT))

    def call_back(self, ids: Collection[str]) -> None:
        for id in ids:
            if id in self._called_back:
                self._called_back[id].set()
                self._engine.abort(id)

    def played(self, group: str, task: str) -> None:
        pass

    def ended(self, group: str, task: str, consumed: bool) -> None:
        pass


class Timed:
    """The trainer, and when it did what."""

    def __init__(self, inner: trainer.PolicyTrainer):
        self._inner = inner
        self.trained: list[tuple[int, float]] = []  # sampled tokens, seconds
        self.pushed: list[float] = []
        self.ends: list[float] = []

    @property
    def step(self) -> int:
        return self._inner.step

    async def train(self, step: int, batch: Sequence[Group]) -> Mapping[str, Metric]:
        start = time.perf_counter()
        metrics = await self._inner.train(step, batch)
        tokens = sum(len(turn.completion.ids) for group in batch for one in group.members for turn in one.turns)
        self.trained.append((tokens, time.perf_counter() - start))
        return metrics

    async def push(self, number: int) -> PolicyVersion:
        start = time.perf_counter()
        found = await self._inner.push(number)
        self.pushed.append(time.perf_counter() - start)
        self.ends.append(time.perf_counter())
        return found


class Logged(Engine):
    """An engine that keeps how long each step took: rounds, rounds times slots, seconds."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.log: list[tuple[float, float, float]] = []

    def step(self) -> bool:
        before, drawn = self._rounds, {one: len(one.new) for one in self._requests()}
        start = time.perf_counter()
        there = super().step()
        if there:
            rounds = max((len(one.new) - drawn.get(one, 0) for one in [*drawn, *self._requests()]), default=0)
            self.log.append((rounds, self._rounds - before, time.perf_counter() - start))
        return there

    def _requests(self) -> list[Any]:
        return [slot.request for slot in self._slots if slot.request is not None]


def serve(connection: Any, core: int | None, config: glm5.ModelConfig, params: Any, folder: str, token: str,
          size: Size) -> None:
    """The process of the engine: says its port, gives its log when asked, ends when told."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    engine = Logged(params, config, slots=size.slots, max_len=size.max_len, chunk=64, block=size.block)
    with Driver(engine) as driver:
        load = functools.partial(weights.fetch, folder, like=params)
        server = uvicorn.Server(uvicorn.Config(worker.application(driver, token, load), lifespan="off",
                                               log_level="warning"))
        taken = listening("127.0.0.1", 0)
        connection.send(taken.getsockname()[1])

        def answer() -> None:
            while connection.recv() == "log":
                log, engine.log = engine.log, []
                connection.send(log)
            server.should_exit = True

        threading.Thread(target=answer, daemon=True).start()
        server.run(sockets=[taken])


async def run(script: Script, scheduler: Scheduler, url: str, token: str, folder: pathlib.Path, first: int,
              make: Any, size: Size, steps: int) -> Timed:
    """One run of a mode; policies are numbered from `first` + 1 on."""
    remote = await Remote.connect(url, token)
    with tempfile.TemporaryDirectory() as place, Ledger(pathlib.Path(place) / "ledger.sqlite") as ledger:
        ledger.push(PolicyVersion(first, 0))
        deliver = trainer.to_folder(folder, lambda number: remote.push(number, cache="keep"))
        inner = make(pathlib.Path(place) / "checkpoints", deliver, steps, size)
        timed = Timed(inner)
        try:
            await Loop(ledger, scheduler, Scripted(script, remote), timed).run(steps)
        finally:
            await remote.aclose()
            inner.close()
    return timed


def makers(config: glm5.ModelConfig, params: Any, size: Size) -> Any:
    """Makes trainers that share their compiled programs."""
    rule = partition.build(glm5.param_specs(config), learning_rate=1e-5, optimizer="adamw", frozen=("indexer",))
    step = PolicyStep(config, rule, policy.double_sided_is, Options(aggregation="token_mean", rows=1))

    def make(folder: pathlib.Path, deliver: Any, steps: int, size: Size) -> trainer.PolicyTrainer:
        state = train_state.from_params(jax.tree.map(jax.numpy.copy, params), rule)
        plan = trainer.Plan(length=size.max_len, save_every=steps + 1)
        return trainer.PolicyTrainer(state, step, rule, Store(folder), deliver, plan)

    return make


def fitted(timed: Timed, log: Sequence[tuple[float, float, float]], size: Size) -> Machine:
    """The machine that the sync run was made on, past its warm-up."""
    rounds, slots, seconds = np.array(log).T
    (t0, kappa), *_ = np.linalg.lstsq(np.stack([rounds, slots], 1), seconds, rcond=None)
    t0, kappa = max(t0, 1e-6), max(kappa, 0.0)
    scale = seconds.sum() / (t0 * rounds + kappa * slots).sum()  # prefill too takes time
    tokens, took = np.array(timed.trained[size.warm_up:]).T
    (per_token, per_step), *_ = np.linalg.lstsq(np.stack([tokens, np.ones_like(tokens)], 1), took, rcond=None)
    if per_step < 0:
        per_token, per_step = took.sum() / tokens.sum(), 0.0
    return Machine(devices=2, slots=size.slots, t0=float(t0 * scale), kappa=float(kappa * scale),
                   train_token=float(per_token), train_step=float(per_step),
                   sync=float(np.mean(timed.pushed[size.warm_up:])), switch=0.0)


def measured(timed: Timed, size: Size) -> float:
    """Trained tokens per second past the warm-up."""
    tokens = sum(tokens for tokens, _ in timed.trained[size.warm_up:])
    return tokens / (timed.ends[-1] - timed.ends[size.warm_up])


def compare(script: Script, link: "Link", size: Size, modes: Sequence[str]) -> dict[str, Any]:
    """Sync and other modes of a workload: measured, and foretold by the machine that was fitted on sync."""
    rows: dict[str, dict[str, float]] = {}
    machine, base = None, {}
    for name in dict.fromkeys(["sync", *modes]):
        scheduler = MODES[name]
        timed, log = link.run(script, scheduler, size.steps)
        if machine is None:
            machine = fitted(timed, log, size)
            print(f"{script.law.name:6} {machine}", flush=True)
        report = Apart(Foretold(script), machine, scheduler).run(size.steps, size.warm_up)
        speeds = {"measured": measured(timed, size), "foretold": report.tokens_per_second}
        base = base or speeds
        ratios = {key: speeds[key] / base[key] for key in speeds}
        rows[name] = {"tokens_per_second": speeds["measured"], **ratios,
                      "error": ratios["foretold"] / ratios["measured"] - 1}
        print(f"{script.law.name:6} {name:9} {speeds['measured']:7.0f} tokens/s  {ratios['measured']:5.2f}x measured  "
              f"{ratios['foretold']:5.2f}x foretold  ({rows[name]['error']:+.0%})", flush=True)
    return {"machine": dataclasses.asdict(machine), "modes": rows}


class Link:
    """The process of the engine, and runs against it."""

    def __init__(self, config: glm5.ModelConfig, size: Size, cores: Sequence[int | None], folder: str):
        self._folder, self._token, self._size = pathlib.Path(folder) / "policies", secrets.token_urlsafe(), size
        params = jax.device_get(glm5.init(config, jax.random.key(0)))
        self._make, self._first = makers(config, params, size), 0
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, cores[1], config, params, str(self._folder),
                                                            self._token, size))
        self._process.start()
        self._url = f"http://127.0.0.1:{self._connection.recv()}"

    def run(self, script: Script, scheduler: Scheduler, steps: int) -> tuple[Timed, list[tuple[float, float, float]]]:
        timed = asyncio.run(run(script, scheduler, self._url, self._token, self._folder, self._first, self._make,
                                self._size, steps))
        self._first += steps + 1
        self._connection.send("log")
        return timed, self._connection.recv()

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send("stop")
        self._process.join(60)
        self._process.kill()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="seconds instead of minutes, to see that it works")
    parser.add_argument("--steps", type=int, help="of training in each mode")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=tuple(WORKLOADS))
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=tuple(MODES), help="beside sync")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    size = TOY if options.toy else Size()
    size = dataclasses.replace(size, steps=options.steps) if options.steps else size
    cores: list[int | None] = sorted(os.sched_getaffinity(0))[:2]
    cores = cores if len(cores) == 2 and not options.toy else [None, None]
    if cores[0] is not None:
        os.sched_setaffinity(0, {cores[0]})
    config = glm5.tiny(num_nextn_predict_layers=0, max_position_embeddings=size.max_len)
    record: dict[str, Any] = measure.surroundings() | {"size": dataclasses.asdict(size), "workloads": {}}
    with tempfile.TemporaryDirectory() as folder, Link(config, size, cores, folder) as link:
        link.run(Script(WORKLOADS["math"], size.shrink), MODES["async 1"], 2)  # compiles
        for name in options.workloads:
            record["workloads"][name] = compare(Script(WORKLOADS[name], size.shrink), link, size, options.modes)
    rows = [row for one in record["workloads"].values() for row in one["modes"].values()]
    record["worst_error"] = max(abs(row["error"]) for row in rows)
    missed = sum(abs(row["error"]) > AIM_ERROR for row in rows)
    print(f"{missed} of {len(rows)} predictions are off by more than {AIM_ERROR:.0%}")
    for name, one in record["workloads"].items():
        best = max(one["modes"].items(), key=lambda item: item[1]["measured"])
        print(f"{name}: {best[0]} is the fastest, {best[1]['measured']:.2f}x sync (aim of agent: {AIM_SPEED}x)")
    print(measure.write(options.out, "async_rl", record))


if __name__ == "__main__":
    main()
