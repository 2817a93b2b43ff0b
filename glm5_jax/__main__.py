"""The command line: `python -m glm5_jax --config experiments/glm5.py:tiny [--workdir DIR] [--config.train.steps=10]`.

Every value of the experiment file can be overridden. Running the same command again continues an interrupted run.
"""

import pathlib
import re
import shlex
import sys
from typing import Any, Iterator, Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from glm5_jax import job as jobs, pipeline
from glm5_jax.core import compat
from glm5_jax.core.rundir import RunDir
from glm5_jax.train.loop import Interrupted

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job that the arguments name; returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        compat.check_versions()
        config, overrides, workdir = parse(argv)
        job = jobs.resolve(config)
        rundir = RunDir.create(workdir, config=config.to_dict(), overrides=overrides)
        print(f"Run directory: {rundir.path}", flush=True)
        pipeline.run(job, rundir)
    except (flags.Error, OSError, RuntimeError, ValueError) as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"\nStopped after step {stop.step}, which is saved. The same command resumes from there:\n"
              f"  {_command(argv)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(f"\nStopped at once. The same command resumes from the last checkpoint:\n  {_command(argv)}",
              file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> tuple[ConfigDict, dict[str, Any], str]:
    """The experiment's values with the overrides applied, the overrides alone, and the run directory.

    Raises ValueError or absl's `flags.Error` for what cannot be understood, naming the nearest key for a typo.
    """
    plain, names = _without_overrides(argv)
    config, flag_values = _parse(plain)
    known = list(_paths(config))
    for name in names:
        if name not in known:
            raise ValueError(f"--config.{name}: the experiment has no such value{jobs.nearest(name, known)}")
    config, flag_values = _parse(argv)
    overrides = {name: value.to_dict() if isinstance(value, ConfigDict) else value
                 for name, value in config_flags.get_override_values(flag_values["config"]).items()}
    file, _, argument = config_flags.get_config_filename(flag_values["config"]).partition(":")
    experiment = re.sub(r"[^A-Za-z0-9._-]", "-", "-".join(filter(None, [pathlib.Path(file).stem, argument])))
    return config, overrides, flag_values.workdir or f"runs/{experiment}"


def _parse(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=flag_values, sys_argv=list(argv))
    flags.DEFINE_string("workdir", None, "directory of the run; default runs/<experiment>", flag_values=flag_values)
    rest = flag_values(list(argv))[1:]
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; a value is set with --config.{rest[0]}=..., for example")
    given = flag_values["config"].present
    name = config_flags.get_config_filename(flag_values["config"]) if given else ""
    if not pathlib.Path(name.partition(":")[0]).is_file():
        raise ValueError(f"--config: expected an experiment file, found {name or 'none'}; for example "
                         f"--config experiments/glm5.py:tiny")
    return flag_values.config, flag_values


def _without_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments but for `--config.a.b=1` and `--config.a.b 1`, and the names `a.b` of those."""
    plain, names, value_follows = [], [], False
    for argument in argv:
        match = _OVERRIDE.match(argument)
        if match:
            names.append(match[1])
        elif not value_follows or argument.startswith("--"):
            plain.append(argument)
        value_follows = match is not None and "=" not in argument
    return plain, names


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")


def _message(error: BaseException) -> str:
    """What went wrong, without the tracebacks in which absl and ml_collections wrap an error of the experiment file."""
    while "Traceback" in str(error) and error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


def _command(argv: Sequence[str]) -> str:
    return f"python -m glm5_jax {shlex.join(argv[1:])}"


if __name__ == "__main__":
    sys.exit(main())
