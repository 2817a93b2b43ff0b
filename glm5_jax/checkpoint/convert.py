"""Checkpoints from the command line: import, export, verify, inspect.

    python -m glm5_jax.checkpoint.convert import  GLM-5-FP8 store          # released layout or FP8 -> Orbax
    python -m glm5_jax.checkpoint.convert export  runs/tiny exported       # Orbax or a run -> released layout
    python -m glm5_jax.checkpoint.convert export  GLM-5 GLM-5-FP8 --fp8    # quantised
    python -m glm5_jax.checkpoint.convert verify  GLM-5 store --text README.md
    python -m glm5_jax.checkpoint.convert inspect GLM-5                    # from the headers alone
"""

import argparse
import pathlib
import shutil
import sys
from typing import Callable, Sequence

import numpy as np

from glm5_jax.checkpoint import atomic, hf_config, inventory, released, safetensors_io, sources, verify
from glm5_jax.checkpoint.errors import CheckpointError
from glm5_jax.checkpoint.store import Store
from glm5_jax.text.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 where `verify` finds a difference, 2 for a fault of the input."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except (OSError, ValueError) as error:  # CheckpointError, and what libraries say of broken files and text
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2


def import_(options: argparse.Namespace) -> None:
    """Any checkpoint into a store of Orbax checkpoints."""
    target = pathlib.Path(options.target).expanduser().resolve()
    source = sources.open_source(options.source, dtype=options.dtype, step=options.step, progress=True)
    with atomic.replacing(target) as partial:
        if target.exists() and any(target.iterdir()):
            raise CheckpointError(f"{target}: expected a new or empty directory, found files; choose another place")
        with Store(partial, about=hf_config.about(source.config, source.fields)) as store:
            store.save(0, {"params": source.load()}, None)
        (partial / sources.COMPANIONS).mkdir()
        for file in source.companions:
            shutil.copy2(file, partial / sources.COMPANIONS)
    print(f"{target}: checkpoint 0, the parameters of {source.path}")


def export(options: argparse.Namespace) -> None:
    """Any checkpoint into the released layout."""
    if not options.shard_gb > 0:
        raise CheckpointError(f"--shard-gb: expected more than 0, found {options.shard_gb}")
    source = sources.open_source(options.source, dtype=options.dtype, step=options.step, progress=True)
    errors = released.save_hf(options.target, source.config, source.load(), dtype=options.dtype, fp8=options.fp8,
                              fields=source.fields, companions=source.companions, progress=True,
                              shard_bytes=int(options.shard_gb * 2**30))
    for name, error in sorted(errors.items(), key=lambda item: -item[1].relative_rms)[:10]:
        print(f"{name}: FP8 error {error.relative_rms:.2%} (root mean square), at most {error.max_abs:.3e}")
    if errors:
        mean = np.mean([error.relative_rms for error in errors.values()])
        print(f"{len(errors)} tensors quantised, mean error {mean:.2%}; the ten above are the worst")
    print(f"{options.target}: written from {source.path}")


def verify_(options: argparse.Namespace) -> int:
    """Two checkpoints against each other."""
    one, other = (sources.open_source(path) for path in (options.one, options.other))
    verify.check_same_model(one, other)
    tokens = _tokens(options, one, other)
    differ = verify.weights(one, other, progress=True)
    for found in sorted(differ, key=lambda found: -found.relative_rms)[:10]:
        print(f"{found.name}: differs by at most {found.max_abs:.3e}, {found.relative_rms:.2e} relative")
    print(f"weights: {len(differ)} tensors differ" if differ else "weights: the same, every value")
    answers = verify.answers(one, other, tokens, tolerance=options.tolerance)
    print(f"answers: {answers}")
    # A text does not reach every weight: experts that no token chose, the MTP layer, an indexer of a short text.
    worst = max((found.relative_rms for found in differ), default=0.0)
    same = not differ or answers.max_kl <= options.max_kl and worst <= options.max_weight_error
    print("verified" if same else f"not the same: KL up to {answers.max_kl:.3e} nats ({options.max_kl:g} allowed), a "
                                  f"tensor off by {worst:.2e} ({options.max_weight_error:g} allowed)")
    return 0 if same else 1


def _tokens(options: argparse.Namespace, *checkpoints: sources.Source) -> np.ndarray:
    """The text as token ids: by the tokenizer asked for, else the checkpoint's own, else the packaged one."""
    own = [file for source in checkpoints for file in source.companions if file.name == "tokenizer.json"]
    named = options.tokenizer or (own[0] if own else None)
    tokenizer = Tokenizer.packaged() if named is None else Tokenizer.load(named)
    text = pathlib.Path(options.text).read_text(encoding="utf-8") if options.text else __doc__ or ""
    tokens = np.asarray(tokenizer.encode(text)[:options.tokens], np.int32)
    size = checkpoints[0].config.vocab_size
    if not len(tokens) or tokens.max() >= size:
        raise CheckpointError(f"text: expected token ids below vocab_size = {size}, found "
                              f"{tokens.max() if len(tokens) else 'no token'}; name the model's --tokenizer")
    return tokens


def inspect(options: argparse.Namespace) -> None:
    """The table of a checkpoint, read from headers alone."""
    source = sources.open_source(options.source, step=options.step)
    mtp_layer = source.config.num_hidden_layers if source.config.num_nextn_predict_layers else None
    print(f"{source.path}: {source.config.num_hidden_layers} layers, {source.config.n_routed_experts} experts, width "
          f"{source.config.hidden_size}, vocabulary {source.config.vocab_size}")
    print(inventory.table(inventory.rows(source.arrays, mtp_layer=mtp_layer)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m glm5_jax.checkpoint.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable, *positional: str, converts: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        for argument in positional:
            command.add_argument(argument, type=str)
        if name != "verify":
            command.add_argument("--step", type=int, help="which checkpoint of a store; default the newest")
        if converts:
            command.add_argument("--dtype", choices=DTYPES, help="convert to; default as stored")
        return command

    add("import", import_, "source", "target", converts=True)
    exporting = add("export", export, "source", "target", converts=True)
    exporting.add_argument("--fp8", action="store_true", help="quantise, in the form of the FP8 release")
    exporting.add_argument("--shard-gb", type=float, default=safetensors_io.SHARD_BYTES / 2**30,
                           help="size of a file; default %(default)g")
    verifying = add("verify", verify_, "one", "other")
    verifying.add_argument("--text", help="file whose text both models read; default this help")
    verifying.add_argument("--tokens", type=int, default=256, help="of it, how many tokens; default %(default)s")
    verifying.add_argument("--tokenizer", help="tokenizer.json; default the checkpoint's, else the packaged one")
    verifying.add_argument("--max-kl", type=float, default=1e-6,
                           help="the largest KL, in nats, at which differing weights pass; default %(default)g")
    verifying.add_argument("--max-weight-error", type=float, default=0.05,
                           help="the largest relative difference of a tensor that passes; FP8 has 0.03; default "
                                "%(default)g")
    verifying.add_argument("--tolerance", type=float, default=1e-5,
                           help="relative difference from which a layer counts as different; default %(default)g")
    add("inspect", inspect, "source")
    return parser


if __name__ == "__main__":
    sys.exit(main())
