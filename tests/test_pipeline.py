"""The command line and the main job, end to end on a model of two layers; and what a mistyped command is told."""

import functools
import json
import pathlib
import signal
import sys

import jax
import ml_collections
import numpy as np
import pytest

from glm5_jax import __main__ as command
from glm5_jax import job as jobs, pipeline
from glm5_jax.checkpoint import released, sources
from glm5_jax.core.rundir import RunDir
from glm5_jax.data import sft
from glm5_jax.model import transformer
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.train import loop, report

ROOT = pathlib.Path(__file__).parents[1]
FILE = str(ROOT / "experiments" / "glm5.py")
SMALL_MODEL = {
    "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "moe_intermediate_size": 8,
    "n_routed_experts": 4, "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8,
    "query_chunk": 32}
STAGE = {"steps": 1, "seq_len": 32, "batch_size": 2, "warmup_steps": 0}
VALUES = {"train.log_every": 1, "checkpoint.every": 2, "held_out_fraction": 0.02, "stages.pretrain.steps": 2,
          "sample.max_new_tokens": 4, "model.overrides": SMALL_MODEL, "order": "('pretrain','dsa_warmup','sft')",
          **{f"stages.{name}.{field}": value for name in ("pretrain", "dsa_warmup") for field, value in STAGE.items()
             if (name, field) != ("pretrain", "steps")},
          **{f"stages.sft.{field}": value for field, value in (STAGE | {"seq_len": 64}).items()},
          "stages.sft.source": "arithmetic", "rl.order": "()"}
RL = {"rl.slots": 4, "rl.demonstrations": 100, "rl.length": 128, "rl.rows": 2, "rl.problems": 4, "rl.held_out": 1,
      "rl.level": 1,
      "rl.order": "('reasoning_rl','general_rl','distillation')", "stages.sft.source": "demonstrations",
      "rl.stages.distillation.skills": "('sums','courtesy')", "rl.stages.reasoning_rl.skills": "('sums',)",
      **{f"rl.stages.{name}.{field}": value for name in ("reasoning_rl", "general_rl", "distillation")
         for field, value in (("steps", 2), ("groups", 2), ("save_every", 1))},
      **{f"rl.stages.{name}.size": 2 for name in ("reasoning_rl", "general_rl")}}
RL_ON = {"rl__order": ("reasoning_rl",)}


def arguments(workdir, *more):
    return ["glm5-jax", "--config", f"{FILE}:tiny", f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in VALUES.items()), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    capture = pytest.MonkeyPatch()
    lines = []
    capture.setattr(pipeline, "_say", lines.append)
    try:
        assert command.main(arguments(directory)) == 0
    finally:
        capture.undo()
    return directory, "\n".join(lines)


@pytest.mark.slow
def test_the_main_job_leaves_what_it_promises(finished):
    directory, printed = finished
    result = json.loads((directory / "result.json").read_text())
    assert result["steps"] == 4 and 3 * 2 * 32 < result["tokens"] <= 3 * 2 * 32 + 2 * 64
    stages = result["stages"]
    assert list(stages) == ["pretrain", "dsa_warmup", "sft"]
    rows = report.read_rows(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {"lm_loss", "mtp_loss/1", "indexer_kl", "grad_norm", "expert_load"} <= set(rows[-1])
    assert "indexer_kl" not in rows[1]
    # A model that knows nothing needs log2(4096) = 12 bits a token.
    text = stages["pretrain"]["bits_per_byte"]
    assert 2 < 12 / text["before"] < 6 and text["after"] < text["before"]
    assert stages["dsa_warmup"]["bits_per_byte"]["after"] == stages["dsa_warmup"]["bits_per_byte"]["before"]
    assert set(stages["dsa_warmup"]["recall_indexer"]) == {"before", "after"}
    answers = stages["sft"]["nats_per_learned_token"]
    assert answers["after"] < answers["before"] < 9
    assert (directory / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((directory / "config.json").read_text())["stages"]["pretrain"]["steps"] == 2
    assert json.loads((directory / "overrides.json").read_text())["stages.pretrain.steps"] == 2
    for expected in (f"{text['before']:.4f}  {text['after']:.4f}", "tokens/s", result["completion"],
                     "read back, equal bit for bit", str(directory / "report.png")):
        assert expected in printed


@pytest.mark.slow
def test_the_export_is_the_trained_model(finished):
    config, params = released.load_hf(finished[0] / "hf")
    assert (config.num_hidden_layers, config.vocab_size) == (2, 4096)
    again = finished[0].parent / "again"
    pipeline.export_and_reload(again, config, params, Tokenizer.packaged())
    assert Tokenizer.load(again).encode("def") == Tokenizer.packaged().encode("def")
    fields = json.loads((again / "config.json").read_text())
    assert fields["pad_token_id"] == Tokenizer.packaged().eos_id in fields["eos_token_id"]
    exported = sources.open_source(finished[0])  # the run itself, as a checkpoint
    assert exported.config.replace(dtype=config.dtype) == config
    assert exported.fields["pad_token_id"] == Tokenizer.packaged().eos_id
    jax.tree.map(np.testing.assert_array_equal, exported.load(), params)


@pytest.mark.slow
def test_reinforcement_learning_follows_where_it_is_asked_for(tmp_path, capsys):
    more = [f"--config.{name}={value}" for name, value in RL.items()]
    assert command.main(arguments(tmp_path / "run", *more)) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["rl"]) == ["reasoning_rl", "general_rl", "distillation"]
    for stage in result["rl"].values():
        assert stage["steps"] == 2 and stage["tokens"] > 0 and stage["seconds"] > 0
        assert set(stage["skills"]) == {"sums", "courtesy"}
    assert "distillation" in printed and "report.html" in printed
    html = (tmp_path / "run" / "rl" / "report.html").read_text()
    assert all(name in html for name in result["rl"])
    _, last = released.load_hf(tmp_path / "run" / "hf")
    for stage in result["rl"]:  # what a process does that was killed behind the last stage
        assert [row["step"] for row in report.read_rows(tmp_path / "run" / "rl" / stage / "metrics.jsonl")] == [1, 2]
    (tmp_path / "run" / "result.json").unlink()
    assert command.main(arguments(tmp_path / "run", *more)) == 0
    again = json.loads((tmp_path / "run" / "result.json").read_text())
    assert again["rl"] == result["rl"] and "Held out: sums" not in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, released.load_hf(tmp_path / "run" / "hf")[1], last)


@pytest.fixture
def reread(monkeypatch, tmp_path):
    """The export's check of a model against what reading it back is made to give."""
    def check(config, params, read_config, read_params):
        monkeypatch.setattr(pipeline.released, "save_hf", lambda *_, **options: None)
        monkeypatch.setattr(pipeline.released, "load_hf", lambda _: (read_config, read_params))
        return pipeline.export_and_reload(tmp_path / "hf", config, params, Tokenizer.packaged())

    return check


def test_an_export_that_changes_a_parameter_is_an_error(reread):
    config, params = jobs.PRESETS["tiny"](), {"norm": np.ones(4, np.float32)}
    assert reread(config, params, config, params) is params
    changed = {"norm": params["norm"] + np.float32([0, 0, 0, 1e-6])}
    with pytest.raises(RuntimeError, match="parameter norm came back different"):
        reread(config, params, config, changed)


def test_an_export_that_changes_the_architecture_is_an_error(reread):
    config = jobs.PRESETS["tiny"]()
    reread(config, {}, config.replace(dtype="bfloat16", remat="none", query_chunk=8, mtp_unroll=1), {})
    for changes in ({"latent_norm_eps": 1e-6}, {"rope_theta": 1e6}, {"indexer_types": ("full",) * 3 + ("shared",)}):
        with pytest.raises(RuntimeError, match=f"ModelConfig.{next(iter(changes))} came back different: expected"):
            reread(config, {}, config.replace(**changes), {})


@pytest.mark.slow
def test_a_finished_run_reports_its_stored_result(finished, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "train", None)  # nothing is trained again
    assert command.main(arguments(finished[0])) == 0
    printed = capsys.readouterr().out
    assert "finished; this is its result" in printed and "bits_per_byte" in printed


def test_a_run_is_not_taken_over_by_another_config(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda job, rundir: {})
    assert command.main(arguments(tmp_path / "run")) == 0
    assert command.main(arguments(tmp_path / "run", "--config.stages.sft.steps=5")) == 2
    assert "stages.sft.steps: 1 -> 5" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
def test_an_error_of_the_run_is_told_without_a_traceback(error, tmp_path, capsys, monkeypatch):
    def fail(job, rundir):
        raise error("no room left")

    monkeypatch.setattr(pipeline, "run", fail)
    assert command.main(arguments(tmp_path / "run")) == 2
    assert capsys.readouterr().err == "error: no room left\n"


def test_a_programming_error_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", None)
    with pytest.raises(TypeError):
        command.main(arguments(tmp_path / "run"))


@pytest.mark.slow
def test_stopped_by_a_signal_the_same_command_resumes_exactly(finished, tmp_path, capsys, monkeypatch):
    run_loop = loop.run

    def stopping(state, *args, **kwargs):
        with monkeypatch.context() as patch:
            if kwargs["name"] == "dsa_warmup":
                patch.setattr(loop._Progress, "advance", lambda self: signal.raise_signal(signal.SIGINT))
            return run_loop(state, *args, **kwargs)

    monkeypatch.setattr(loop, "run", stopping)
    assert command.main(arguments(tmp_path / "parts")) == 130
    told = capsys.readouterr().err
    assert "Stopped after step 3, which is saved. The same command resumes" in told
    assert f"--workdir={tmp_path / 'parts'}" in told
    monkeypatch.setattr(loop, "run", run_loop)
    assert command.main(arguments(tmp_path / "parts")) == 0
    assert "Resumed from step 3 of 4, in the stage dsa_warmup" in capsys.readouterr().out
    for name in ("model.safetensors",):
        assert (tmp_path / "parts/hf" / name).read_bytes() == (finished[0] / "hf" / name).read_bytes()
    whole, parts = (json.loads((path / "result.json").read_text()) for path in (finished[0], tmp_path / "parts"))
    for name, summary in whole["stages"].items():
        assert {**parts["stages"][name], "tokens_per_second": 0} == {**summary, "tokens_per_second": 0}
    assert parts["completion"] == whole["completion"]


def test_without_matplotlib_the_run_goes_on(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pipeline._draw(RunDir(tmp_path), [{"step": 1, "lm_loss": 2.0}], {"pretrain": 1}) is None
    assert "pip install 'glm5-jax[viz]'" in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    ([], "--config: expected an experiment file, found none"),
    (["--config"], "Missing value for flag --config"),
    (["--config", "experiments/none.py"], "found experiments/none.py"),
    (["--config", f"{FILE}:tinny"], "expected one of tiny, small, glm5, found 'tinny'"),
    (["--config", f"{FILE}:tiny,data=wiki"],
     "stages.pretrain.source: expected packaged or stdlib, or a path that exists, found 'wiki'"),
    (["--config", f"{FILE}:tiny", "--config.checkpoint.every=0"], "config.checkpoint.every: expected at least 1"),
    (["--config", f"{FILE}:tiny", "--config.train.log_evry=3"], "no such value; did you mean 'train.log_every'?"),
    (["--config", f"{FILE}:tiny", "--config.train.log_evry", "3"], "no such value; did you mean 'train.log_every'?"),
    (["--config", f"{FILE}:tiny", "--config.train.log_every=many"], "--config.train.log_every=many: invalid literal"),
    (["--config", f"{FILE}:tiny", "--config.stages.sft.source=wiki"],
     "sft.source: expected arithmetic or demonstrations, or a path that exists, found 'wiki'"),
    (["--config", f"{FILE}:tiny", "--config.model.overrides={'num_layers': 2}"], "did you mean 'num_hidden_layers'?"),
    (["--config", f"{FILE}:tiny", "--config.order=('sft','rl')"],
     "config.order: expected names of stages, each at most once, of ['dsa_sparse'"),
    (["--config", f"{FILE}:tiny", "--workdirs=x"], "Did you mean: workdir"),
    (["--config", f"{FILE}:tiny", "fast"], "unexpected argument 'fast'"),
])
def test_a_mistyped_command_is_told_in_one_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command.main(["glm5-jax", *argv]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("error: ") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_the_run_directory_is_named_after_the_experiment():
    assert command.parse(["x", "--config", f"{FILE}:small"])[2] == "runs/glm5-small"
    assert command.parse(["x", f"--config={FILE}"])[2] == "runs/glm5"
    config, _, workdir = command.parse(["x", "--config", f"{FILE}:tiny,data=stdlib"])
    assert (config.stages.pretrain.source, workdir) == ("stdlib", "runs/glm5-tiny-data-stdlib")


NAN = float("nan")


def values(**changes):
    config = command.parse(arguments("unused"))[0].to_dict()
    for name, value in changes.items():
        *path, field = name.split("__")
        section = functools.reduce(dict.__getitem__, path, config)
        if value is None:
            del section[field]
        else:
            section[field] = value
    return ml_collections.ConfigDict(config)


@pytest.mark.parametrize("changes, message", [
    ({"train__log_every": None}, "config.train: expected the field 'log_every', found none"),
    ({"train__logevery": 3}, "config.train: unknown field 'logevery'; did you mean 'log_every'?"),
    ({"optimizer__name": "adam"}, "config.optimizer.name: expected one of"),
    ({"train__micro_batches": 3},
     "config.stages.pretrain.batch_size: expected a multiple of train.micro_batches = 3, found 2"),
    ({"train__micro_batches": 0}, "config.train.micro_batches: expected at least 1, found 0"),
    ({"train__loss_chunk": -1}, "config.train.loss_chunk: expected 0 or more, found -1"),
    ({"optimizer__b1": "0.9"}, "config.optimizer.b1: expected float, found str '0.9'"),
    ({"checkpoint__every": 1.5}, "config.checkpoint.every: expected int, found float 1.5"),
    ({"model__preset": "tinny"}, "config.model.preset: expected one of"),
    ({"model__overrides": {"num_nextn_predict_layers": 0}}, "config.train.mtp_steps: expected 0"),
    ({"order": ()}, "config.order: expected names of stages"),
    ({"order": ("sft", "sft")}, "config.order: expected names of stages"),
    ({"order": "sft"}, "config.order: expected a tuple, found 'sft'"),
    ({"order": (1,)}, "config.order[0]: expected str, found int 1"),
    ({"stages": 3}, "config.stages: expected a section of sections, found 3"),
    ({"stages__pretrain__step": 3}, "config.stages.pretrain: unknown field 'step'; did you mean 'steps'?"),
    ({"stages__pretrain__keep": 1}, "config.stages.pretrain.keep: expected bool, found int 1"),
    ({"stages__pretrain__kind": "rl"}, "config.stages.pretrain.kind: expected one of"),
    ({"stages__pretrain__steps": 0}, "config.stages.pretrain.steps: expected at least 1, found 0"),
    ({"model__overrides": 3}, "config.model.overrides: expected a section, found 3"),
    ({"model__overrides": {"n_group": 3}}, "config.model.overrides: ModelConfig.n_group: expected a divisor"),
    ({"model__overrides": {"vocab_size": 4095}},
     "config.model.overrides.vocab_size: expected at least the 4096 entries of the packaged tokenizer, found 4095"),
    ({"stages__pretrain__batch_size": 0}, "config.stages.pretrain.batch_size: expected at least 1, found 0"),
    ({"stages__pretrain__seq_len": 0}, "config.stages.pretrain.seq_len: expected at least 1, found 0"),
    ({"stages__sft__seq_len": 4097},
     "config.stages.sft.seq_len: expected at most max_position_embeddings = 4096 of the model, found 4097"),
    ({"held_out_fraction": 0.0}, "config.held_out_fraction: expected a number between 0 and 1"),
    ({"held_out_fraction": 1}, "config.held_out_fraction: expected a number between 0 and 1"),
    ({"held_out_fraction": NAN}, "config.held_out_fraction: expected a number between 0 and 1"),
    ({"stages__pretrain__learning_rate": 0.0},
     "config.stages.pretrain.learning_rate: expected a number above 0, found 0.0"),
    ({"stages__pretrain__final_learning_rate": NAN},
     "config.stages.pretrain.final_learning_rate: expected a number above 0"),
    ({"stages__pretrain__warmup_steps": -1}, "config.stages.pretrain.warmup_steps: expected at least 0, found -1"),
    ({"stages__pretrain__warmup_steps": 3},
     "config.stages.pretrain.warmup_steps: expected less than steps = 2, found 3"),
    ({"optimizer__weight_decay": -0.1}, "config.optimizer.weight_decay: expected 0 or more, found -0.1"),
    ({"optimizer__b2": 1.0}, "config.optimizer.b2: expected 0 or more and less than 1, found 1.0"),
    ({"train__log_every": 0}, "config.train.log_every: expected at least 1, found 0"),
    *(({f"train__{field}": -1}, f"config.train.{field}: expected 0 or more, found -1") for field in (
        "mtp_steps", "mtp_weight", "balance_weight", "indexer_weight", "router_bias_rate")),
    ({"train__max_grad_norm": NAN}, "config.train.max_grad_norm: expected more than 0, found nan"),
    ({"checkpoint__every": 0}, "config.checkpoint.every: expected at least 1, found 0"),
    ({"checkpoint__keep": 0}, "config.checkpoint.keep: expected at least 1, found 0"),
    ({"sample__prompt": ""}, "config.sample.prompt: expected some text, found ''"),
    ({"sample__max_new_tokens": 0}, "config.sample.max_new_tokens: expected at least 1, found 0"),
    ({"sample__temperature": -0.1}, "config.sample.temperature: expected 0 or more, found -0.1"),
    ({"sample__temperature": NAN}, "config.sample.temperature: expected 0 or more, found nan"),
    ({"seed": -1}, "config.seed: expected 0 or more and less than 2**32, found -1"),
    ({"rl__level": 10}, "config.rl.level: expected 1 to 9, found 10"),
    ({"rl__well": 1.5}, "config.rl.well: expected a share from 0 to 1, found 1.5"),
    ({"rl__max_len": 300}, "config.rl.length: expected at least max_len = 300, found 256"),
    ({**RL_ON, "rl__length": 5000}, "config.rl.length: expected at most max_position_embeddings = 4096 of the model"),
    ({"stages__sft__source": "demonstrations"},
     "config.stages.sft.source: expected something else where rl.order names no stages"),
    ({"rl__order": ("rl",)}, "config.rl.order: expected names of stages"),
    ({"rl__order": ("distillation",)}, "config.rl.stages.distillation.skills: expected skills of stages before it, []"),
    ({**RL_ON, "rl__stages__reasoning_rl__kind": "grpo"}, "config.rl.stages.reasoning_rl.kind: expected one of"),
    ({**RL_ON, "rl__stages__reasoning_rl__skills": ("sum",)}, "config.rl.stages.reasoning_rl.skills: expected some of"),
    ({**RL_ON, "rl__stages__reasoning_rl__size": 1}, "config.rl.stages.reasoning_rl.size: expected at least 2"),
    ({**RL_ON, "rl__stages__reasoning_rl__save_every": 3}, "save_every: expected a divisor of steps = 20, found 3"),
    ({**RL_ON, "rl__stages__reasoning_rl__beta": 0.5},
     "config.rl.stages.reasoning_rl.beta: expected a number of at least 1"),
    ({"rl__optimizer__name": "sgd"}, "config.rl.optimizer.name: expected one of"),
])
def test_values_that_make_no_job(changes, message):
    with pytest.raises(ValueError) as error:
        jobs.resolve(values(**changes))
    assert message in str(error.value)


def test_whole_numbers_stand_for_floats_and_sections_must_be_sections():
    assert jobs.resolve(values(optimizer__weight_decay=1)).optimizer.weight_decay == 1.0
    with pytest.raises(ValueError, match="config.train: expected a section with log_every"):
        jobs.resolve(values(train=3))


def test_bits_per_byte_is_nats_over_ln_2_over_bytes():
    job = jobs.resolve(command.parse(arguments("unused"))[0])
    stage = job.compose()[0]
    shapes = jax.eval_shape(lambda: transformer.init(job.model, jax.random.key(0)))
    uniform = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    rows = pipeline.load(job, stage.name, Tokenizer.packaged())
    first = jax.tree.map(lambda x: x[:3], rows.held_out)
    measured = pipeline._measure(job, stage)(uniform, rows._replace(held_out=first, held_out_bytes=100))
    assert measured == {"bits_per_byte": pytest.approx(first.weights.sum() * 12 / 100)}


def test_conversations_that_say_the_same_are_not_held_out():
    said = [sft.Conversation(({"role": "user", "content": text},), place=f"{text}, {number}")
            for number, text in enumerate("abcabd")]
    train, held_out = pipeline._split(said, 0.25)
    assert [each.place for each in train] == ["a, 0", "b, 1", "c, 2"] and [each.place for each in held_out] == ["d, 5"]
    with pytest.raises(ValueError, match="at least two that differ, to hold one out; found 1"):
        pipeline._split(said[:1] * 2, 0.5)


def test_a_stage_may_read_files_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text("some words " * 30)
    lines = [json.dumps({"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "yes"}]})
             for n in range(4)]
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    job = jobs.resolve(values(stages__pretrain__source=str(tmp_path / "text"), held_out_fraction=0.5,
                              stages__sft__source=str(tmp_path / "said.jsonl")))
    text, said = (pipeline.load(job, name, Tokenizer.packaged()) for name in ("pretrain", "sft"))
    assert text.held_out_bytes == 330 and said.held_out_bytes is None
    assert said.train.weights.sum() > 0 and said.held_out.weights.sum() > 0
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = jobs.resolve(values(stages__pretrain__source="~/text", stages__sft__source="~/said.jsonl",
                                  held_out_fraction=0.5))
    for name, rows in (("pretrain", text), ("sft", said)):
        again = pipeline.load(at_home, name, Tokenizer.packaged())
        jax.tree.map(np.testing.assert_array_equal, again.train, rows.train)
    (tmp_path / "said.jsonl").write_text("")
    with pytest.raises(ValueError, match="said.jsonl: expected a conversation per line, found an empty file"):
        pipeline.load(job, "sft", Tokenizer.packaged())


def test_a_run_that_diverges_says_so_without_a_traceback(tmp_path, capsys, monkeypatch):
    def diverge(job, rundir):
        raise loop.Diverged(7, 3, {"not_finite": 3.0})

    monkeypatch.setattr(pipeline, "run", diverge)
    assert command.main(arguments(tmp_path / "run")) == 2
    assert "error: step 7: the last 3 steps were all skipped (not_finite in 3)" in capsys.readouterr().err
