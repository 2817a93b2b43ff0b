"""Logic puzzles with one solution, shown to be the only one by trying all."""

import itertools
import re
from collections.abc import Callable, Sequence

from glm5_jax.envs.verifiable.task import INSTRUCTION, Dice, Task, graded

NAMES = ("Ann", "Bob", "Cid", "Dee", "Eve", "Fay", "Gil")
# What is said, and whether it is true in a world: of kinds (True is a knight), or of an order (people by place).
Statement = tuple[str, Callable[[Sequence], bool]]


def knights(seed: int, *, level: int = 1) -> Task:
    """Who is a knight and who a knave, from one statement of each; level + 1 people, levels 1 to 6.

    An answer is `Ann: knight, Bob: knave` with everybody in it exactly once, in any order and case.
    """
    people = NAMES[:graded(level, range(2, 8))]
    dice = Dice("knights", level, seed)
    while True:
        said = [_claim(dice, people, speaker) for speaker in range(len(people))]
        worlds = [world for world in itertools.product((True, False), repeat=len(people))
                  if all(claim(world) == knight for (_, claim), knight in zip(said, world))]
        if len(worlds) == 1:
            break
    right = {name.lower(): "knight" if knight else "knave" for name, knight in zip(people, worlds[0])}
    lines = "\n".join(f'{name} says: "{text}"' for name, (text, _) in zip(people, said))
    prompt = (f"Knights always tell the truth, knaves always lie, and everybody here is one or the other.\n{lines}\n"
              f"What is each? Answer in the form: Name: knight, Name: knave. {INSTRUCTION}")
    solution = ", ".join(f"{name}: {right[name.lower()]}" for name in people)
    return Task(f"knights-{level}", seed, prompt, solution, lambda answer: _parse_kinds(answer) == right)


def queue(seed: int, *, level: int = 1) -> Task:
    """In which order people stand, from clues of which none can be spared; level + 2 people, levels 1 to 5.

    An answer is the names from first to last with commas or white space between them, in any case.
    """
    people = NAMES[:graded(level, range(3, 8))]
    dice = Dice("queue", level, seed)
    hidden = dice.shuffled(people)
    orders = list(itertools.permutations(people))
    left = orders
    clues: list[tuple[str, set]] = []  # each with the orders that it allows
    for text, holds in dice.shuffled([clue for clue in _clues(people) if clue[1](hidden)]):
        fewer = [order for order in left if holds(order)]
        if len(fewer) < len(left):
            clues.append((text, {order for order in orders if holds(order)}))
            left = fewer
    for clue in list(clues):
        others = [other for other in clues if other is not clue]
        if len(set.intersection(set(orders), *(allowed for _, allowed in others))) == 1:
            clues = others
    lines = "\n".join(text for text, _ in clues)
    prompt = (f"{', '.join(people[:-1])} and {people[-1]} stand in a queue.\n{lines}\n"
              f"Name them from first to last, separated by commas. {INSTRUCTION}")
    right = [name.lower() for name in hidden]
    return Task(f"queue-{level}", seed, prompt, ", ".join(hidden),
                lambda answer: re.split(r"\s*,\s*|\s+", answer.lower()) == right)


def _claim(dice: Dice, people: Sequence[str], speaker: int) -> Statement:
    """Something that `speaker` may say about the others, or about how many knights there are."""
    one, *rest = dice.shuffled([i for i in range(len(people)) if i != speaker])
    form = dice.below(4 if rest else 3)
    if form == 0:
        return f"{people[one]} is a knave.", lambda kinds: not kinds[one]
    if form == 1:
        return f"{people[one]} and I are of the same kind.", lambda kinds: kinds[one] == kinds[speaker]
    if form == 2:
        count = dice.between(0, len(people))
        return f"Exactly {count} of us are knights.", lambda kinds: sum(kinds) == count
    two = rest[0]
    return f"{people[one]} is a knight or {people[two]} is a knave.", lambda kinds: kinds[one] or not kinds[two]


def _clues(people: Sequence[str]) -> list[Statement]:
    """Every clue that can be given, true or not."""
    pairs = list(itertools.permutations(people, 2))
    return ([_before(a, b) for a, b in pairs] + [_beside(a, b) for a, b in pairs]
            + [_elsewhere(a, place) for a in people for place in range(len(people))])


def _before(a: str, b: str) -> Statement:
    return f"{a} stands somewhere before {b}.", lambda order: order.index(a) < order.index(b)


def _beside(a: str, b: str) -> Statement:
    return f"{a} stands next to {b}.", lambda order: abs(order.index(a) - order.index(b)) == 1


def _elsewhere(a: str, place: int) -> Statement:
    return f"{a} is not number {place + 1}.", lambda order: order[place] != a


def _parse_kinds(text: str) -> dict[str, str] | None:
    """{name: kind} in small letters; None for anything but a list of them, or for a name that comes twice."""
    found = [re.fullmatch(r"\s*([a-z]+)\s*:\s*(knight|knave)\s*", piece) for piece in text.lower().split(",")]
    kinds = {match[1]: match[2] for match in found if match}
    return kinds if len(kinds) == len(found) else None
