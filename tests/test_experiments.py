"""Every experiment file: builds for each of its arguments, holds values alone, and explains itself."""

import importlib.util
import json
import pathlib

import ml_collections
import pytest

from glm5_jax import job as jobs

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


def listed(value):
    """Lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {name: listed(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path, argument", CASES, ids=named)
def test_builds_from_values_alone(path, argument):
    config = load(path).get_config(argument)
    assert isinstance(config, ml_collections.ConfigDict)
    values = config.to_dict()  # numbers, strings, tuples: no objects
    assert json.loads(json.dumps(values)) == listed(values)
    job = jobs.resolve(config)
    stages = job.compose()
    assert [stage.name for stage in stages] == list(job.order)
    assert [stage.name.partition("_")[0] for stage in stages][:2] == ["pretrain", "midtrain"]
    assert stages[-1].name == "sft" and job.train.log_every <= max(stage.steps for stage in stages)


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
        plain, chosen = (module.get_config(text).to_dict() for text in (argument, f"{argument},data=stdlib"))
        for name, stage in chosen["stages"].items():
            assert stage["source"] == ("demonstrations" if stage["kind"] == "sft" else "stdlib")
            assert {**stage, "source": None} == {**plain["stages"][name], "source": None}
    for option in ("steps=3", "stdlib", ""):
        with pytest.raises(ValueError, match=f"expected the option data=..., found '{option}'"):
            module.get_config(f"{module.ARGUMENTS[0]},{option}")
