"""Lists to sort and words to transform."""

import re
from collections.abc import Callable

from glm5_jax.envs.verifiable.task import INSTRUCTION, Dice, Task, graded

# How many numbers, the smallest and the largest.
SORTING_GRADES = ((3, 0, 9), (5, 0, 9), (6, 0, 99), (10, -99, 99), (20, -999, 999))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TRANSFORMS: dict[str, Callable[[str], str]] = {
    "reverse it": lambda word: word[::-1],
    "remove every vowel (a, e, i, o, u)": lambda word: "".join(c for c in word if c not in "aeiou"),
    "write every letter twice in a row": lambda word: "".join(c + c for c in word),
    "move its first letter to the end": lambda word: word[1:] + word[0],
    "keep its first, third, fifth letter and so on": lambda word: word[::2],
    "replace every letter by the next one of the alphabet (z by a)":
        lambda word: "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in word),
    "sort its letters alphabetically": lambda word: "".join(sorted(word)),
}


def sorting(seed: int, *, level: int = 1) -> Task:
    """A list of integers to sort, repeated ones included; levels 1 to 5.

    An answer is the numbers in order with commas or white space between them, and nothing else.
    """
    count, low, high = graded(level, SORTING_GRADES)
    dice = Dice("sorting", level, seed)
    numbers = [dice.between(low, high) for _ in range(count)]
    falling = dice.below(2) == 1
    right = sorted(numbers, reverse=falling)
    order = "from largest to smallest" if falling else "from smallest to largest"
    prompt = (f"Sort these numbers {order}: {', '.join(map(str, numbers))}. "
              f"Separate them by commas. {INSTRUCTION}")
    return Task(f"sorting-{level}", seed, prompt, ", ".join(map(str, right)),
                lambda answer: parse_integers(answer) == right)


def strings(seed: int, *, level: int = 1) -> Task:
    """A word of small letters and `level` changes to make to it, one after the other; levels 1 to 6.

    An answer is the resulting word, letter for letter.
    """
    changes = graded(level, range(1, 7))
    dice = Dice("strings", level, seed)
    word = "".join(dice.choice(LETTERS) for _ in range(4 + 2 * level))
    result = word
    steps: list[str] = []
    while len(steps) < changes:
        step = dice.choice(list(TRANSFORMS))
        if changed := TRANSFORMS[step](result):
            result = changed
            steps.append(step)
    prompt = f"Take the word {word}; {', then '.join(steps)}. What is the result? {INSTRUCTION}"
    return Task(f"strings-{level}", seed, prompt, result, lambda answer: answer == result)


def parse_integers(text: str) -> list[int] | None:
    """The integers of a text like `3, -1, 7`, at most 20 digits each; None if it holds anything else."""
    pieces = re.split(r"\s*,\s*|\s+", text)
    return [int(piece) for piece in pieces] if all(re.fullmatch("-?[0-9]{1,20}", piece) for piece in pieces) else None
