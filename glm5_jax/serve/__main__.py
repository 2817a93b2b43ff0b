"""A checkpoint behind the APIs of OpenAI and Anthropic.

    python -m glm5_jax.serve --checkpoint runs/glm5-tiny/hf --port 8000

It listens on this machine alone unless another --host is named, and prints where, and the administrator's token. Ctrl-C
or SIGTERM ends it: calls under way are called back and their streams end.
"""

import argparse
import os
import pathlib
import secrets
import socket
import sys
from collections.abc import Sequence

from glm5_jax.checkpoint.released import load_hf
from glm5_jax.infer.engine import Engine
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.gateway import Gateway
from glm5_jax.serve.http import listening, Server, url
from glm5_jax.text.tokenizer import Tokenizer

LONGEST = 4096  # tokens of a context where --max-len is not given: the cache is made for it at the start


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; returns the exit code: 0, or 2 for a fault of the input."""
    options = _parser().parse_args(arguments)
    try:
        with listening(options.host, options.port) as taken:  # first: what comes next may take long
            serve(options, taken)
    except KeyboardInterrupt:
        pass  # raised anew by the server once it has stopped
    except (OSError, ValueError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    return 0


def serve(options: argparse.Namespace, taken: socket.socket) -> None:
    """Serves at a socket that listens; raises OSError or ValueError for what cannot be served."""
    engine, tokenizer = loaded(options)
    with Driver(engine) as driver:
        model = options.model or pathlib.Path(options.checkpoint).resolve().name
        gateway = Gateway(driver, tokenizer, model=model, limit=options.limit)
        token = options.token or secrets.token_urlsafe(32)
        print(f"model  {model}, {options.slots} slots of {engine.max_len} tokens\n"
              f"at     {url(taken)}\n"
              f"token  {token}", flush=True)
        Server(gateway, token, lambda: gauges(driver, options.slots)).run(sockets=[taken])


def loaded(options: argparse.Namespace) -> tuple[Engine, Tokenizer]:
    """The engine and the tokenizer of the checkpoint; raises OSError or ValueError for what cannot be served."""
    tokenizer = Tokenizer.load(options.tokenizer or options.checkpoint)
    config, params = load_hf(options.checkpoint, dtype=options.dtype, progress=True)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"tokenizer: expected at most the {config.vocab_size} entries of the model, found "
                         f"{tokenizer.vocab_size}; name the model's own --tokenizer")
    max_len = options.max_len or min(config.max_position_embeddings, LONGEST)
    if max_len > config.max_position_embeddings:
        raise ValueError(f"max-len: expected at most the model's {config.max_position_embeddings}, found {max_len}")
    engine = Engine(params, config, slots=options.slots, max_len=max_len, chunk=options.chunk, block=options.block,
                    drafts=options.drafts, fp8=options.fp8)
    return engine, tokenizer


def gauges(driver: Driver, slots: int) -> dict[str, float]:
    """How the engine stands, for /metrics."""
    now = driver.gauges
    return {"slots": slots, "slots_taken": now.running, "waiting": now.waiting, "tokens_total": now.tokens,
            "weights_version": now.version, "accept_length": now.accept_length}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m glm5_jax.serve", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="directory in the released layout, as a run exports it")
    add("--model", help="name of the model for clients; default that of the directory")
    add("--tokenizer", help="tokenizer.json; default the checkpoint's own")
    add("--host", default="127.0.0.1", help="address to listen at; the traffic is not encrypted")
    add("--port", type=int, default=8000, help="0 for any that is free")
    add("--token", default=os.environ.get("GLM5_JAX_TOKEN"),
        help="the administrator's; default that of the environment variable GLM5_JAX_TOKEN, which other users of the "
             "machine do not see as they see arguments, or a new one")
    add("--limit", type=int, default=1024, help="calls at once; what comes beyond is told to come again")
    add("--slots", type=int, default=8, help="calls that are drawn at once; others wait")
    add("--max-len", type=int, help=f"tokens of a context; default the model's, at most {LONGEST}")
    add("--chunk", type=int, default=128, help="tokens of a prompt that are fed at once")
    add("--block", type=int, default=16, help="tokens between two looks at new calls")
    add("--drafts", type=int, default=0, help="tokens that the MTP layer guesses ahead")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights; default as stored")
    add("--fp8", action="store_true", help="quantise the weights to FP8")
    return parser


if __name__ == "__main__":
    sys.exit(main())
