"""The model beside transformers, and sparse beside dense attention: ratios within one run.

    pip install -e '.[parity]'            (Python 3.11; or `make parity`, then .venv-parity/bin/python)
    python benchmarks/model.py            (`--parts attention` needs no torch)

**Beside transformers**: `tiny` and `small` with the same random weights on both sides, float32, all cores this process
may use, one side after the other in every round. Ours is compiled by XLA; theirs is eager torch as `from_pretrained`
gives it. Logits, decoded tokens, loss and norm of the gradient are compared before anything is timed. All lengths are
below `dense_attention_max_len`, so both sides select keys with the indexer and then attend densely under its mask.

- prefill: fills a cache, gives the logits of the last position
- training step: forward, backward, clip to norm 1, AdamW (theirs fused); no auxiliary losses, the indexer frozen
  (transformers gives it no gradient); ours with `remat="full"` as in the presets and "none", theirs without checkpoints
- decode: one token at a time over a cache, fed tokens fixed beforehand; ours a compiled loop as `generate` has it,
  theirs a Python loop over the model

**Sparse against dense attention**: see attention.py.

Two CPU cores and 16 GB, about half an hour: two minutes for `tiny`, the rest for `small` and long attention. Aims:
prefill and training step as fast as transformers, decode twice as fast. Expected for `tiny`: 1.8x, 1.1x, and 15x and 5x
(batch 1 and 8). Writes
benchmarks/results/model-<date>-<device>.json.
"""

import argparse
import functools
import pathlib
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import glm5_jax as glm5
from glm5_jax import ModelConfig
from glm5_jax.core.batch import Batch
from glm5_jax.optim import partition
from glm5_jax.train import state, step

import attention
import measure
from measure import Job
from peer import Peer

PARTS = ("transformers", "attention")
LEARNING_RATE, MAX_GRAD_NORM = 1e-9, 1.0  # so small that the weights stay the same, round after round
REMATS = ("full", "none")


class Sizes(NamedTuple):
    """[batch, length] of prefill and training step; decoding starts after `prompt` tokens and adds `new`."""

    prefill: tuple[int, int]
    train: tuple[int, int]
    prompt: int
    new: int
    batches: tuple[int, ...] = (1, 8)


SIZES = {"tiny": Sizes((4, 512), (4, 512), 256, 64), "small": Sizes((1, 1024), (1, 512), 256, 32)}
# Largest differences: of logits in their deviation, of tokens as a share, of loss and norm in their own size.
AGREEMENT = {"logits_at_full_length": 1e-3, "logits": 1e-3, "decoded_tokens": 0.01, "loss": 1e-3, "gradient_norm": 1e-2}
AIMS = {"prefill": 1.0, "training step": 1.0, "decode": 2.0}


def preset(name: str) -> ModelConfig:
    """The preset without what transformers does not have: the MTP layer and an epsilon of its own."""
    return getattr(glm5, name)(num_nextn_predict_layers=0, latent_norm_eps=1e-6)


def tokens_of(config: ModelConfig, batch: int, length: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=(1, 3))
def prefill(params: Any, config: ModelConfig, tokens_BT: jax.Array, room: int) -> tuple[jax.Array, glm5.Cache]:
    """Logits of the last position [B, V], and a cache of `room` slots filled with the tokens."""
    output = glm5.forward(params, config, tokens_BT, cache=glm5.init_cache(config, len(tokens_BT), room))
    return glm5.unembed(params, config, output.hidden[:, -1]), output.cache


@functools.partial(jax.jit, static_argnums=1)
def decode(params: Any, config: ModelConfig, cache: glm5.Cache, forced_BN: jax.Array) -> jax.Array:
    """The most likely token [B, N] after each of the forced ones, fed one by one."""
    def one(cache: glm5.Cache, token_B: jax.Array) -> tuple[glm5.Cache, jax.Array]:
        output = glm5.forward(params, config, token_B[:, None], cache=cache)
        return output.cache, output.logits[:, 0].argmax(-1)

    return jax.lax.scan(one, cache, forced_BN.T)[1].T


def trainer(config: ModelConfig, params: Any, tokens_BT: jax.Array) -> Callable[[], dict[str, Any]]:
    """A training step on the same tokens every time, from a copy of `params` on; returns its metrics."""
    optimizer = partition.build(glm5.param_specs(config), learning_rate=LEARNING_RATE, optimizer="adamw",
                                frozen=("indexer",))
    options = step.Options(indexer_loss=None, balance_weight=0.0, router_bias_rate=0.0, max_grad_norm=MAX_GRAD_NORM)
    train_step = step.make_train_step(config, optimizer, options)
    held = [state.from_params(jax.tree.map(jnp.copy, params), optimizer)]
    steps = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    batch = Batch(tokens_BT, jnp.roll(tokens_BT, -1, 1), (steps < steps[:, -1:]).astype(jnp.float32),
                  jnp.ones_like(tokens_BT), steps)

    def run() -> dict[str, Any]:
        held[0], metrics = train_step(held[0], batch)
        return metrics

    return run


def ours(config: ModelConfig, params: Any, sizes: Sizes) -> dict[str, dict[str, Job]]:
    """Our side of every workload; of the training step one job for each way to rematerialise."""
    tokens = tokens_of(config, *sizes.prefill)
    work = {"prefill": {"ours": Job(lambda: prefill(params, config, tokens, sizes.prefill[1]))}}
    work["training step"] = {f"ours, remat {remat}": Job(
        trainer(config.replace(remat=remat), params, tokens_of(config, *sizes.train))) for remat in REMATS}
    for batch in sizes.batches:
        tokens_BT = tokens_of(config, batch, sizes.prompt + sizes.new)
        cache = prefill(params, config, tokens_BT[:, :sizes.prompt], sizes.prompt + sizes.new)[1]
        work[f"decode, batch {batch}"] = {"ours": Job(functools.partial(
            decode, params, config, cache, tokens_BT[:, sizes.prompt:]))}
    return work


def theirs(config: ModelConfig, peer: Peer, sizes: Sizes) -> dict[str, Job]:
    """The other side of every workload of `ours`."""
    tokens = peer.tokens(tokens_of(config, *sizes.prefill))
    trained = peer.tokens(tokens_of(config, *sizes.train))
    work = {"prefill": Job(lambda: peer.prefill(tokens)),
            "training step": Job(lambda: peer.train_step(trained, LEARNING_RATE, MAX_GRAD_NORM))}
    for batch in sizes.batches:
        whole = peer.tokens(tokens_of(config, batch, sizes.prompt + sizes.new))
        cache = peer.prefill(whole[:, :sizes.prompt])[1]
        work[f"decode, batch {batch}"] = Job(functools.partial(peer.decode, forced=whole[:, sizes.prompt:]),
                                             lambda cache=cache: (peer.copied(cache),))
    return work


def count(workload: str, sizes: Sizes) -> int:
    """Tokens of one turn."""
    if workload.startswith("decode"):
        return int(workload.split()[-1]) * sizes.new
    rows, length = sizes.prefill if workload == "prefill" else sizes.train
    return rows * length


def agreement(config: ModelConfig, params: Any, peer: Peer, sizes: Sizes, experts: str | None) -> dict[str, float]:
    """How near both sides are. Raises SystemExit where they do not compute the same.

    A random indexer of few heads scores many keys exactly 0, and which of those torch selects is left to chance: at
    full length the logits then differ from the first such row on. So at full length logits are compared with 32
    indexer heads, of which some always speak, in the median over positions; of the preset itself logits and decoded
    tokens are compared on as many tokens as are selected, and loss and gradient at full length.
    """
    many = config.replace(index_n_heads=32)
    many_params = glm5.init(many, jax.random.key(0))
    tokens = tokens_of(many, *sizes.train)
    long_mine = np.asarray(glm5.forward(many_params, many, tokens).logits)
    judge = Peer(many, many_params, measure.threads(), experts)
    long_other = judge.logits(judge.tokens(tokens))
    tokens = tokens_of(config, 2, config.index_topk)
    mine, other = np.asarray(glm5.forward(params, config, tokens).logits), peer.logits(peer.tokens(tokens))
    prompt, forced = jnp.split(tokens, 2, 1)
    next_mine = decode(params, config, prefill(params, config, prompt, tokens.shape[1])[1], forced)
    next_other = peer.decode(peer.prefill(peer.tokens(prompt))[1], peer.tokens(forced)).numpy()

    tokens = tokens_of(config, *sizes.train)
    metrics = {name: float(metric.total / metric.count) for name, metric in trainer(config, params, tokens)().items()}
    loss, norm = peer.train_step(peer.tokens(tokens), LEARNING_RATE, MAX_GRAD_NORM)
    apart = np.abs(long_mine - long_other).max(-1)  # of thousands of rows some few are decided by rounding
    found = {"logits_at_full_length": float(np.median(apart) / long_other.std()),
             "logits": float(np.abs(mine - other).max() / other.std()),
             "decoded_tokens": float((np.asarray(next_mine) != next_other).mean()),
             "loss": abs(metrics["lm_loss"] - loss) / loss, "gradient_norm": abs(metrics["grad_norm"] - norm) / norm}
    for name, limit in AGREEMENT.items():
        if not found[name] <= limit:
            raise SystemExit(f"{name}: expected a difference of at most {limit}, found {found[name]:.1e}; nothing was "
                             f"timed: {found}")
    return found


def beside_transformers(name: str, rounds: int, experts: str | None) -> dict[str, Any]:
    """Agreement and speeds of one preset; prints a line for each workload and way."""
    config, sizes = preset(name), SIZES[name]
    params = glm5.init(config, jax.random.key(0))
    peer = Peer(config, params, measure.threads(), experts)
    agreed = agreement(config, params, peer, sizes, experts)
    print(f"{name}: transformers with {peer.implementations}; differences "
          + ", ".join(f"{what} {value:.1e}" for what, value in agreed.items()))
    others, speeds = theirs(config, peer, sizes), {}
    for workload, jobs in ours(config, params, sizes).items():
        seconds = measure.taking_turns({"transformers": others[workload]} | jobs, rounds)
        speeds[workload] = measure.speed(seconds, "transformers")
        for side, row in speeds[workload].items():
            row["tokens_per_second"] = count(workload, sizes) / row["seconds"]
            print(f"  {workload:16} {side:18} {row['tokens_per_second']:9,.0f} tokens/s  {row['ratio']:5.2f}x  "
                  f"({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f}; aim {AIMS[workload.split(',')[0]]:g}x)",
                  flush=True)
    return {"sizes": sizes._asdict(), "remat_of_preset": config.remat, "transformers": peer.implementations,
            "agreement": agreed, "workloads": speeds}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The model beside transformers, sparse beside dense attention.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--presets", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--experts", choices=("eager", "batched_mm", "grouped_mm"),
                        help="transformers' implementation of the experts (default: its own choice)")
    parser.add_argument("--lengths", nargs="+", type=int, default=attention.LENGTHS)
    parser.add_argument("--rounds", type=int, default=7, help="of the comparison with transformers")
    parser.add_argument("--attention-rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    packages = ("torch", "transformers") if "transformers" in options.parts else ()
    record = measure.surroundings(*packages) | {"dtype": "float32", "rounds": options.rounds}
    print(", ".join(f"{name} {value}" for name, value in (record | record["versions"]).items() if name != "versions"))
    if "transformers" in options.parts:
        record["beside_transformers"] = {
            name: beside_transformers(name, options.rounds, options.experts) for name in options.presets}
    if "attention" in options.parts:
        record["attention"] = attention.measured(glm5.small(), options.lengths, options.attention_rounds)
    print(f"Written to {measure.write(options.out, 'model', record)}")


if __name__ == "__main__":
    main()
