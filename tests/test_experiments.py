"""Every experiment file: builds for each of its arguments, holds values alone, and explains itself."""

import importlib.util
import json
import pathlib

import ml_collections
import pytest

from glm5_jax import pipeline

# sweep.py runs many experiments and is none.
EXPERIMENTS = sorted(path for path in (pathlib.Path(__file__).parents[1] / "experiments").glob("*.py")
                     if path.name != "sweep.py")


def load(path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = [(path, argument) for path in EXPERIMENTS for argument in load(path).ARGUMENTS]


def named(value):
    return value.stem if isinstance(value, pathlib.Path) else value


def test_the_main_job_is_there():
    assert ("glm5", "tiny") in [(path.stem, argument) for path, argument in CASES]


@pytest.mark.parametrize("path, argument", CASES, ids=named)
def test_builds_from_values_alone(path, argument):
    config = load(path).get_config(argument)
    assert isinstance(config, ml_collections.ConfigDict)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()  # numbers, strings, lists: no objects
    job = pipeline.resolve(config)
    assert job.data.seq_len <= job.model.max_position_embeddings
    assert job.train.log_every <= job.train.steps


@pytest.mark.parametrize("path", EXPERIMENTS, ids=named)
def test_explains_itself_and_lists_its_arguments(path):
    module = load(path)
    assert module.get_config().to_dict() == module.get_config(module.ARGUMENTS[0]).to_dict()
    assert f"--config experiments/{path.name}:" in module.__doc__
    assert all(f"\n{argument} " in module.__doc__ for argument in module.ARGUMENTS)
    with pytest.raises(ValueError, match=f"expected one of {', '.join(module.ARGUMENTS)}, found 'huge'"):
        module.get_config("huge")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=named)
def test_options_choose_the_text(path):
    module = load(path)
    for argument in module.ARGUMENTS:
        plain = module.get_config(argument).to_dict()
        for option in module.OPTIONS:
            chosen = module.get_config(f"{argument},{option}").to_dict()
            assert chosen["data"].pop("source") == option.removeprefix("data=")
            assert {**chosen, "data": None} == {**plain, "data": None}
            assert chosen["data"].keys() == plain["data"].keys() - {"source"}
    for option in ("data=wiki", "steps=3", "stdlib", ""):
        with pytest.raises(ValueError, match=f"expected an option of {', '.join(module.OPTIONS)}, found '{option}'"):
            module.get_config(f"{module.ARGUMENTS[0]},{option}")
