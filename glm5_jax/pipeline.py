"""The job from end to end: data, stages, reinforcement learning, export, one completion, tables and pictures."""

import contextlib
import dataclasses
import functools
import importlib.resources
import json
import math
import pathlib
import time
from typing import Any, Mapping, NamedTuple, Sequence

import jax
import numpy as np

from glm5_jax import posttrain
from glm5_jax.checkpoint import hf_config, released
from glm5_jax.checkpoint.store import Store
from glm5_jax.core import metrics as core_metrics, params as core_params
from glm5_jax.core.batch import Batch
from glm5_jax.core.rundir import RunDir, write_json
from glm5_jax.data import packing, sft, sources
from glm5_jax.envs.verifiable.arithmetic import arithmetic
from glm5_jax.infer import sampler
from glm5_jax.job import ARITHMETIC, DEMONSTRATIONS, Job
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.rl import curriculum
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train import dsa_adapt, loop, report, stages as train_stages, step as train_step
from glm5_jax.train.stages import Stage
from glm5_jax.train.state import TrainState

# How a model is computed, not what: a checkpoint does not hold these.
RUNTIME_FIELDS = ("dtype", "param_dtype", "remat", "query_chunk", "dense_attention_max_len", "mtp_unroll", "sharding")
QUESTIONS = 2_000  # of arithmetic per level, those that occur twice included


class Rows(NamedTuple):
    """What a stage learns from and what is held out; `held_out_bytes` of text in UTF-8, None for conversations."""

    train: Batch
    held_out: Batch
    held_out_bytes: int | None


def run(job: Job, rundir: RunDir) -> dict[str, Any]:
    """Runs the job, or continues it from its last checkpoint, and returns its result.

    Walks the stages, measures before and after each, goes on to reinforcement learning where the job names stages of
    it, exports the released layout and reads it back, completes a prompt, draws a picture. A finished run is not
    repeated: its stored result is returned.
    """
    stored = rundir.path / "result.json"
    if stored.exists():
        result = json.loads(stored.read_text(encoding="utf-8"))
        _say(f"{rundir.path} holds this run, finished; this is its result. Delete the directory or pass another "
             f"--workdir to run again.")
        _say(_table(result))
        return result
    _use_compilation_cache(job, rundir)
    tokenizer = Tokenizer.packaged()
    stages = job.compose()
    state = train(job, stages, rundir, tokenizer)

    export, last = rundir.path / "hf", stages[-1]
    trained, learned = state.params, dict[str, Any]()
    if job.rl.order:
        trained, learned = posttrain.run(job, rundir.path / "rl", last.config, trained, tokenizer, _say)
    params = export_and_reload(export, last.config, trained, tokenizer)
    completion = complete(job, last.config, params, tokenizer)
    _say(f"One completion, temperature {job.sample.temperature:g}:\n---\n{job.sample.prompt}{completion}\n---")
    rows = report.read_rows(rundir.metrics)
    ends = report.ends({stage.name: stage.steps for stage in stages})
    result = {
        "parameters": core_params.count(transformer.param_specs(job.model)),
        "steps": int(state.step),
        "tokens": int(state.tokens_seen[0]) * 10**6 + int(state.tokens_seen[1]),
        "stages": report.stages(rows, ends),
        "rl": learned,
        "completion": completion,
        "checkpoints": str(rundir.checkpoints),
        "export": str(export),
        "picture": _draw(rundir, rows, ends),
        "page": str(rundir.path / "rl" / "report.html") if learned else None,
    }
    write_json(stored, result)
    _say(_table(result))
    return result


def train(job: Job, stages: tuple[Stage, ...], rundir: RunDir, tokenizer: Tokenizer) -> TrainState:
    """Walks the stages, from the newest checkpoint where there is one."""
    rows_of = functools.cache(lambda name: load(job, name, tokenizer))
    for stage in stages:  # what cannot be read is told before the first step
        rows_of(stage.name)
    measures = {stage.name: _measure(job, stage) for stage in stages}

    def evaluate(stage: Stage, params: Any) -> dict[str, float]:
        start = time.perf_counter()
        values = measures[stage.name](params, rows_of(stage.name))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        _say(f"Held out, {stage.name}: {shown} ({time.perf_counter() - start:.1f} s).")
        return values

    def batches(stage: Stage) -> loop.Batches:
        return iter(packing.batches(rows_of(stage.name).train, batch_size=job.stages[stage.name].batch_size,
                                    seed=job.seed))

    def store(stage: Stage) -> Store:
        return Store(rundir.checkpoints, keep=job.checkpoint.keep,
                     about=hf_config.about(stage.config, tokenizer.config_fields))

    with contextlib.closing(core_metrics.JsonlWriter(rundir.metrics)) as writer:
        return train_stages.run(
            stages, params=lambda: transformer.init(job.model, jax.random.key(job.seed)), batches=batches, store=store,
            writer=writer, cadence=job.cadence, evaluate=evaluate, say=_say)


def load(job: Job, name: str, tokenizer: Tokenizer) -> Rows:
    """The rows of the stage `name`. Raises ValueError or OSError as `data.sources.load` and `data.sft.read` do."""
    stage = job.stages[name]
    if stage.kind == "sft":
        train, held_out = _split(_conversations(job, stage.source), job.held_out_fraction)
        packed = [sft.pack(tokenizer, part, stage.seq_len)[0] for part in (train, held_out)]
        _say(f"{name}: {len(train)} conversations of {stage.source!r}, {len(packed[0].tokens)} rows of {stage.seq_len} "
             f"tokens; {len(held_out)} conversations are held out.")
        return Rows(packed[0], packed[1], None)
    train, held_out = sources.split(sources.load(stage.source), job.held_out_fraction, job.seed)
    packed = [packing.pack(packing.tokenise(part, tokenizer), stage.seq_len) for part in (train, held_out)]
    _say(f"{name}: {len(train)} documents of {stage.source!r}, {sources.text_bytes(train):,} bytes, "
         f"{len(packed[0].tokens)} rows of {stage.seq_len} tokens; {len(held_out)} documents are held out.")
    return Rows(packed[0], packed[1], sources.text_bytes(held_out))


def _conversations(job: Job, source: str) -> tuple[sft.Conversation, ...]:
    if source == DEMONSTRATIONS:
        skills = curriculum.skills(level=job.rl.level, hops=job.rl.hops)
        used = sorted({skill for name in job.rl.order for skill in job.rl.stages[name].skills})
        return curriculum.demonstrations([skills[name] for name in used], job.rl.demonstrations, well=job.rl.well,
                                         seed=job.seed)
    if source != ARITHMETIC:
        return sft.read(pathlib.Path(source).expanduser())
    tasks = (arithmetic(number, level=level) for number in range(job.seed * QUESTIONS, (job.seed + 1) * QUESTIONS)
             for level in (1, 2))
    return tuple(sft.Conversation(({"role": "user", "content": task.prompt},
                                   {"role": "assistant", "content": f"<answer>{task.solution}</answer>"}),
                                  place=f"{task.name}, seed {task.seed}") for task in tasks)


def _split(conversations: Sequence[sft.Conversation], fraction: float) -> tuple[Any, Any]:
    """What to train on, and the last `fraction` to hold out; of conversations that say the same, the first stays."""
    first: dict[str, sft.Conversation] = {}
    for each in conversations:
        first.setdefault(json.dumps(each.messages, sort_keys=True), each)
    different, count = list(first.values()), max(1, int(len(first) * fraction))
    if len(different) < 2:
        raise ValueError(f"conversations: expected at least two that differ, to hold one out; found {len(different)}")
    return different[:-count], different[-count:]


def _measure(job: Job, stage: Stage) -> Any:
    """(parameters, rows) -> what is measured of a stage; compiled once."""
    nats_of = train_step.make_eval_step(stage.config, stage.options.loss_chunk, stage.options.attention)
    batch_size = job.stages[stage.name].batch_size

    def measure(params: Any, rows: Rows) -> dict[str, float]:
        batches = packing.held_out_batches(rows.held_out, batch_size)
        nats = functools.reduce(core_metrics.Mean.merge, (nats_of(params, batch) for batch in batches))
        if rows.held_out_bytes is None:
            values = {"nats_per_learned_token": float(nats.value())}
        else:
            # The first token of each document is not predicted: its nats are not counted, its bytes are.
            values = {"bits_per_byte": float(nats.total) / math.log(2) / rows.held_out_bytes}
        if stage.options.indexer_loss == "dense":
            found = dsa_adapt.agreement(params, stage.config, batches[0])
            for name in ("indexer", "recency", "uniform"):
                values |= {f"kl_{name}": float(found[name].kl.value().mean()),
                           f"recall_{name}": float(found[name].recall.value().mean())}
        return values

    return measure


def export_and_reload(directory: pathlib.Path, config: ModelConfig, params: Any, tokenizer: Tokenizer) -> Any:
    """Writes the released layout, with the packaged tokenizer, and returns the parameters that reading it back gives.

    Raises RuntimeError naming the parameter or the field of the config that came back different.
    """
    with importlib.resources.as_file(importlib.resources.files("glm5_jax.text") / "assets" / "tokenizer.json") as file:
        released.save_hf(directory, config, params, fields=tokenizer.config_fields, companions=[file])
    reloaded_config, reloaded = released.load_hf(directory)
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(reloaded_config, field.name)
        if field.name not in RUNTIME_FIELDS and ours != theirs:
            raise RuntimeError(f"{directory}: ModelConfig.{field.name} came back different: expected {ours!r}, "
                               f"found {theirs!r}")

    def check(path: Any, ours: jax.Array, theirs: jax.Array) -> None:
        if ours.dtype != theirs.dtype or not np.array_equal(ours, theirs, equal_nan=True):
            raise RuntimeError(f"{directory}: parameter {core_params.path_name(path)} came back different: expected "
                               f"{ours.dtype} {ours.shape}, bit for bit, found {theirs.dtype} {theirs.shape}")

    jax.tree_util.tree_map_with_path(check, params, reloaded)
    return reloaded


def complete(job: Job, config: ModelConfig, params: Any, tokenizer: Tokenizer) -> str:
    """One completion of the job's prompt, the same for the same seed."""
    prompt = np.array([tokenizer.encode(job.sample.prompt)], np.int32)
    result = sampler.generate(params, config, prompt, max_new_tokens=job.sample.max_new_tokens,
                              temperature=job.sample.temperature, key=jax.random.key(job.seed),
                              stop_ids=tokenizer.stop_ids)
    return tokenizer.decode(np.asarray(result.tokens[0])[:int(result.lengths[0])], skip_specials=True)


def _use_compilation_cache(job: Job, rundir: RunDir) -> None:
    if job.compilation_cache == "off":
        return
    if job.compilation_cache != "auto":
        directory = pathlib.Path(job.compilation_cache).expanduser().resolve()
    else:  # what the user's environment says comes first
        environment = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        directory = environment or rundir.path.parent / ".cache" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    _say(f"Compiled programs are kept in {directory}.")


def _draw(rundir: RunDir, rows: report.Rows, ends: Mapping[str, int]) -> str | None:
    path = rundir.path / "report.png"
    try:
        report.draw(rows, path, ends=ends)
    except ImportError as error:
        _say(f"No picture: {error}")
        return None
    return str(path)


def _table(result: Mapping[str, Any]) -> str:
    lines = {
        "parameters": f"{result['parameters']:,}",
        "steps, tokens": f"{result['steps']:,}, {result['tokens']:,}",
        "checkpoints": result["checkpoints"],
        "released layout": f"{result['export']} (read back, equal bit for bit)",
        "picture": result["picture"] or "none, matplotlib is missing",
    }
    tables = [report.table(result["stages"])]
    if result["rl"]:
        tables += ["", posttrain.table(result["rl"]), ""]
        lines["report"] = result["page"]
    return "\n".join([*tables, *(f"{name:<18}{text}" for name, text in lines.items())])


def _say(text: str) -> None:
    print(text, flush=True)
