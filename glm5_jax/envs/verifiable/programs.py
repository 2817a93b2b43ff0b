"""Programs to write, judged by what they print for inputs that they have not seen."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from glm5_jax.envs.sandbox import Outcome, Sandbox
from glm5_jax.envs.verifiable.task import INSTRUCTION, Dice, Task, graded

SHOWN, HIDDEN = 2, 6
# A longer program is wrong: no task here needs a hundredth of it.
MOST_CHARACTERS = 50_000


@dataclass(frozen=True)
class Problem:
    """`solve(line, k)` gives the line to print for an input line; its source, alone, is also the solution."""

    statement: str
    solve: Callable[[str, int], str]
    draw: Callable[[Dice], str]
    smallest: int  # k
    largest: int


def _multiples(line: str, k: int) -> str:
    return str(sum(int(word) % k == 0 for word in line.split()))


def _rotated(line: str, k: int) -> str:
    words = line.split()
    return " ".join(words[k % len(words):] + words[:k % len(words)])


def _distinct(line: str, k: int) -> str:
    values = sorted(set(map(int, line.split())))
    return str(values[-k]) if k <= len(values) else "none"


def _window(line: str, k: int) -> str:
    values = list(map(int, line.split()))
    return str(max(sum(values[i:i + k]) for i in range(len(values) - k + 1)))


def _runs(line: str, k: int) -> str:
    pieces: list[str] = []
    start = 0
    for end in range(1, len(line) + 1):
        if end == len(line) or line[end] != line[start]:
            if end - start >= k:
                pieces.append(line[start] + str(end - start))
            start = end
    return " ".join(pieces) or "none"


def _depth(line: str, k: int) -> str:
    depth = deepest = 0
    for bracket in line:
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            return "broken"
        deepest = max(deepest, depth)
    if depth:
        return "broken"
    return "deep" if deepest >= k else "flat"


def _numbers(dice: Dice) -> str:
    return " ".join(str(dice.between(-20, 20)) for _ in range(dice.between(6, 12)))


def _letters(dice: Dice) -> str:
    return "".join(dice.choice("abc") * dice.between(1, 4) for _ in range(dice.between(3, 8)))


def _brackets(dice: Dice) -> str:
    pieces = ["()", "(())", "((()))", "(()())", "(((())))"]
    line = "".join(dice.choice(pieces) for _ in range(dice.between(1, 4)))
    return line if dice.below(3) else "".join(dice.shuffled(line))


GRADES = (
    (Problem("The input is a line of integers. Print how many of them are divisible by {k}.",
             _multiples, _numbers, 2, 5),
     Problem("The input is a line of integers. Print them on one line with the first {k} of them moved to the end, in "
             "their order.", _rotated, _numbers, 1, 5)),
    (Problem("The input is a line of integers. Print the number that is number {k} from above among the different "
             "values, or none if there are fewer values.", _distinct, _numbers, 2, 7),
     Problem("The input is a line of at least {k} integers. Print the largest sum of {k} neighbouring ones.",
             _window, _numbers, 2, 5)),
    (Problem("The input is a line of letters. For each longest run of one letter that is at least {k} letters long, "
             "from left to right, print the letter and the length, as in a3 b4, separated by spaces; print none if "
             "there is no such run.", _runs, _letters, 2, 5),
     Problem("The input is a line of round brackets. Print broken if they are not balanced; else deep if they are "
             "nested {k} deep or deeper, and flat if not.", _depth, _brackets, 2, 4)),
)


def programs(seed: int, *, sandbox: Sandbox, level: int = 1) -> Task:
    """A Python program to write for one line of input; levels 1 to 3.

    An answer is the program, with or without a Markdown fence around it. It runs in `sandbox` once for each hidden
    input, alone with it: what it should print never enters the sandbox, and is compared on this side, outer white space
    aside. Failing one input is failing. Checking raises what the sandbox raises if it cannot be made, and RuntimeError
    if it was killed from outside.
    """
    dice = Dice("programs", level, seed)
    problem = dice.choice(graded(level, GRADES))
    k = dice.between(problem.smallest, problem.largest)
    inputs = _inputs(dice, problem, k)
    expected = [problem.solve(line, k) for line in inputs]
    examples = "\n".join(f"Input: {line}\nOutput: {output}" for line, output in zip(inputs[:SHOWN], expected))
    prompt = (f"Write a Python program that reads standard input and prints to standard output. "
              f"{problem.statement.format(k=k)}\n{examples}\nThe answer is the program. {INSTRUCTION}")
    source = inspect.getsource(problem.solve)
    solution = f"{source}\n\nprint({problem.solve.__name__}(input(), {k}))"
    hidden = list(zip(inputs, expected))[SHOWN:]
    return Task(f"programs-{level}", seed, prompt, solution, lambda answer: _passes(answer, hidden, sandbox))


def _inputs(dice: Dice, problem: Problem, k: int) -> list[str]:
    """Different inputs, to whose hidden part no single output is right, nor the shown outputs alone."""
    while True:
        inputs: list[str] = []
        while len(inputs) < SHOWN + HIDDEN:
            line = problem.draw(dice)
            if line not in inputs:
                inputs.append(line)
        if len({problem.solve(line, k) for line in inputs[SHOWN:]}) > 1:
            return inputs


def _passes(answer: str, tests: list[tuple[str, str]], sandbox: Sandbox) -> bool:
    # Neither a long program nor lone surrogates may look like a failure of the sandbox.
    if len(answer) > MOST_CHARACTERS:
        return False
    fenced = re.fullmatch(r"```\w*\n(.*?)\n?```", answer, re.DOTALL)
    program = (fenced[1] if fenced else answer).encode("utf-8", "surrogatepass")
    for line, expected in tests:
        result = sandbox.run([sandbox.python, "-I", "program.py"], stdin=line + "\n", files={"program.py": program})
        if result.outcome is Outcome.KILLED:  # from outside: no fault of the program
            raise RuntimeError("the sandbox of a program was killed from outside; check it again")
        if result.outcome is not Outcome.EXIT or result.returncode != 0 or result.stdout.strip() != expected:
            return False
    return True
