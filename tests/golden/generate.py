"""Writes tiny random `glm_moe_dsa` checkpoints and what transformers 5.23.0 computes from them (README.md beside this).

    python tests/golden/generate.py [--out DIR] [case ...]

Needs torch, transformers, numpy and safetensors; neither jax nor this project's library. Float32 on one CPU thread,
eager attention, weights drawn by numpy: the same seed gives the same files. A seed is taken only if no decision hangs
by a thread, so that another order of summation cannot flip a selection, a route or a greedy token.
"""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
import transformers
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

from checkpoints import build, Case, CASES, Mtp, mtp_on_disk, on_disk, read, write

INDEX_GAP = 3e-4      # between the last selected and the first rejected key, in deviations of the row's visible scores
ROUTING_GAP = 3e-4    # between the last taken and the first left expert or group
GREEDY_GAP = 1e-2     # between the two largest logits
LATENT_NORM_EPS = 1e-6  # transformers builds both latent norms with its class default
MTP_STEPS = 3
MTP_LOSS_WEIGHT = 0.3
BATCH, LENGTH, NEW_TOKENS = 2, 24, 12


class Ranked(TorchFunctionMode):
    """Records every top-k as (site, scores, indices): the numbers that really decide, not a second computation."""

    def __init__(self):
        super().__init__()
        self.site, self.calls = "", []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            self.calls.append((self.site, args[0].detach(), result.indices))
        return result


@contextlib.contextmanager
def watching(layers: dict[str, torch.nn.Module]) -> Iterator[tuple[dict[str, torch.Tensor], Ranked]]:
    """Records what passes through decoder layers, under the names of `forward(collect=...)`."""
    seen: dict[str, torch.Tensor] = {}
    ranked = Ranked()
    with contextlib.ExitStack() as stack, ranked:
        for i, layer in layers.items():
            def entry(module, args, i=i):
                seen[f"hidden/{i}"] = args[0].detach()

            def attention(module, args, result, i=i):
                seen[f"attention/{i}"] = result[1].detach()

            def router(module, args, result, i=i):
                experts, order = result[2].sort(dim=-1)
                seen[f"router/{i}/experts"] = experts
                seen[f"router/{i}/weights"] = result[1].detach().gather(1, order)

            def site(module, args, i=i):
                ranked.site = f"{type(module).__name__}/{i}"

            hooks = [layer.register_forward_pre_hook(entry), layer.self_attn.register_forward_hook(attention)]
            if layer.self_attn.indexer is not None:
                hooks.append(layer.self_attn.indexer.register_forward_pre_hook(site))
            if isinstance(layer.mlp, glm.GlmMoeDsaMoE):
                hooks += [layer.mlp.gate.register_forward_pre_hook(site), layer.mlp.gate.register_forward_hook(router)]
            for hook in hooks:
                stack.callback(hook.remove)
        yield seen, ranked


def selections(ranked: Ranked) -> dict[str, torch.Tensor]:
    """Index scores, -inf above the diagonal, and the selected visible keys, ascending and then -1."""
    result = {}
    for site, scores, indices in ranked.calls:
        if not site.startswith("GlmMoeDsaIndexer/"):
            continue
        layer = site.partition("/")[2]
        causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        result[f"index_scores/{layer}"] = scores.masked_fill(~causal, -torch.inf)
        length = scores.shape[-1]
        visible = torch.where(indices <= torch.arange(length)[:, None], indices, length).sort(dim=-1).values
        result[f"selected/{layer}"] = torch.where(visible < length, visible, -1)
    return result


def narrowest(ranked: Ranked) -> tuple[float, float]:
    """The smallest index gap, in deviations of a row's visible scores, and the smallest routing gap."""
    index_gap = routing_gap = float("inf")
    for site, scores, indices in ranked.calls:
        k = indices.shape[-1]
        if site.startswith("GlmMoeDsaIndexer/"):
            for t in range(k, scores.shape[1]):
                row = scores[:, t, : t + 1]
                top = row.topk(k + 1).values
                index_gap = min(index_gap, ((top[:, -2] - top[:, -1]) / row.std(dim=-1)).min().item())
        elif scores.ndim == 2 and k < scores.shape[1]:  # the group score, a sum of the best two, has no edge to flip
            top = scores.topk(k + 1).values
            routing_gap = min(routing_gap, (top[:, -2] - top[:, -1]).min().item())
    return index_gap, routing_gap


def inputs(vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """Random tokens and two prompts of unequal length, one below and one above `index_topk`."""
    rng = np.random.default_rng([seed, 1])
    return {"tokens": rng.integers(0, vocab_size, (BATCH, LENGTH)).astype(np.int32),
            "prompts": rng.integers(0, vocab_size, (2, 9)).astype(np.int32),
            "prompt_lengths": np.array([3, 9], np.int32)}


def greedy(model: torch.nn.Module, given: dict[str, np.ndarray]) -> tuple[np.ndarray, float, list[Ranked]]:
    """Greedy continuations without a cache, the narrowest gap, and the records of the last (longest) forwards."""
    rows, gap, records = [], float("inf"), []
    for prompt, length in zip(given["prompts"], given["prompt_lengths"]):
        row = torch.from_numpy(prompt[:length])[None].long()
        for _ in range(NEW_TOKENS):
            with torch.no_grad(), watching(_layers(model)) as (_, ranked):
                top = model(row, use_cache=False).logits[0, -1].topk(2)
            ranked.calls.pop()  # the top-2 above
            gap = min(gap, (top.values[0] - top.values[1]).item())
            row = torch.cat([row, top.indices[None, :1]], dim=1)
        rows.append(row[0, length:].numpy().astype(np.int32))
        records.append(ranked)
    return np.stack(rows), gap, records


def _layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {str(i): layer for i, layer in enumerate(model.model.layers)}


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor, ahead: int) -> torch.Tensor:
    """Mean cross-entropy of row t against token t + ahead."""
    rows = tokens.shape[1] - ahead
    return F.cross_entropy(logits[:, :rows].flatten(0, 1), tokens[:, ahead:].flatten())


def indexer_kl(scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """KL(head-averaged attention || softmax of the scores where attention looks), mean over batch and time."""
    p = attention.mean(dim=1)
    log_q = scores.masked_fill(p == 0, -torch.inf).log_softmax(dim=-1)
    return torch.where(p > 0, p * (p.log() - log_q), 0.0).sum(dim=-1).mean()


def expected(case: Case, model: torch.nn.Module, mtp: Mtp | None, given: dict[str, np.ndarray]
             ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Everything the tests compare, and the narrowest gap of each kind."""
    tokens = torch.from_numpy(given["tokens"]).long()
    model.zero_grad()
    with watching(_layers(model)) as (seen, ranked):
        output = model.model(tokens, use_cache=False)
    hidden = output.last_hidden_state
    logits = model.lm_head(hidden)
    loss = objective = next_token_loss(logits, tokens, 1)
    result = seen | selections(ranked) | {"hidden/final_norm": hidden, "logits": logits, "loss": loss}
    records = [ranked]
    if mtp is not None:
        mtp.zero_grad()
        previous, losses = hidden, []
        for step in range(1, MTP_STEPS + 1):
            with watching({"mtp": mtp.layer}) as (_, ranked):
                previous = mtp(model.model, tokens, previous, step)
            records.append(ranked)
            step_logits = model.lm_head(previous)
            losses.append(next_token_loss(step_logits, tokens, step + 1))
            result |= {f"mtp_hidden/{step}": previous, f"mtp_logits/{step}": step_logits}
        result["mtp_loss"] = sum(losses) / MTP_STEPS
        objective = loss + MTP_LOSS_WEIGHT * result["mtp_loss"]
    for layer in [name.partition("/")[2] for name in result if name.startswith("index_scores/")]:
        result[f"indexer_kl/sparse/{layer}"] = indexer_kl(result[f"index_scores/{layer}"], seen[f"attention/{layer}"])
    result |= dense_kl(model, tokens)
    if case.gradients:
        objective.backward()
        result |= {f"grad/{name}": value for name, value in gradients(model, mtp).items()}
    result["greedy"], greedy_gap, more = greedy(model, given)
    index_gaps, routing_gaps = zip(*map(narrowest, records + more))
    gaps = {"index": min(index_gaps), "routing": min(routing_gaps), "greedy": greedy_gap}
    kept = {name: value for name, value in result.items() if not name.startswith("attention/")}
    return {name: _array(value) for name, value in kept.items()} | given, gaps


def dense_kl(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The warm-up loss of each indexer: every layer attends to all it may see."""
    indexers = [m for m in model.modules() if isinstance(m, glm.GlmMoeDsaIndexer)]
    sparse = indexers[0].index_topk
    for indexer in indexers:
        indexer.index_topk = tokens.shape[1]
    with torch.no_grad(), watching(_layers(model)) as (seen, ranked):
        model.model(tokens, use_cache=False)
    for indexer in indexers:
        indexer.index_topk = sparse
    scores = {name.partition("/")[2]: s for name, s in selections(ranked).items() if name.startswith("index_scores/")}
    return {f"indexer_kl/dense/{layer}": indexer_kl(s, seen[f"attention/{layer}"]) for layer, s in scores.items()}


def gradients(model: torch.nn.Module, mtp: Mtp | None) -> dict[str, torch.Tensor]:
    """The gradient of every checkpoint tensor but the correction biases; zero where torch has none (the indexers)."""
    def of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}

    return on_disk(of(model)) | (mtp_on_disk(model.config.num_hidden_layers, of(mtp)) if mtp is not None else {})


def _array(value: Any) -> np.ndarray:
    array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return array.astype(np.int32 if array.dtype.kind == "i" else np.float32)


def decided(gaps: dict[str, float]) -> bool:
    """Whether no decision hangs by a thread."""
    return gaps["index"] >= INDEX_GAP and gaps["routing"] >= ROUTING_GAP and gaps["greedy"] >= GREEDY_GAP


def make(case: Case, directory: pathlib.Path, first_seed: int = 0) -> tuple[int, dict[str, float]]:
    """Writes the checkpoint and `expected.npz` of the first good seed from `first_seed`; returns the seed and its gaps.

    The values are computed from what transformers reads back, so they belong to the files.
    """
    for seed in range(first_seed, first_seed + 1000):
        model, mtp = build(case, seed)
        given = inputs(model.config.vocab_size, seed)
        values, gaps = expected(case, model, mtp, given)
        if decided(gaps):
            break
    else:
        raise RuntimeError(f"no seed of {first_seed}..{seed} has gaps wide enough; the last had {gaps}")
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    write(directory, case, model, mtp)
    reread, _ = expected(case, read(directory), mtp, given)
    for name in values:
        if not np.array_equal(values[name], reread[name]):
            raise RuntimeError(f"{directory.name}: {name} differs after saving and loading")
    np.savez_compressed(directory / "expected.npz", **reread, latent_norm_eps=np.float64(LATENT_NORM_EPS))
    return seed, gaps


def settle() -> None:
    """One thread, no chatter: sums are made in one order on every machine."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}; all if none is named")
    arguments = parser.parse_args()
    settle()
    for name in arguments.cases or CASES:
        seed, gaps = make(CASES[name], arguments.out / name)
        size = sum(file.stat().st_size for file in (arguments.out / name).iterdir())
        print(f"{name}: seed {seed}, {size / 1024:.0f} KiB, narrowest "
              + ", ".join(f"{kind} gap {gap:.1e}" for kind, gap in gaps.items()))


if __name__ == "__main__":
    main()
