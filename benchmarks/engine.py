"""The engine: decoding beside transformers, its own overhead, and what drafts, prefixes and load do to it.

    pip install -e '.[parity]'            (Python 3.11; or `make parity`, then .venv-parity/bin/python)
    python benchmarks/engine.py           (`--parts host prefix load` need neither torch nor a trained model)

- **transformers**: `tiny` with the same random weights on both sides, float32, all cores this process may use; greedy
  completions of prompts of 16 tokens by 112 new ones, prompts included in the time, one side after the other in every
  round. Theirs is eager torch, `generate` with its cache. Completions are compared before anything is timed, on as many
  tokens as are selected: which of equal scores torch takes is left to chance. Aims: 2x, 3x, 5x at batch 1, 8, 32.
- **host**: the share of the time that passes outside the compiled programs, slots full. Aim: below 10 %.
- **speculative**: a trained model (`--checkpoint`, by default what `make run` leaves) continues a text with none to
  three drafts, greedy, one row: accepted tokens per round, and the speed over none. Completions are compared.
- **prefix**: conversations of several turns, each adding to the one before, with their session named and without.
- **load**: requests arrive at random moments, at shares of what full slots carry; tokens per second, waiting, latency.

Two CPU cores: about five minutes. Writes benchmarks/results/engine-<date>-<device>.json.
"""

import argparse
import functools
import pathlib
import statistics
import time
from typing import Any, Callable, NamedTuple

import jax
import numpy as np

import glm5_jax as glm5
from glm5_jax import ModelConfig
from glm5_jax.data import sources
from glm5_jax.infer import slots as device
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Result, Sampling
from glm5_jax.text.tokenizer import Tokenizer

import measure
from measure import Job
from peer import Peer

PARTS = ("transformers", "host", "speculative", "prefix", "load")
AIMS = {1: 2.0, 8: 3.0, 32: 5.0}  # over transformers, by batch
AIM_OF_HOST = 0.10


class Sizes(NamedTuple):
    """Of all parts; the engine feeds prompts by `chunk` and looks up after every `block` tokens."""

    batches: tuple[int, ...] = (1, 8, 32)  # beside transformers, this and the next line
    short: tuple[int, int] = (16, 112)  # prompt and new tokens
    prompt: int = 64
    new: int = 64
    slots: int = 8  # of the parts without transformers
    chunk: int = 64
    block: int = 16
    turns: int = 6
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    requests: int = 64  # at each share


TOY = Sizes(batches=(1, 2), short=(8, 4), prompt=8, new=4, slots=2, chunk=4, block=2, turns=2, shares=(0.5, 1.0),
            requests=4)


def preset(toy: bool) -> ModelConfig:
    """`tiny` without what transformers does not have: the MTP layer and an epsilon of its own."""
    config = glm5.tiny(num_nextn_predict_layers=0, latent_norm_eps=1e-6)
    return config.replace(num_hidden_layers=2, vocab_size=64) if toy else config


def prompts(config: ModelConfig, count: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (count, length)).astype(np.int32)


def engine_of(params: Any, config: ModelConfig, sizes: Sizes, slots: int, *, room: int | None = None,
              chunk: int | None = None, drafts: int = 0) -> Engine:
    return Engine(params, config, slots=slots, max_len=room or sizes.prompt + sizes.new, chunk=chunk or sizes.chunk,
                  block=sizes.block, drafts=drafts)


def complete(engine: Engine, prompts_BT: np.ndarray, new: int) -> list[Result]:
    """Greedy completions in the order of the prompts."""
    numbers = [engine.submit(ids, Sampling(max_new_tokens=new, temperature=0)) for ids in prompts_BT]
    while engine.step():
        pass
    found = {result.request: result for result in engine.results()}
    return [found[number] for number in numbers]


def tokens_of(results: list[Result]) -> np.ndarray:
    return np.array([result.completion.ids for result in results])


def beside_transformers(config: ModelConfig, params: Any, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Speeds by batch. Raises SystemExit where the completions are not the same."""
    peer = Peer(config, params, measure.threads())
    few = prompts(config, 2, config.index_topk // 2)
    mine = tokens_of(complete(engine_of(params, config, sizes, 2), few, config.index_topk // 2))
    same = float((mine == peer.generate(peer.tokens(few), config.index_topk // 2).numpy()).mean())
    if same < 0.99:
        raise SystemExit(f"completions: expected those of transformers, found {same:.0%} of the tokens equal")
    table: dict[str, Any] = {"same_tokens": same}
    length, new = sizes.short
    for batch in sizes.batches:
        engine, whole = engine_of(params, config, sizes, batch, chunk=length), prompts(config, batch, length)
        theirs = functools.partial(peer.generate, peer.tokens(whole), new)
        jobs = {"transformers": Job(theirs), "engine": Job(functools.partial(complete, engine, whole, new))}
        table[f"batch {batch}"] = rows = measure.speed(measure.taking_turns(jobs, rounds), "transformers")
        for side, row in rows.items():
            row["tokens_per_second"] = batch * new / row["seconds"]
            print(f"  batch {batch:2} {side:14} {row['tokens_per_second']:9,.0f} tokens/s  {row['ratio']:6.2f}x  "
                  f"({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f}; aim {AIMS.get(batch, 1):g}x)", flush=True)
    return table


def host(config: ModelConfig, params: Any, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """The share of the engine's time in which no compiled program runs."""
    engine, inside = engine_of(params, config, sizes, sizes.slots), [0.0]

    def waited_for(program: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            out = jax.block_until_ready(program(*args))
            inside[0] += time.perf_counter() - start
            return out
        return run

    whole = prompts(config, 2 * sizes.slots, sizes.prompt)
    original, shares = (device.prefill, device.decode), []
    device.prefill, device.decode = map(waited_for, original)
    try:
        complete(engine, whole, sizes.new)
        for _ in range(rounds):
            inside[0], start = 0.0, time.perf_counter()
            complete(engine, whole, sizes.new)
            shares.append(1 - inside[0] / (time.perf_counter() - start))
    finally:
        device.prefill, device.decode = original
    found = {"share": statistics.median(shares), "lowest": min(shares), "highest": max(shares)}
    print(f"  {found['share']:.1%} of the time is the host's (aim {AIM_OF_HOST:.0%})", flush=True)
    return found


def speculative(directory: pathlib.Path, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Accepted tokens per round and speed by number of drafts, on texts the model was not trained on."""
    if not (directory / "config.json").is_file():
        raise SystemExit(f"--checkpoint: expected a checkpoint directory, found none at {directory}; `make run` leaves "
                         f"one at runs/glm5-tiny/hf, or leave the part out: --parts transformers host prefix load")
    config, params = glm5.load_hf(directory)
    _, held_out = sources.split(sources.packaged_text(), held_out_fraction=0.1)
    ids = [Tokenizer.load(directory).encode(document.text)[:sizes.prompt] for document in held_out]
    texts = np.array([x for x in ids if len(x) == sizes.prompt][:4])
    engines = {drafts: engine_of(params, config, sizes, 1, drafts=drafts) for drafts in range(config.mtp_unroll + 1)}
    plain = tokens_of(complete(engines[0], texts, sizes.new))
    for drafts, engine in engines.items():
        if not (tokens_of(complete(engine, texts, sizes.new)) == plain).all():
            raise SystemExit(f"{drafts} drafts: expected the completions without, found others")
    jobs = {str(drafts): Job(functools.partial(complete, engine, texts, sizes.new))
            for drafts, engine in engines.items()}
    rows = measure.speed(measure.taking_turns(jobs, rounds), "0")
    for drafts, engine in engines.items():
        row = rows[str(drafts)]
        row["accept_length"] = engine.accept_length
        print(f"  {drafts} drafts: {row['accept_length']:.2f} tokens a round, {row['ratio']:.2f}x  "
              f"({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})", flush=True)
    return rows


def prefix(config: ModelConfig, params: Any, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """The gain of a session over the same turns without one."""
    added = prompts(config, sizes.slots * sizes.turns, sizes.prompt).reshape(sizes.slots, sizes.turns, sizes.prompt)
    room = sizes.turns * (sizes.prompt + sizes.block)
    engine, talk = engine_of(params, config, sizes, sizes.slots, room=room), [0]

    def converse(named: bool) -> int:
        """All conversations, a turn of each at a time; how many tokens were found in the cache."""
        talk[0] += 1
        so_far: list[list[int]] = [[] for _ in range(sizes.slots)]
        reused = 0
        for turn in range(sizes.turns):
            numbers = {}
            for row, ids in enumerate(so_far):
                ids += added[row, turn].tolist()
                numbers[engine.submit(ids, Sampling(max_new_tokens=sizes.block, temperature=0),
                                      session=(talk[0], row) if named else None)] = row
            while engine.step():
                pass
            for result in engine.results():
                so_far[numbers[result.request]] += result.completion.ids
                reused += result.reused
        return reused

    jobs = {name: Job(functools.partial(converse, named)) for name, named in (("without", False), ("session", True))}
    rows: dict[str, Any] = measure.speed(measure.taking_turns(jobs, rounds), "without")
    rows["reused_tokens"] = converse(True)
    print(f"  {sizes.turns} turns of {sizes.prompt} + {sizes.block}: {rows['session']['ratio']:.2f}x with sessions, "
          f"{rows['reused_tokens']:,} prompt tokens found in the cache", flush=True)
    return rows


def load(config: ModelConfig, params: Any, sizes: Sizes) -> list[dict[str, Any]]:
    """Throughput and latency where requests arrive by a Poisson process at shares of the capacity."""
    engine, sampling = engine_of(params, config, sizes, sizes.slots), Sampling(max_new_tokens=sizes.new, seed=1)
    whole = prompts(config, sizes.requests, sizes.prompt)
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        complete(engine, whole, sizes.new)
        capacity = len(whole) / (time.perf_counter() - start)  # requests per second
    rows = []
    for share in sizes.shares:
        gaps = np.random.default_rng(1).exponential(1 / (share * capacity), len(whole))
        arrivals, came, ended = np.cumsum(gaps), {}, {}
        start = time.perf_counter()
        while len(ended) < len(whole):
            now = time.perf_counter() - start
            while len(came) < len(whole) and arrivals[len(came)] <= now:
                came[engine.submit(whole[len(came)], sampling)] = arrivals[len(came)]
            if not engine.running and not engine.waiting and len(came) < len(whole):
                time.sleep(max(0.0, arrivals[len(came)] - now))
                continue
            engine.step()
            ended |= {result.request: time.perf_counter() - start for result in engine.results()}
        latency = sorted(ended[number] - came[number] for number in came)
        rows.append({"share": share, "offered_per_second": share * capacity,
                     "tokens_per_second": len(whole) * sizes.new / max(ended.values()),
                     "latency_median": statistics.median(latency), "latency_p95": latency[int(0.95 * len(latency))]})
        print(f"  offered {share:4.0%} of capacity: {rows[-1]['tokens_per_second']:7,.0f} tokens/s, latency "
              f"{rows[-1]['latency_median']:.2f} s, p95 {rows[-1]['latency_p95']:.2f} s", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The engine beside transformers, and what its parts are worth.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path("runs/glm5-tiny/hf"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="all of it at a size that says nothing")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    sizes, config = TOY if options.toy else Sizes(), preset(options.toy)
    packages = ("torch", "transformers") if "transformers" in options.parts else ()
    record = measure.surroundings(*packages) | {"sizes": sizes._asdict(), "rounds": options.rounds}
    print(", ".join(f"{name} {value}" for name, value in (record | record["versions"]).items()
                    if name not in ("versions", "sizes")))
    params = glm5.init(config, jax.random.key(0))
    parts: dict[str, Callable[[], Any]] = {
        "transformers": lambda: beside_transformers(config, params, sizes, options.rounds),
        "host": lambda: host(config, params, sizes, options.rounds),
        "speculative": lambda: speculative(options.checkpoint, sizes, options.rounds),
        "prefix": lambda: prefix(config, params, sizes, options.rounds),
        "load": lambda: load(config, params, sizes)}
    for name in options.parts:
        print(name, flush=True)
        record[name] = parts[name]()
    print(f"Written to {measure.write(options.out, 'engine', record)}")


if __name__ == "__main__":
    main()
