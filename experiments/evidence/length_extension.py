"""Length extension: a model trained at 512 tokens looks for needles at 4,096, before and after mid-training there.

    python experiments/evidence/length_extension.py            (`--quick` runs all of it at toy size)

A model of two layers learns to find needles with dense attention in rows of at most 512 tokens, on a rotary base of
1e4; then come the stages of mid-training, a few steps each on longer rows, on a base of 1e6. GLM-5 report, section 2.3
and appendix A; GLM-4.5 report, section 2.4 (the base). A needle is a key with a value, among 15 others, asked for at
the end of the row: 256 of them at 512 and at 4,096 tokens.

Beside it: the model trained at 512 with the new base and no further training.

Two CPU cores: 21 minutes on a machine shared with some twenty other processes; not timed alone. Expected: trained at
512, 1.00 of the needles at 512 and 0.41 of those at 4,096 tokens are found; after the stages 0.99 and 0.99. To bear in
mind: one seed; and the new base does most of it without any training, 0.99 and 0.88; the stages do the rest.
"""

import argparse
import pathlib
import time
from typing import Any, NamedTuple

import recall
import record
from record import Claim
import walk
from walk import Leg


class Sizes(NamedTuple):
    """The legs from `first` on extend what the ones before have trained; `rows` rows of each length are tested."""

    words: int
    legs: tuple[Leg, ...]
    first: int
    lengths: tuple[int, ...]
    rows: int
    seed: int = 0

    @property
    def facts(self) -> int:
        return self.legs[-1].facts


BASE, LONG_BASE = 1e4, 1e6
FULL = Sizes(words=32, first=2, lengths=(512, 4096), rows=16, legs=(
    Leg("pretrain_64", "pretrain", 200, 64, 64, 4, 16, 1e-2, 3e-3, BASE),
    Leg("pretrain_512", "pretrain", 60, 8, 512, 16, 32, 5e-3, 1e-3, BASE),
    Leg("midtrain_2048", "midtrain", 10, 2, 2048, 16, 32, 1e-3, 1e-3, LONG_BASE),
    Leg("midtrain_4096", "midtrain", 10, 2, 4096, 16, 32, 1e-3, 3e-4, LONG_BASE)))
QUICK = Sizes(words=4, first=1, lengths=(16, 32), rows=2, legs=(
    Leg("pretrain_16", "pretrain", 2, 2, 16, 2, 2, 1e-3, 1e-3, BASE),
    Leg("midtrain_32", "midtrain", 2, 2, 32, 2, 2, 1e-3, 1e-3, LONG_BASE)))


def measure(sizes: Sizes) -> dict[str, Any]:
    """The answers at every length after pre-training, on the new base alone, and after every stage of mid-training."""
    words, config = recall.words(sizes.words), walk.model(sizes.words)
    params = walk.through(sizes.legs, config, words, sizes.seed)
    needles = {length: recall.needles(words, 0, sizes.rows, length, facts=sizes.facts) for length in sizes.lengths}
    before = sizes.legs[sizes.first - 1]
    models = [(before.name, before.name, before.rope_theta),
              (f"{before.name}, new base alone", before.name, LONG_BASE),
              *((leg.name, leg.name, leg.rope_theta) for leg in sizes.legs[sizes.first:])]
    found = []
    for name, leg, theta in models:
        for length, tasks in needles.items():
            answers = recall.answers(params[leg], config.replace(rope_theta=theta), words, tasks,
                                     rows=max(1, 4096 // length), attention="dense")
            found.append({"model": name, "rope_theta": theta, "length": length, **answers._asdict()})
    return {"needles_at_each_length": sizes.rows * sizes.facts, "models": found}


def judge(found: dict[str, Any], sizes: Sizes) -> list[Claim]:
    short, long = sizes.lengths[0], sizes.lengths[-1]
    at = {(row["model"], row["length"]): row["found"] for row in found["models"]}
    before, after = sizes.legs[sizes.first - 1].name, sizes.legs[-1].name
    return [
        Claim(f"trained at {short}: needles found at {short}", ">= 0.9", at[before, short], at[before, short] >= 0.9),
        Claim(f"trained at {short}: needles found at {long}", "< 0.5", at[before, long], at[before, long] < 0.5),
        Claim(f"after the stages: needles found at {long}", ">= 0.9", at[after, long], at[after, long] >= 0.9),
        Claim(f"after the stages: needles found at {short}", ">= 0.9", at[after, short], at[after, short] >= 0.9)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Needles beyond the length of training.")
    parser.add_argument("--quick", action="store_true", help="toy size; the claims do not hold there")
    parser.add_argument("--out", type=pathlib.Path, default=record.RESULTS)
    options = parser.parse_args(arguments)
    sizes, start = QUICK if options.quick else FULL, time.perf_counter()
    found = measure(sizes)
    print(record.table(["model", "rotary base", "length", "needles found", "nats per answer"], [
        [row["model"], row["rope_theta"], row["length"], row["found"], row["answer_nats"]] for row in found["models"]]))
    claims = judge(found, sizes)
    print(record.claims_table(claims))
    settings = sizes._asdict() | {"legs": [leg._asdict() for leg in sizes.legs], "quick": options.quick}
    path = record.write(options.out, "length_extension", settings=settings, results=found, claims=claims,
                        seconds=time.perf_counter() - start)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
