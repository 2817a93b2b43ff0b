"""Training: the chunked loss and rematerialisation beside the plain step, and what input and checkpoints hold up.

    python benchmarks/train.py            (`--toy` runs all of it in a minute; sizes are options)

- **step**: tokens per second and the compiled step's temporaries for each way to rematerialise layers, and with the
  loss in blocks of positions; one after the other in every round, on one state, so that they are ratios of one run
- **input**: what share of the time `next(batches)` waits, with text read, tokenised, packed and mixed by Grain beside
  the steps; windows are so small that many are packed meanwhile. Aim: below 2 %
- **checkpoint**: how long `Store.save` keeps the loop from the next step, how long it goes on writing behind it, and
  what the step beside it takes

Steps are those of pre-training (dense attention, MTP) by AdamW: on rows as short as two cores bear, Muon's
orthogonalisation, whose cost is the same for any number of tokens, would hide what is compared (`--optimizer`).

The defaults are `small` on one row of 128 tokens, what two CPU cores can bear. Writes
benchmarks/results/train-<date>-<device>.json.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import Any, Callable, NamedTuple

import jax
import numpy as np

import glm5_jax as glm5
from glm5_jax import ModelConfig
from glm5_jax.checkpoint.store import Store
from glm5_jax.core.batch import Batch
from glm5_jax.data import mixture, sources, stream
from glm5_jax.optim import partition
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train import stages, state, step

import measure
from measure import Job

PRESETS = {"tiny": glm5.tiny, "small": glm5.small}
REMATS = ("full", "dots", "none")
AIM = 0.02  # share of the time that may be spent waiting for input
MIB = 2**20


class Work(NamedTuple):
    """What a step is: `rows` of `length` tokens."""

    config: ModelConfig
    optimizer: partition.Optimizer
    rows: int
    length: int
    mtp_steps: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def options(self, chunk: int = 0) -> step.Options:
        return stages.pretrain(step.Options(mtp_steps=self.mtp_steps, loss_chunk=chunk))

    def rule(self) -> Any:
        return partition.build(glm5.param_specs(self.config), learning_rate=1e-4, optimizer=self.optimizer,
                               frozen=self.options().frozen)

    def compiled(self, remat: str, chunk: int = 0) -> Any:
        """The step of the stage, compiled."""
        config, rule = self.config.replace(remat=remat), self.rule()
        like = jax.ShapeDtypeStruct((self.rows, self.length), np.int32)
        batch = Batch(like, like, jax.ShapeDtypeStruct(like.shape, np.float32), like, like)
        return step.make_train_step(config, rule, self.options(chunk)).lower(state.abstract(config, rule), batch
                                                                             ).compile()


class Trainer:
    """One state, which every compiled step takes further."""

    def __init__(self, work: Work):
        self.state = state.create(work.config, work.rule(), jax.random.key(0))

    def run(self, compiled: Any, batch: Batch) -> Any:
        self.state, metrics = compiled(self.state, batch)
        return jax.block_until_ready(metrics)


def pipeline(work: Work, read_ahead: int) -> Any:
    """Batches of text and of made-up words in equal shares; a window fills four batches of either."""
    tokenizer, rows = Tokenizer.packaged(), {}
    for name, documents in {"text": sources.packaged_text(), "words": sources.Synthetic(10_000)}.items():
        rows[name] = stream.PackedRows(stream.token_documents(documents, tokenizer, seed=0), work.length,
                                       window_rows=4 * work.rows)
    return iter(mixture.batches(rows, [mixture.Stage({"text": 1, "words": 1})], length=work.length,
                                batch_size=work.rows, read_ahead=read_ahead))


def seconds_of(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def speeds(work: Work, trainer: Trainer, variants: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Tokens per second and temporaries of every compiled variant, beside the first."""
    batch = next(pipeline(work, 0))
    found = measure.speed(measure.taking_turns(
        {name: Job(lambda compiled=compiled: trainer.run(compiled, batch)) for name, compiled in variants.items()},
        rounds), next(iter(variants)))
    for name, row in found.items():
        row["tokens_per_second"] = work.tokens / row["seconds"]
        row["temporaries_mib"] = variants[name].memory_analysis().temp_size_in_bytes / MIB
        print(f"  {name:24} {row['tokens_per_second']:9,.0f} tokens/s  {row['ratio']:5.2f}x  "
              f"({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})  {row['temporaries_mib']:8,.0f} MiB of "
              f"temporaries", flush=True)
    return found


def input_stall(work: Work, trainer: Trainer, compiled: Any, steps: int) -> dict[str, Any]:
    """The share of the time that the loop waits for batches, and what it would be if they were made in between."""
    batches = pipeline(work, read_ahead=2)
    first = seconds_of(lambda: trainer.run(compiled, next(batches)))
    waits, begun = [], time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        trainer.run(compiled, batch)
    share = sum(waits) / (took := time.perf_counter() - begun)
    batches.close()
    alone = pipeline(work, read_ahead=0)
    next(alone)
    each = seconds_of(lambda: [next(alone) for _ in range(steps)]) / steps
    alone.close()
    print(f"  waits for {share:.3%} of the time (aim {AIM:.0%}), at most {1000 * max(waits):.2f} ms for a batch; made "
          f"between the steps, batches would take {each / (each + (took - sum(waits)) / steps):.2%}", flush=True)
    return {"steps": steps, "share": share, "longest_wait_seconds": max(waits), "first_step_seconds": first,
            "step_seconds": (took - sum(waits)) / steps, "batch_seconds_alone": each,
            "tokens_per_second_alone": work.tokens / each}


def checkpoint_stall(work: Work, trainer: Trainer, compiled: Any, saves: int) -> dict[str, Any]:
    """Medians over saves, each begun when the one before is written."""
    batch = next(pipeline(work, 0))
    plain, blocked, beside, written = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, Store(folder, keep=1) as store:
        for number in range(1, saves + 1):
            plain.append(seconds_of(lambda: trainer.run(compiled, batch)))
            start = time.perf_counter()
            blocked.append(seconds_of(lambda: store.save(number, trainer.state, {})))
            beside.append(seconds_of(lambda: trainer.run(compiled, batch)))
            store.latest_step()
            written.append(time.perf_counter() - start)
    middle = statistics.median
    found = {"saves": saves, "mib": sum(x.nbytes for x in jax.tree.leaves(trainer.state)) / MIB,
             "blocked_seconds": middle(blocked), "blocked_steps": middle(b / p for b, p in zip(blocked, plain)),
             "written_seconds": middle(written), "step_beside": middle(b / p for b, p in zip(beside, plain)),
             "step_seconds": middle(plain)}
    print(f"  {found['mib']:,.0f} MiB: save holds the loop up for {found['blocked_seconds']:.2f} s, "
          f"{found['blocked_steps']:.2f} steps; written within {found['written_seconds']:.2f} s (the step beside it "
          f"counted); that step takes {found['step_beside']:.2f} times as long", flush=True)
    return found


def measured(work: Work, chunk: int, rounds: int, steps: int, saves: int) -> dict[str, Any]:
    """All three parts; the latter two with the remat of the preset."""
    variants = {f"remat {remat}": work.compiled(remat) for remat in REMATS}
    own = f"remat {work.config.remat}"
    variants[f"{own}, chunk {chunk}"] = work.compiled(work.config.remat, chunk)
    trainer = Trainer(work)
    print("step")
    found = {"step": speeds(work, trainer, variants, rounds)}
    print("input")
    found["input"] = input_stall(work, trainer, variants[own], steps)
    print("checkpoint")
    found["checkpoint"] = checkpoint_stall(work, trainer, variants[own], saves)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Training steps, waiting for input, and checkpoints.")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    parser.add_argument("--optimizer", choices=partition.OPTIMIZERS, default="adamw")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=32, help="positions of a row whose logits exist at a time")
    parser.add_argument("--mtp-steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of the input part")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="a model, rows and numbers so small that they mean nothing")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    work = Work(PRESETS[options.preset](), options.optimizer, options.rows, options.length, options.mtp_steps)
    chunk, rounds, steps, saves = options.chunk, options.rounds, options.steps, options.saves
    if options.toy:
        toy = glm5.tiny(hidden_size=16, num_hidden_layers=1, first_k_dense_replace=1, intermediate_size=16)
        work, chunk, rounds, steps, saves = Work(toy, options.optimizer, 2, 16, 0), 8, 1, 3, 1
    record = measure.surroundings("orbax-checkpoint", "grain") | {
        "preset": "toy" if options.toy else options.preset, "optimizer": work.optimizer, "rows": work.rows,
        "length": work.length, "mtp_steps": work.mtp_steps, "dtype": work.config.dtype, "rounds": rounds}
    print(", ".join(f"{name} {value}" for name, value in (record | record["versions"]).items() if name != "versions"))
    record |= measured(work, chunk, rounds, steps, saves)
    print(f"Written to {measure.write(options.out, 'train', record)}")


if __name__ == "__main__":
    main()
