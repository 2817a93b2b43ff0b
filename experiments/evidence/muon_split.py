"""Muon Split beside Muon and AdamW at equal tokens: held-out loss, and the largest attention logit over training.

    python experiments/evidence/muon_split.py            (`--quick` runs all of it at toy size)

Claimed by the GLM-5 report, section 2.1: with the up-projections of queries, keys and values orthogonalised head by
head, attention logits keep their scale through training without any clipping, and MLA gains on six of seven benchmarks
(table 1: +0.5 to +3.2 points over whole matrices). Here: 0.8M parameters, dense attention, 102,400 tokens of the
packaged text, three seeds, the same rows in the same order for all three optimisers; AdamW moves embeddings and head in
each of them. The peak learning rate of each, one for all parameters, is the one of a grid, in factors of 3, with the
least held-out loss after a third of the steps, of one seed; where that is the lowest or highest, the grid grows.

The largest logit is the maximum of q.k / sqrt(C) over layers, heads and all visible pairs of held-out rows.

Two CPU cores: 14 minutes, shared with other work. Expected of Muon Split, Muon and AdamW, as means over seeds: held-out
loss 5.58, 5.56 and 6.40; largest logit 9.3, 11.1 and 12.5. So logits stay lower than Muon's, at every rate of the grid
too (0.59 to 0.76 times), but they grow all the same; and the loss gains nothing: it is 0.017 higher than Muon's (two
seeds of three), well within what seeds differ by.
"""

import argparse
import functools
import pathlib
import statistics
import time
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm5_jax.core.batch import Batch
from glm5_jax.core.metrics import Mean
from glm5_jax.data import packing, sources
from glm5_jax.model import config as model_config, mla, stacks, transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.primitives import Params, rms_norm, rope_table
from glm5_jax.optim import partition, schedules
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train import stages, state as train_state, step as train_step
from pallas_kernels.lightning_indexer.reference import visible

import record

Run = Callable[[float, int, int], dict[str, Any]]  # (peak learning rate, steps, seed) -> its points and more

OPTIMIZERS: tuple[partition.Optimizer, ...] = ("muon_split", "muon", "adamw")


class Sizes(NamedTuple):
    """`points` measurements over a run of `steps` batches of `rows` rows of `length` tokens."""

    steps: int
    rows: int
    length: int
    points: int
    seeds: int
    rates: tuple[float, ...]
    more_rates: int  # by which the grid may grow
    width: int
    held_out_rows: int


FULL = Sizes(steps=200, rows=4, length=128, points=10, seeds=3, rates=(5e-3, 1.5e-2, 4.5e-2), more_rates=3,
             width=64, held_out_rows=32)
QUICK = Sizes(steps=6, rows=2, length=16, points=2, seeds=2, rates=(3e-3, 9e-3), more_rates=1, width=16,
              held_out_rows=2)


class Point(NamedTuple):
    """A measurement after so many tokens: nats per held-out token and the largest attention logit."""

    tokens: int
    loss: float
    largest_logit: float


class Bench(NamedTuple):
    """What all runs share."""

    sizes: Sizes
    config: ModelConfig
    rows: Batch
    held_out: Batch
    nats: Callable[[Params, Batch], Mean]


def prepare(sizes: Sizes) -> Bench:
    """The model, and the packaged text in rows."""
    config = model_config.tiny(
        hidden_size=sizes.width, intermediate_size=3 * sizes.width, mlp_layer_types=("dense",) * 4,
        num_nextn_predict_layers=0, remat="none")
    train, held_out = (packing.pack(packing.tokenise(part, Tokenizer.packaged()), sizes.length)
                       for part in sources.split(sources.packaged_text()))
    held_out = jax.tree.map(lambda x: x[:sizes.held_out_rows], held_out)
    return Bench(sizes, config, train, held_out, train_step.make_eval_step(config, attention="dense"))


@functools.partial(jax.jit, static_argnums=1)
def largest_logits(params: Params, config: ModelConfig, batch: Batch) -> jax.Array:
    """The largest logit of every layer and head over the keys that a query sees, float32 [L, H]."""
    hidden = transformer.forward(params, config, batch.tokens, positions=batch.positions,
                                 segment_ids=batch.segment_ids, attention="dense", collect=("hidden",)).collected
    rope = rope_table(batch.positions, config.qk_rope_head_dim, config.rope_theta)
    mask_BTS = visible(batch.positions, batch.positions, batch.segment_ids, batch.segment_ids)
    (run,), = stacks.plan(config.layer_kinds)  # the layers are all of one kind
    found = []
    for place, number in np.ndenumerate(run.layers):
        layer = jax.tree.map(lambda x: x[place], params["layers"][run.name])
        attention, u_BTD = layer["attention"], rms_norm(hidden[f"hidden/{number}"], layer["input_norm"],
                                                        config.rms_norm_eps)
        q_BTHC = mla.queries(attention, config, mla.query_latent(attention, config, u_BTD), rope)
        k_BSHC, _ = mla.expand_rows(attention, config, mla.latent_rows(attention, config, u_BTD, rope))
        logits_BHTS = jnp.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC) * config.qk_head_dim ** -0.5
        found.append(jnp.where(mask_BTS[:, None], logits_BHTS, -jnp.inf).max((0, 2, 3)))
    return jnp.stack(found)


def trainer(bench: Bench, name: partition.Optimizer) -> Run:
    """What runs `name`: the points of a run, and the steps that the guard skipped.

    A tenth of the steps warms up, a cosine takes the rest to a tenth of the peak. The rate of each step is put into the
    optimiser's state, whose update is linear in it: another rate compiles nothing anew.
    """
    sizes, config = bench.sizes, bench.config
    options = stages.pretrain(train_step.Options())
    optimizer = optax.chain(partition.build(transformer.param_specs(config), learning_rate=1.0, optimizer=name,
                                            frozen=options.frozen),
                            optax.inject_hyperparams(optax.scale)(step_size=0.0))
    take = train_step.make_train_step(config, optimizer, options)
    per_step = sizes.rows * sizes.length

    def run(peak: float, steps: int, seed: int) -> dict[str, Any]:
        state = train_state.from_params(transformer.init(config, jax.random.key(seed)), optimizer)
        batches = iter(packing.batches(bench.rows, batch_size=sizes.rows, seed=seed))
        rate = schedules.warmup_cosine(peak, warmup=steps // 10, total=steps, final=peak / 10)
        points, skipped = [], 0.0
        for done in range(1, steps + 1):
            state = state.replace(opt_state=optax.tree_utils.tree_set(state.opt_state, step_size=rate(done)))
            state, metrics = take(state, next(batches))
            skipped += sum(float(value.total) for key, value in metrics.items() if key.startswith("skipped/"))
            if done % max(1, sizes.steps // sizes.points) == 0 or done == steps:
                loss = bench.nats(state.params, bench.held_out).value()
                logit = largest_logits(state.params, config, bench.held_out).max()
                points.append(Point(done * per_step, float(loss), float(logit))._asdict())
        return {"learning_rate": peak, "seed": seed, "points": points, "skipped": skipped}

    return run


def search(run: Run, sizes: Sizes) -> list[dict[str, Any]]:
    """Runs of a third of the steps at the rates of the grid, which grows at the end where the best one stands."""
    grid = [run(rate, sizes.steps // 3, 0) for rate in sizes.rates]
    for _ in range(sizes.more_rates):
        grid.sort(key=lambda each: each["learning_rate"])
        best = min(range(len(grid)), key=lambda number: last_loss(grid[number]))
        if 0 < best < len(grid) - 1:
            break
        grid.append(run(grid[best]["learning_rate"] * (3 if best else 1 / 3), sizes.steps // 3, 0))
    return sorted(grid, key=lambda each: each["learning_rate"])


def measure(sizes: Sizes) -> dict[str, Any]:
    """Of each optimiser the grid of one seed, and the runs of all seeds at the rate that is best in it."""
    bench, found = prepare(sizes), {}
    for name in OPTIMIZERS:
        run = trainer(bench, name)
        grid = search(run, sizes)
        best = min(grid, key=last_loss)["learning_rate"]
        found[name] = {"grid": grid, "runs": [run(best, sizes.steps, seed) for seed in range(sizes.seeds)]}
        print(f"{name}: " + ", ".join(f"{each['learning_rate']:g} {last_loss(each):.3f}" for each in grid)
              + f"; at {best:g} " + ", ".join(f"{last_loss(each):.3f}" for each in found[name]["runs"]), flush=True)
    return found


def last_loss(run: dict[str, Any]) -> float:
    return run["points"][-1]["loss"]


def largest(run: dict[str, Any]) -> float:
    return max(point["largest_logit"] for point in run["points"])


def show(results: dict[str, Any]) -> str:
    """The grid, and the course of the runs as means over seeds."""
    runs = {name: found["runs"] for name, found in results.items()}
    mean = lambda name, number, field: statistics.mean(run["points"][number][field] for run in runs[name])
    grid = [[name, run["learning_rate"], last_loss(run), largest(run), run["skipped"]]
            for name, found in results.items() for run in found["grid"]]
    ends = [[name, run["learning_rate"], run["seed"], last_loss(run), run["points"][-1]["largest_logit"], largest(run),
             run["skipped"]] for name in runs for run in runs[name]]
    course = [[point["tokens"], *(mean(name, number, field) for field in ("loss", "largest_logit") for name in runs)]
              for number, point in enumerate(runs["adamw"][0]["points"])]
    return "\n\n".join([
        record.table(["a third of the steps", "learning rate", "loss", "largest logit", "skipped"], grid),
        record.table(["tokens", *(f"loss, {name}" for name in runs), *(f"logit, {name}" for name in runs)], course),
        record.table(["all steps", "learning rate", "seed", "loss", "logit at the end", "largest logit", "skipped"],
                     ends)])


def claims(results: dict[str, Any]) -> list[record.Claim]:
    of = lambda name, value: statistics.mean(value(run) for run in results[name]["runs"])
    logits, losses = ({name: of(name, value) for name in OPTIMIZERS} for value in (largest, last_loss))
    ratio, by_muon = logits["muon_split"] / logits["muon"], losses["muon_split"] - losses["muon"]
    by_adamw = losses["muon_split"] - losses["adamw"]
    return [record.Claim("largest logit, Muon Split over Muon", "below 1", ratio, ratio < 1),
            record.Claim("held-out loss, Muon Split less Muon", "at most 0", by_muon, by_muon <= 0),
            record.Claim("held-out loss, Muon Split less AdamW", "below 0", by_adamw, by_adamw < 0)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Muon Split, Muon and AdamW at equal tokens.")
    parser.add_argument("--quick", action="store_true", help="toy size: proves that it runs, and nothing else")
    parser.add_argument("--out", type=pathlib.Path, default=record.RESULTS)
    options = parser.parse_args(arguments)
    start, sizes = time.perf_counter(), QUICK if options.quick else FULL
    results = measure(sizes)
    found = claims(results)
    print(f"\n{show(results)}\n\n{record.claims_table(found)}")
    path = record.write(options.out, "muon_split", settings=sizes._asdict() | {"quick": options.quick},
                        results=results, claims=found, seconds=time.perf_counter() - start)
    print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
