"""Compares this library with transformers live: `make parity`, or `python tests/golden/parity.py [--seed N]`.

First every golden case is made again and compared with the files in the tree. Then fresh random models, kept nowhere,
go through both libraries, in both directions. Prints one line per check; exits with 1 if any failed. Needs torch,
transformers and this library.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch

from checkpoints import Case, CASES, read, read_tensors
from generate import make, MTP_STEPS, settle
import glm5_jax as glm5

HERE = pathlib.Path(__file__).parent
REMADE = 1e-5      # between two makings of a golden case
TOLERANCE = 2e-4   # between the two libraries, on logits of order 1 to 10
HIDDEN_TOLERANCE = 2e-3  # on what is inside, whose size grows with depth
COLLECT = ("hidden", "index_scores", "selected", "router")

FRESH = {
    "odd sizes": Case(dict(
        vocab_size=61, hidden_size=27, intermediate_size=23, moe_intermediate_size=7, num_attention_heads=3,
        num_key_value_heads=3, n_routed_experts=5, num_experts_per_tok=3, q_lora_rank=13, kv_lora_rank=11,
        qk_rope_head_dim=2, qk_nope_head_dim=5, v_head_dim=9, index_topk=3, index_head_dim=5, index_n_heads=7,
        routed_scaling_factor=1.7), gradients=False),
    "deep sharing": Case(dict(
        num_hidden_layers=12, first_k_dense_replace=2, index_topk_freq=3, index_skip_topk_offset=2, index_topk=9),
        gradients=False),
    "sharing by default offset": Case(dict(
        num_hidden_layers=7, index_topk_freq=2, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        gradients=False, json_edits=dict(indexer_types=None)),
    "mixed layers": Case(dict(
        num_hidden_layers=6, indexer_types=["full", "shared", "full", "full", "shared", "shared"],
        mlp_layer_types=["sparse", "dense", "sparse", "dense", "dense", "sparse"], tie_word_embeddings=True,
        attention_bias=True), gradients=False),
    "three groups and bias": Case(dict(
        n_routed_experts=9, n_group=3, topk_group=2, num_experts_per_tok=5, attention_bias=True, n_shared_experts=3),
        correction_bias_mean=-0.8, gradients=False),
    "all dense": Case(dict(first_k_dense_replace=3), gradients=False),
    "no dense, one key, one expert": Case(dict(
        first_k_dense_replace=0, index_topk=1, num_experts_per_tok=1), gradients=False),
    "all keys": Case(dict(index_topk=64), gradients=False),
    "mtp, tied, grouped, sharing": Case(dict(
        num_nextn_predict_layers=1, tie_word_embeddings=True, n_group=2, topk_group=1, num_hidden_layers=4,
        index_topk_freq=2, index_skip_topk_offset=1), gradients=False),
    "bf16 shards": Case(dict(num_hidden_layers=4, v_head_dim=11), bf16_shards=True, gradients=False),
}


class Report:
    """Prints each check as it is made and remembers whether one failed."""

    def __init__(self):
        self.failed = 0

    def check(self, ok: bool, what: str, found: str = "") -> None:
        self.failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {what} {found}".rstrip(), flush=True)

    def close(self, what: str, actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float) -> None:
        """One line for a family of arrays: the largest difference, and where."""
        if actual.keys() != expected.keys():
            return self.check(False, what, f"names differ: {sorted(actual.keys() ^ expected.keys())[:5]}")
        worst, where = 0.0, ""
        for name, truth in expected.items():
            value, truth = np.asarray(actual[name]), np.asarray(truth)
            with np.errstate(invalid="ignore"):
                gap = np.where(value == truth, 0.0, np.abs(value - truth)) if value.shape == truth.shape else np.inf
            gap = float(np.max(np.nan_to_num(gap, nan=np.inf, posinf=np.inf)))
            if gap > worst:
                worst, where = gap, name
        self.check(worst <= atol, what, f"differ by {worst:.1e}{' in ' * bool(where)}{where}")

    def same(self, what: str, actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
        self.close(what, actual, expected, 0.0)


def expected_values(directory: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(directory / "expected.npz") as file:
        return dict(file)


def split(values: dict[str, np.ndarray], *prefixes: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in values.items() if name.startswith(prefixes)}


def integers(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in values.items() if value.dtype.kind == "i"}


def remake(report: Report, name: str, scratch: pathlib.Path) -> None:
    """Makes a golden case again and compares it with the files in the tree."""
    make(CASES[name], scratch)
    same_config = (scratch / "config.json").read_text() == (HERE / name / "config.json").read_text()
    report.check(same_config, f"golden {name}: config.json made again")
    new, old = (({n: t.float().numpy() for n, t in read_tensors(d).items()}) for d in (scratch, HERE / name))
    report.same(f"golden {name}: weights made again", new, old)
    new, old = expected_values(scratch), expected_values(HERE / name)
    report.same(f"golden {name}: selections, routes and tokens made again", integers(new), integers(old))
    floats = [{n: v for n, v in values.items() if v.dtype.kind == "f"} for values in (new, old)]
    report.close(f"golden {name}: values made again", *floats, REMADE)


def import_check(report: Report, name: str, directory: pathlib.Path) -> None:
    """What transformers computed from the directory, against what this library computes, on both attention paths."""
    expected = expected_values(directory)
    eps = float(expected["latent_norm_eps"])
    config, params = glm5.load_hf(directory, dtype=jnp.float32, latent_norm_eps=eps)
    # transformers keeps at most as many keys as there are; ours are always index_topk wide, filled with -1.
    expected |= {key: np.pad(value, ((0, 0), (0, 0), (0, config.index_topk - value.shape[-1])), constant_values=-1)
                 for key, value in split(expected, "selected/").items()}
    config = dataclasses.replace(config, dtype="float32")
    steps = MTP_STEPS if "mtp_loss" in expected else 0
    for path, changes in (("dense", {}), ("gathered", dict(dense_attention_max_len=0, query_chunk=10))):
        run = jax.jit(functools.partial(
            glm5.forward, config=dataclasses.replace(config, **changes), mtp_steps=steps, collect=COLLECT))
        output = run(params, tokens=expected["tokens"])
        found = {name: np.array(value) for name, value in output.collected.items()}
        found |= {"logits": output.logits}
        for step in range(1, steps + 1):
            rows = expected[f"mtp_logits/{step}"].shape[1]
            found[f"mtp_logits/{step}"] = output.mtp_logits[step - 1, :, :rows]
            found[f"mtp_hidden/{step}"] = output.mtp_hidden[step - 1, :, :rows]
        for experts in [name for name in found if name.endswith("/experts")]:
            weights = experts.replace("experts", "weights")
            order = np.argsort(found[experts], axis=-1)
            found[experts] = np.take_along_axis(found[experts], order, -1)
            found[weights] = np.take_along_axis(found[weights], order, -1)
        known = {name: value for name, value in found.items() if name in expected}
        label = f"fresh {name}, {path}:"
        report.same(f"{label} selections and experts", *(
            integers(split(values, "selected/", "router/")) for values in (known, expected)))
        report.close(f"{label} logits", *(split(values, "logits") for values in (known, expected)), TOLERANCE)
        report.close(f"{label} hidden, index scores and router weights", *(
            {n: v for n, v in split(values, "hidden/", "index_scores/", "router/").items() if v.dtype.kind == "f"}
            for values in (known, expected)), HIDDEN_TOLERANCE)
        if steps:
            report.close(f"{label} mtp", *(
                split(values, "mtp_logits/", "mtp_hidden/") for values in (known, expected)), TOLERANCE)
    result = glm5.generate(params, config, expected["prompts"], prompt_lengths=expected["prompt_lengths"],
                           max_new_tokens=expected["greedy"].shape[1], temperature=0.0)
    report.same(f"fresh {name}: greedy tokens", {"greedy": result.tokens}, {"greedy": expected["greedy"]})


def export_check(report: Report, name: str, directory: pathlib.Path, scratch: pathlib.Path) -> None:
    """transformers reads what this library writes: a loaded checkpoint, then new weights of its own."""
    expected = expected_values(directory)
    tokens = torch.from_numpy(expected["tokens"]).long()
    config, params = glm5.load_hf(directory)
    glm5.save_hf(scratch / "copy", config, params)
    with torch.no_grad():
        logits = read(scratch / "copy")(tokens).logits.numpy()
    report.close(f"fresh {name}: transformers' logits from our copy", {"": logits}, {"": expected["logits"]}, REMADE)

    config = dataclasses.replace(
        config, dtype="float32", param_dtype="float32", initializer_range=0.25, latent_norm_eps=1e-6)
    params = glm5.init(config, jax.random.key(0))
    glm5.save_hf(scratch / "own", config, params)
    with torch.no_grad():
        logits = read(scratch / "own")(tokens).logits.numpy()
    ours = jax.jit(functools.partial(glm5.forward, config=config))(
        params, tokens=expected["tokens"]).logits
    report.close(f"fresh {name}: transformers' logits from our weights", {"": logits}, {"": ours}, TOLERANCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1000, help="where the search for fresh models starts")
    arguments = parser.parse_args()
    settle()
    report = Report()
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
        scratch = pathlib.Path(folder)
        for name in CASES:
            remake(report, name, scratch / name)
        for name, case in FRESH.items():
            directory = scratch / name.replace(" ", "-")
            seed, _ = make(case, directory, arguments.seed)
            print(f"     fresh {name}: seed {seed}")
            import_check(report, name, directory)
            export_check(report, name, directory, directory)
    print(f"{report.failed} checks failed" if report.failed else "all checks passed")
    sys.exit(bool(report.failed))


if __name__ == "__main__":
    main()
