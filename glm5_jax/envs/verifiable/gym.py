"""Tasks of reasoning-gym (extra `tasks`), more than a hundred generators with checkers."""

import inspect
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

from glm5_jax.envs.verifiable.task import INSTRUCTION, Task

# Some checkers of the package hand the answer to `eval`, or to sympy, which does the same.
EVALUATING = re.compile(r"\b(eval|parse_expr|sympify)\(")
FORMULA = re.compile(r"[\w\s.,+\-*/()=]{1,500}")
PLAIN_LIST = re.compile(r"[\w\s.,'\"\[\]()-]{1,5000}")
FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
# Towers of powers and exponentials of exponentials would take for ever; these do not, and are replaced in this order.
SMALL = r"\s*\*\*\s*(?:[0-9]{1,2}|\(-?[0-9]{1,2}(?:/[0-9]{1,2})?\))(?!\w)(?!\s*\*\*)"
QUICK = ((re.compile(r"\b(?:exp|sinh|cosh)\s*\([^()]*\)"), "(0)"), (re.compile(r"\b[a-zA-Z]" + SMALL), "0"),
         (re.compile(r"\((?:[^()*]|\*(?!\*))*\)" + SMALL), "0"))
MOST_CHARACTERS = 20_000

_log = logging.getLogger(__name__)


def reasoning_gym_tasks(name: str, **config: Any) -> Callable[[int], Task]:
    """A generator of tasks from the data set `name` of reasoning-gym; `config` goes to the data set.

    An answer is right if it is the package's own, or if the checker of the data set gives it full marks. The checker
    runs in this process without a time limit, and where its module evaluates text, it sees `harmless` answers alone.
    Raises ImportError without the package, ValueError for a data set whose checker takes anything for an answer, and
    what the package raises for an unknown data set or setting.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("reasoning_gym_tasks needs reasoning-gym, which is not installed: "
                          "pip install 'glm5-jax[tasks]'") from error

    def make(seed: int) -> Task:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=1, **config)
        entry = dataset[0]
        solution = str(entry["answer"]).strip()
        return Task(f"reasoning_gym/{name}", seed, f"{entry['question']}\n{INSTRUCTION}", solution,
                    lambda answer: answer == solution or _full_marks(dataset, entry, answer))

    if all(make(seed).check("...") for seed in range(3)):
        raise ValueError(f"name: expected a data set whose checker refuses a wrong answer, but {name!r} takes '...'")
    return make


def _full_marks(dataset: Any, entry: dict, answer: str) -> bool:
    if len(answer) > MOST_CHARACTERS or _evaluates(dataset) and not harmless(answer):
        return False
    try:
        return dataset.score_answer(answer, entry) >= 1
    except Exception as error:  # the package raises for some answers that it cannot read
        _log.warning("reasoning-gym could not check an answer to %s: %r", entry.get("metadata"), error)
        return False


def _evaluates(dataset: Any) -> bool:
    """Whether the module of the data set evaluates text by Python; where it cannot be read, it is taken to."""
    try:
        source = inspect.getsource(sys.modules[type(dataset).__module__])
    except OSError:
        return True
    return any(f"def {function}(" not in source for function in EVALUATING.findall(source))


def harmless(answer: str) -> bool:
    """Whether `answer` is a short formula or list, which may be evaluated.

    It has one-letter names, numbers and the known functions in a formula, one-letter words and numbers in a list, and
    no attributes, no other calls, no towers of powers or exponentials.
    """
    words = set(re.findall(r"\b[^\W\d]\w*", answer))
    if "__" in answer or re.search(r"\.\s*[^\W\d]", answer):
        return False
    if answer.startswith("["):
        return bool(PLAIN_LIST.fullmatch(answer) and not re.search(r"[\w\])'\"]\s*\(", answer)
                    and all(len(word) == 1 for word in words))
    slow = answer
    for quick, value in QUICK:
        slow = quick.sub(value, slow)
    return bool(FORMULA.fullmatch(answer) and not re.search(r"\*\*|exp|sinh|cosh", slow)
                and all(len(word) == 1 or word in FUNCTIONS for word in words))
