"""What a job is: the values of an experiment file, checked, as frozen dataclasses. Nothing is computed or written."""

import dataclasses
import difflib
import importlib.util
import math
import pathlib
import typing
from typing import Any, Collection, Mapping, Sequence

from ml_collections import ConfigDict

from glm5_jax.data import sources
from glm5_jax.model import config as model_config, transformer
from glm5_jax.model.config import ModelConfig
from glm5_jax.optim import partition, schedules
from glm5_jax.rl import curriculum
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train import loop, stages as train_stages
from glm5_jax.train.step import Options

PRESETS = {"tiny": model_config.tiny, "small": model_config.small, "glm5": model_config.glm5,
           "glm5_2": model_config.glm5_2}
ARITHMETIC = "arithmetic"  # conversations: a calculation, and its value
DEMONSTRATIONS = "demonstrations"  # of the skills that are practised later
RL_KINDS = ("reasoning", "agentic", "general", "distillation")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`name` is one of `optim.partition.OPTIMIZERS`; `b1` and `b2` are AdamW's."""

    name: str
    weight_decay: float
    b1: float
    b2: float

    def check(self, path: str) -> None:
        """Raises ValueError naming the field of `config.<path>`."""
        _expect(self.name in partition.OPTIMIZERS, f"{path}.name", f"one of {partition.OPTIMIZERS}", self.name)
        _expect(0 <= self.weight_decay < math.inf, f"{path}.weight_decay", "0 or more", self.weight_decay)
        for field in ("b1", "b2"):
            _expect(0 <= getattr(self, field) < 1, f"{path}.{field}", "0 or more and less than 1", getattr(self, field))


@dataclasses.dataclass(frozen=True)
class Train:
    """What is the same in every stage; `train.step.Options` says what each value means."""

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
        _expect(self.log_every >= 1, "train.log_every", "at least 1", self.log_every)
        try:
            self.options()
        except ValueError as error:
            raise ValueError(f"config.train.{str(error).removeprefix('Options.')}") from error

    def options(self) -> Options:
        values = dataclasses.asdict(self)
        del values["log_every"]
        return Options(**values)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of `kind`, one of `train.stages.KINDS`: `steps` of `batch_size` rows of `seq_len` tokens.

    `source` is a key of `data.sources.SOURCES` or a path, as `data.sources.load` takes it; for the kind "sft" it is
    "arithmetic", "demonstrations" (of the skills of `rl`) or a file of conversations (`data.sft`). The learning rate
    warms up linearly and falls along a cosine to `final_learning_rate`. `keep`: the optimiser remembers the stage
    before.
    """

    kind: str
    source: str
    steps: int
    seq_len: int
    batch_size: int
    rope_theta: float
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    keep: bool

    def check(self, name: str, job: "Job") -> None:
        """Raises ValueError naming the field of `config.stages.<name>`."""
        expect = lambda ok, field, expected: _expect(ok, f"stages.{name}.{field}", expected, getattr(self, field))
        expect(self.kind in train_stages.KINDS, "kind", f"one of {sorted(train_stages.KINDS)}")
        for field, least in (("steps", 1), ("seq_len", 1), ("batch_size", 1), ("warmup_steps", 0)):
            expect(getattr(self, field) >= least, field, f"at least {least}")
        for field in ("rope_theta", "learning_rate", "final_learning_rate"):
            expect(0 < getattr(self, field) < math.inf, field, "a number above 0")
        expect(self.warmup_steps < self.steps, "warmup_steps", f"less than steps = {self.steps}")
        expect(self.batch_size % job.train.micro_batches == 0, "batch_size",
               f"a multiple of train.micro_batches = {job.train.micro_batches}")
        expect(self.seq_len <= job.model.max_position_embeddings, "seq_len",
               f"at most max_position_embeddings = {job.model.max_position_embeddings} of the model")
        known = (ARITHMETIC, DEMONSTRATIONS) if self.kind == "sft" else tuple(sorted(sources.SOURCES))
        expect(self.source in known or pathlib.Path(self.source).expanduser().exists(), "source",
               f"{' or '.join(known)}, or a path that exists")
        expect((self.kind, self.source) != ("sft", DEMONSTRATIONS) or bool(job.rl.order), "source",
               "something else where rl.order names no stages, whose skills are demonstrated")


@dataclasses.dataclass(frozen=True)
class RlStage:
    """One stage of reinforcement learning of `kind`, one of RL_KINDS: `steps` training steps on `groups` problems of
    `size` rollouts each, of `skills` of `rl.curriculum` in equal shares. `beta`, `clip_low`, `clip_high` and `bound`
    are those of `rl.algorithms`, as far as the kind has them. A checkpoint every `save_every` steps."""

    kind: str
    skills: tuple[str, ...]
    steps: int
    groups: int
    size: int
    learning_rate: float
    beta: float
    clip_low: float
    clip_high: float
    bound: int
    save_every: int

    def check(self, name: str, skills: Collection[str], practised: Collection[str]) -> None:
        """Raises ValueError naming the field of `config.rl.stages.<name>`; `practised` are the skills of the stages
        before."""
        expect = lambda ok, field, expected: _expect(ok, f"rl.stages.{name}.{field}", expected, getattr(self, field))
        expect(self.kind in RL_KINDS, "kind", f"one of {RL_KINDS}")
        expect(bool(self.skills) and set(self.skills) <= set(skills), "skills", f"some of {sorted(skills)}")
        for field in ("steps", "groups", "size", "save_every"):
            expect(getattr(self, field) >= 1, field, "at least 1")
        expect(self.steps % self.save_every == 0, "save_every", f"a divisor of steps = {self.steps}")
        expect(0 < self.learning_rate < math.inf, "learning_rate", "a number above 0")
        expect(1 <= self.beta < math.inf, "beta", "a number of at least 1")
        for field in ("clip_low", "clip_high"):
            expect(0 <= getattr(self, field) < math.inf, field, "a number of at least 0")
        expect(self.bound >= 0, "bound", "0 or more")
        if self.kind != "distillation":
            expect(self.size >= 2, "size", "at least 2, as advantages are made within a group")
        else:
            expect(set(self.skills) <= set(practised), "skills", f"skills of stages before it, {sorted(practised)}, "
                                                                 "whose policies are the teachers")


@dataclasses.dataclass(frozen=True)
class Rl:
    """The stages after the last supervised one; `order` names those that are run, which may be none.

    An engine of `slots` slots for contexts of `max_len` tokens serves all of them; training rows are `length` tokens,
    `rows` at a time. Of each skill up to `demonstrations` problems are demonstrated, the share `well` of them
    whole-heartedly, up to `problems` practised, and up to `held_out` measured by. Chains have `level` steps, look-ups
    `hops`; the share `flaky` of the episodes with tools fails. `tensorboard`: metrics go to a folder of that name too.
    """

    slots: int
    max_len: int
    length: int
    rows: int
    demonstrations: int
    well: float
    problems: int
    held_out: int
    level: int
    hops: int
    flaky: float
    tensorboard: bool
    optimizer: Optimizer
    order: tuple[str, ...]
    stages: Mapping[str, RlStage]

    def __post_init__(self) -> None:
        self.optimizer.check("rl.optimizer")
        for field in ("slots", "rows", "demonstrations", "problems", "held_out"):
            _expect(getattr(self, field) >= 1, f"rl.{field}", "at least 1", getattr(self, field))
        for field, most in (("level", 9), ("hops", 3)):
            _expect(1 <= getattr(self, field) <= most, f"rl.{field}", f"1 to {most}", getattr(self, field))
        for field in ("well", "flaky"):
            _expect(0 <= getattr(self, field) <= 1, f"rl.{field}", "a share from 0 to 1", getattr(self, field))
        _expect(not self.tensorboard or importlib.util.find_spec("tensorboardX") is not None, "rl.tensorboard",
                "False, as tensorboardX is not installed (pip install 'glm5-jax[metrics]')", self.tensorboard)
        _expect(self.max_len >= 2, "rl.max_len", "at least 2", self.max_len)
        _expect(self.length >= self.max_len, "rl.length", f"at least max_len = {self.max_len}", self.length)
        _expect(len(set(self.order)) == len(self.order) and set(self.order) <= set(self.stages), "rl.order",
                f"names of stages, each at most once, of {sorted(self.stages)}", self.order)
        practised: set[str] = set()
        for name in self.order:
            self.stages[name].check(name, curriculum.NAMES, practised)
            practised |= set(self.stages[name].skills)


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
    """Everything a job depends on. `order` names those of `stages` that are run, in order (ConfigDicts have none);
    `compilation_cache` is a directory, "auto" (beside the run) or "off"."""

    model: ModelConfig
    held_out_fraction: float
    optimizer: Optimizer
    train: Train
    stages: Mapping[str, Stage]
    order: tuple[str, ...]
    checkpoint: Checkpoint
    sample: Sample
    rl: Rl
    seed: int
    compilation_cache: str

    def __post_init__(self) -> None:
        if self.train.mtp_steps and not self.model.num_nextn_predict_layers:
            raise ValueError(f"config.train.mtp_steps: expected 0 for a model without MTP layer, "
                             f"found {self.train.mtp_steps}")
        self.optimizer.check("optimizer")
        _expect(0 < self.held_out_fraction < 1, "held_out_fraction", "a number between 0 and 1, neither of them",
                self.held_out_fraction)
        _expect(bool(self.order) and len(set(self.order)) == len(self.order) and set(self.order) <= set(self.stages),
                "order", f"names of stages, each at most once, of {sorted(self.stages)}", self.order)
        for name in self.order:
            self.stages[name].check(name, self)
        _expect(not self.rl.order or self.rl.length <= self.model.max_position_embeddings, "rl.length",
                f"at most max_position_embeddings = {self.model.max_position_embeddings} of the model", self.rl.length)
        entries = Tokenizer.packaged().vocab_size
        _expect(self.model.vocab_size >= entries, "model.overrides.vocab_size",
                f"at least the {entries} entries of the packaged tokenizer", self.model.vocab_size)
        _expect(0 <= self.seed < 2**32, "seed", "0 or more and less than 2**32", self.seed)

    @property
    def cadence(self) -> loop.Cadence:
        return loop.Cadence(self.train.log_every, self.checkpoint.every)

    def compose(self) -> tuple[train_stages.Stage, ...]:
        """The stages in order, composed as `train.stages` names them."""
        return tuple(self._composed(name, self.stages[name]) for name in self.order)

    def _composed(self, name: str, stage: Stage) -> train_stages.Stage:
        config = self.model.replace(rope_theta=stage.rope_theta)
        options, tokens = train_stages.KINDS[stage.kind](self.train.options()), stage.batch_size * stage.seq_len
        optimizer = partition.build(
            transformer.param_specs(config), optimizer=typing.cast(partition.Optimizer, self.optimizer.name),
            weight_decay=self.optimizer.weight_decay, b1=self.optimizer.b1, b2=self.optimizer.b2,
            frozen=options.frozen, trainable=options.trainable,
            learning_rate=schedules.warmup_cosine(stage.learning_rate, final=stage.final_learning_rate,
                                                  warmup=stage.warmup_steps * tokens, total=stage.steps * tokens))
        return train_stages.Stage(name, stage.steps, config, options, optimizer, stage.keep)


def resolve(config: ConfigDict) -> Job:
    """The job that an experiment's values describe.

    Raises ValueError naming the field where one is missing, unknown (with the nearest known), of another type or out of
    range.
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
    return cls(**ready, **{name: _value(kind, values[name], f"{path}.{name}") for name, kind in types.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path, {})
    of = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{path}: expected a tuple, found {value!r}")
        return tuple(_value(of[0], each, f"{path}[{number}]") for number, each in enumerate(value))
    if of:  # sections with names of their own
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: expected a section of sections, found {value!r}")
        return {name: _value(of[1], each, f"{path}.{name}") for name, each in value.items()}
    if isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool)):
        return kind(value)
    raise ValueError(f"{path}: expected {kind.__name__}, found {type(value).__name__} {value!r}")


def _check_keys(path: str, values: Any, known: Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected a section with {', '.join(known)}, found {values!r}")
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{path}: unknown field {unknown[0]!r}{nearest(unknown[0], known)}")
    if missing := [name for name in known if name not in values]:
        raise ValueError(f"{path}: expected the field {missing[0]!r}, found none; add it to the experiment file")


def _expect(ok: bool, field: str, expected: str, found: Any) -> None:
    if not ok:
        raise ValueError(f"config.{field}: expected {expected}, found {found!r}")
