"""One job from end to end: the values of an experiment file become frozen dataclasses, then stages in order."""

import contextlib
import dataclasses
import difflib
import importlib.resources
import json
import math
import pathlib
import time
import typing
from typing import Any, Mapping, Sequence

import jax
from ml_collections import ConfigDict
import numpy as np

from glm5_jax.checkpoint import hf_config, released
from glm5_jax.checkpoint.store import Store
from glm5_jax.core import metrics as core_metrics, params as core_params
from glm5_jax.core.batch import Batch
from glm5_jax.core.rundir import RunDir, write_json
from glm5_jax.data import packing, sources
from glm5_jax.infer import sampler
from glm5_jax.model import config as model_config, transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.optim import partition, schedules
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train import loop, report, state as train_state, step as train_step

PRESETS = {"tiny": model_config.tiny, "small": model_config.small, "glm5": model_config.glm5,
           "glm5_2": model_config.glm5_2}
# How a model is computed, not what: a checkpoint does not hold these.
RUNTIME_FIELDS = ("dtype", "param_dtype", "remat", "query_chunk", "dense_attention_max_len", "mtp_unroll", "sharding")


@dataclasses.dataclass(frozen=True)
class Data:
    """`source` is a key of `data.sources.SOURCES`; lengths in tokens, batch in rows."""

    source: str
    seq_len: int
    batch_size: int
    held_out_fraction: float

    def __post_init__(self) -> None:
        if self.source not in sources.SOURCES:
            raise ValueError(f"config.data.source: expected one of {sorted(sources.SOURCES)}, found {self.source!r}")
        for field in ("seq_len", "batch_size"):
            _expect(getattr(self, field) >= 1, f"data.{field}", "at least 1", getattr(self, field))
        _expect(0 < self.held_out_fraction < 1, "data.held_out_fraction", "a number between 0 and 1, neither of them",
                self.held_out_fraction)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`name` is one of `optim.partition.OPTIMIZERS`; the learning rate warms up linearly and falls along a cosine to
    `final_learning_rate`; `b1` and `b2` are AdamW's."""

    name: str
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    b1: float
    b2: float

    def __post_init__(self) -> None:
        _expect(self.name in partition.OPTIMIZERS, "optimizer.name", f"one of {partition.OPTIMIZERS}", self.name)
        for field in ("learning_rate", "final_learning_rate"):
            _expect(0 < getattr(self, field) < math.inf, f"optimizer.{field}", "a number above 0", getattr(self, field))
        for field in ("warmup_steps", "weight_decay"):
            _expect(0 <= getattr(self, field) < math.inf, f"optimizer.{field}", "0 or more", getattr(self, field))
        for field in ("b1", "b2"):
            _expect(0 <= getattr(self, field) < 1, f"optimizer.{field}", "0 or more and less than 1",
                    getattr(self, field))


@dataclasses.dataclass(frozen=True)
class Train:
    """Of `steps` in all, the first `dense_steps` attend densely while the indexer learns; the rest are sparse."""

    steps: int
    dense_steps: int
    log_every: int
    mtp_steps: int
    mtp_weight: float
    balance_weight: float
    indexer_weight: float
    router_bias_rate: float
    max_grad_norm: float
    loss_chunk: int
    micro_batches: int

    def __post_init__(self) -> None:
        if not 0 <= self.dense_steps <= self.steps or self.steps < 1:
            raise ValueError(f"config.train: expected 0 <= dense_steps <= steps and steps >= 1, "
                             f"found {self.dense_steps} and {self.steps}")
        _expect(self.log_every >= 1, "train.log_every", "at least 1", self.log_every)
        try:
            self.stages()
        except ValueError as error:
            raise ValueError(f"config.train.{str(error).removeprefix('Options.')}") from error

    def stages(self) -> dict[str, tuple[int, train_step.Options]]:
        """The stages by name, in order: the step each ends at, and what it optimises."""
        common = {name: getattr(self, name) for name in (
            "mtp_steps", "mtp_weight", "balance_weight", "indexer_weight", "router_bias_rate", "max_grad_norm",
            "loss_chunk", "micro_batches")}
        return {"dense": (self.dense_steps, train_step.Options(indexer_loss="dense", **common)),
                "sparse": (self.steps, train_step.Options(indexer_loss="sparse", **common))}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint `every` so many steps; the newest `keep` of them stay."""

    every: int
    keep: int

    def __post_init__(self) -> None:
        for field in ("every", "keep"):
            _expect(getattr(self, field) >= 1, f"checkpoint.{field}", "at least 1", getattr(self, field))


@dataclasses.dataclass(frozen=True)
class Sample:
    """The prompt to complete; temperature 0 is greedy."""

    prompt: str
    max_new_tokens: int
    temperature: float

    def __post_init__(self) -> None:
        _expect(self.prompt != "", "sample.prompt", "some text", self.prompt)
        _expect(self.max_new_tokens >= 1, "sample.max_new_tokens", "at least 1", self.max_new_tokens)
        _expect(0 <= self.temperature < math.inf, "sample.temperature", "0 or more", self.temperature)


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything a job depends on. `compilation_cache` is a directory, "auto" (beside the run) or "off"."""

    model: ModelConfig
    data: Data
    optimizer: Optimizer
    train: Train
    checkpoint: Checkpoint
    sample: Sample
    seed: int
    compilation_cache: str

    def __post_init__(self) -> None:
        if self.train.mtp_steps and not self.model.num_nextn_predict_layers:
            raise ValueError(f"config.train.mtp_steps: expected 0 for a model without MTP layer, "
                             f"found {self.train.mtp_steps}")
        _expect(self.data.seq_len <= self.model.max_position_embeddings, "data.seq_len",
                f"at most max_position_embeddings = {self.model.max_position_embeddings} of the model",
                self.data.seq_len)
        _expect(self.optimizer.warmup_steps < self.train.steps, "optimizer.warmup_steps",
                f"less than train.steps = {self.train.steps}", self.optimizer.warmup_steps)
        entries = Tokenizer.packaged().vocab_size
        _expect(self.model.vocab_size >= entries, "model.overrides.vocab_size",
                f"at least the {entries} entries of the packaged tokenizer", self.model.vocab_size)
        _expect(self.data.batch_size % self.train.micro_batches == 0, "train.micro_batches",
                f"a divisor of data.batch_size = {self.data.batch_size}", self.train.micro_batches)
        _expect(0 <= self.seed < 2**32, "seed", "0 or more and less than 2**32", self.seed)

    @property
    def cadence(self) -> loop.Cadence:
        return loop.Cadence(self.train.log_every, self.checkpoint.every)


def _expect(ok: bool, field: str, expected: str, found: Any) -> None:
    if not ok:
        raise ValueError(f"config.{field}: expected {expected}, found {found!r}")


def resolve(config: ConfigDict) -> Job:
    """The job that an experiment's values describe.

    Raises ValueError naming the field where one is missing, unknown (with the nearest known), of another type or out of
    range; nothing is computed or written.
    """
    values = config.to_dict()
    model = values.pop("model", None)
    _check_keys("config.model", model, ("preset", "overrides"))
    if model["preset"] not in PRESETS:
        raise ValueError(f"config.model.preset: expected one of {sorted(PRESETS)}, found {model['preset']!r}")
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    _expect(isinstance(model["overrides"], Mapping), "model.overrides", "a section", model["overrides"])
    for name in model["overrides"]:
        if name not in known:
            raise ValueError(f"config.model.overrides: unknown field {name!r}{nearest(name, known)}")
    try:
        built = PRESETS[model["preset"]](**model["overrides"])
    except ValueError as error:
        raise ValueError(f"config.model.overrides: {error}") from error
    return _build(Job, values, "config", {"model": built})


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean "steps"?` for "stepz", or what there is to choose from."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(known)}"


def _build(cls: Any, values: Mapping[str, Any], path: str, ready: Mapping[str, Any]) -> Any:
    types = {name: kind for name, kind in typing.get_type_hints(cls).items() if name not in ready}
    _check_keys(path, values, tuple(types))
    fields = dict(ready)
    for name, kind in types.items():
        value, where = values[name], f"{path}.{name}"
        if dataclasses.is_dataclass(kind):
            fields[name] = _build(kind, value, where, {})
        elif isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool):
            fields[name] = kind(value)
        else:
            raise ValueError(f"{where}: expected {kind.__name__}, found {type(value).__name__} {value!r}")
    return cls(**fields)


def _check_keys(path: str, values: Any, known: Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected a section with {', '.join(known)}, found {values!r}")
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{path}: unknown field {unknown[0]!r}{nearest(unknown[0], known)}")
    if missing := [name for name in known if name not in values]:
        raise ValueError(f"{path}: expected the field {missing[0]!r}, found none; add it to the experiment file")


def run(job: Job, rundir: RunDir) -> dict[str, Any]:
    """Runs the job, or continues it from its last checkpoint, and returns its result.

    Pre-trains, evaluates before and after, exports the released layout and reads it back, completes a prompt, draws
    a picture. A finished run is not repeated: its stored result is returned.
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
    train_rows, held_out_rows, held_out_bytes = _load(job, tokenizer)
    state = pretrain(job, rundir, train_rows, held_out_rows, held_out_bytes)

    after = bits_per_byte(job, state.params, held_out_rows, held_out_bytes)
    export = rundir.path / "hf"
    params = export_and_reload(export, job.model, state.params, tokenizer)
    completion = complete(job, params, tokenizer)
    _say(f"One completion, temperature {job.sample.temperature:g}:\n---\n{job.sample.prompt}{completion}\n---")
    rows = report.read_rows(rundir.metrics)
    before = report.series(rows, "held_out_bits_per_byte")[1][0]
    result = {
        "parameters": core_params.count(transformer.param_specs(job.model)),
        "steps": int(state.step),
        "tokens": int(state.tokens_seen[0]) * 10**6 + int(state.tokens_seen[1]),
        "held_out_bits_per_byte": {"before": before, "after": after},
        "tokens_per_second": report.tokens_per_second(rows),
        "completion": completion,
        "checkpoints": str(rundir.checkpoints),
        "export": str(export),
        "picture": _draw(job, rundir, rows, f"held-out bits per byte {before:.2f} to {after:.2f}"),
    }
    write_json(stored, result)
    _say(_table(result))
    return result


def pretrain(job: Job, rundir: RunDir, train_rows: Batch, held_out_rows: Batch, held_out_bytes: int
             ) -> train_state.TrainState:
    """Trains through all stages, from the newest checkpoint where there is one."""
    tokens = job.data.batch_size * job.data.seq_len
    optimizer = partition.build(
        transformer.param_specs(job.model), optimizer=typing.cast(partition.Optimizer, job.optimizer.name),
        weight_decay=job.optimizer.weight_decay, b1=job.optimizer.b1, b2=job.optimizer.b2,
        learning_rate=schedules.warmup_cosine(
            job.optimizer.learning_rate, final=job.optimizer.final_learning_rate,
            warmup=job.optimizer.warmup_steps * tokens, total=job.train.steps * tokens))
    batches = iter(packing.batches(train_rows, batch_size=job.data.batch_size, seed=job.seed))
    lines = core_metrics.JsonlWriter(rundir.metrics)
    about = hf_config.about(job.model, Tokenizer.packaged().config_fields)
    with (Store(rundir.checkpoints, keep=job.checkpoint.keep, about=about) as store, contextlib.closing(lines)):
        state = loop.resume(store, train_state.abstract(job.model, optimizer), batches)
        if state is None:
            lines.truncate_after(-1)
            state = train_state.create(job.model, optimizer, jax.random.key(job.seed))
            before = bits_per_byte(job, state.params, held_out_rows, held_out_bytes)
            lines.write(0, {"held_out_bits_per_byte": before})
        else:
            lines.truncate_after(int(state.step))
            _say(f"Resumed from step {int(state.step)} of {job.train.steps}.")
        for name, (until, options) in job.train.stages().items():
            step = train_step.make_train_step(job.model, optimizer, options)
            state = loop.run(state, step, batches, until=until, cadence=job.cadence, store=store, writer=lines,
                             name=name)
    return state


def bits_per_byte(job: Job, params: Any, rows: Batch, text_bytes: int) -> float:
    """Nats of all rows / ln 2 / `text_bytes`, those of their text in UTF-8.

    The first token of each document is not predicted: its nats are not counted, its bytes are.
    """
    start = time.perf_counter()
    evaluate = train_step.make_eval_step(job.model)
    nats = sum(float(evaluate(params, batch).total) for batch in packing.held_out_batches(rows, job.data.batch_size))
    value = nats / math.log(2) / text_bytes
    _say(f"Held out: {value:.4f} bits per byte ({time.perf_counter() - start:.1f} s).")
    return value


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


def complete(job: Job, params: Any, tokenizer: Tokenizer) -> str:
    """One completion of the job's prompt, the same for the same seed."""
    prompt = np.array([tokenizer.encode(job.sample.prompt)], np.int32)
    result = sampler.generate(params, job.model, prompt, max_new_tokens=job.sample.max_new_tokens,
                              temperature=job.sample.temperature, key=jax.random.key(job.seed),
                              stop_ids=tokenizer.stop_ids)
    return tokenizer.decode(np.asarray(result.tokens[0])[:int(result.lengths[0])], skip_specials=True)


def _load(job: Job, tokenizer: Tokenizer) -> tuple[Batch, Batch, int]:
    documents = sources.load(job.data.source)
    train, held_out = sources.split(documents, job.data.held_out_fraction, job.seed)
    train_rows, held_out_rows = (packing.pack(packing.tokenise(part, tokenizer), job.data.seq_len)
                                 for part in (train, held_out))
    text_bytes = sources.text_bytes(held_out)
    _say(f"Text {job.data.source!r}: {len(documents)} documents, {sources.text_bytes(documents):,} bytes, of which "
         f"{len(held_out)} documents, {text_bytes:,} bytes are held out; {len(train_rows.tokens)} rows of "
         f"{job.data.seq_len} tokens to train on.")
    return train_rows, held_out_rows, text_bytes


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


def _draw(job: Job, rundir: RunDir, rows: report.Rows, title: str) -> str | None:
    path = rundir.path / "report.png"
    try:
        report.draw(rows, path, title=title, stages={name: until for name, (until, _) in job.train.stages().items()})
    except ImportError as error:
        _say(f"No picture: {error}")
        return None
    return str(path)


def _table(result: Mapping[str, Any]) -> str:
    held_out = result["held_out_bits_per_byte"]
    lines = {
        "parameters": f"{result['parameters']:,}",
        "steps, tokens": f"{result['steps']:,}, {result['tokens']:,}",
        "held-out bits per byte": f"{held_out['before']:.4f} before, {held_out['after']:.4f} after",
        "tokens per second": f"{result['tokens_per_second']:,.0f}",
        "checkpoints": result["checkpoints"],
        "released layout": f"{result['export']} (read back, equal bit for bit)",
        "picture": result["picture"] or "none, matplotlib is missing",
    }
    return "\n".join(f"{name:<24}{text}" for name, text in lines.items())


def _say(text: str) -> None:
    print(text, flush=True)
