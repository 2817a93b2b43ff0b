import ast
import functools
import hashlib
import itertools
import operator
import re
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path

import pytest

from glm5_jax.envs.base import Step
from glm5_jax.envs.episode import run_episode
from glm5_jax.envs.sandbox import Limits, Outcome, Sandbox
from glm5_jax.envs.verifiable.arithmetic import arithmetic, parse_number
from glm5_jax.envs.verifiable.chains import products, sums, turns
from glm5_jax.envs.verifiable.gym import harmless, reasoning_gym_tasks
from glm5_jax.envs.verifiable.programs import GRADES, HIDDEN, MOST_CHARACTERS, programs
from glm5_jax.envs.verifiable.puzzles import knights, queue
from glm5_jax.envs.verifiable.sequences import TRANSFORMS, sorting, strings
from glm5_jax.envs.verifiable.task import Dice, Task, Verifiable, final_answer, graded
from glm5_jax.records import EndReason

ROOT = Path(__file__).parents[2]
FAMILIES = {arithmetic: 8, sorting: 5, strings: 6, knights: 6, queue: 5, sums: 9, products: 9, turns: 9}
LEVELS = [pytest.param(family, level, id=f"{family.__name__}-{level}")
          for family, highest in FAMILIES.items() for level in range(1, highest + 1)]
# Half a minute, so that a slow machine makes no answer wrong.
SANDBOX = Sandbox(limits=Limits(wall_s=30))


def say(content):
    return {"role": "assistant", "content": content}


def tag(answer):
    return f"<answer>{answer}</answer>"


# The answer of a reply

@pytest.mark.parametrize("content, answer", [
    ("It is <answer>4</answer>.", "4"),
    ("<answer>\n 4\t</answer>", "4"),
    ("<answer></answer>", ""),
    ("<answer>3</answer> no, <answer>4</answer>", "4"),
    ("<answer>3<answer>4</answer>", "4"),
    ("<answer>4</answer></answer>", "4</answer>"),
    ("<answer>4</answer><answer>5", "4"),
    ("</answer>4<answer>", None),
    ("<answer>4", None),
    ("4</answer>", None),
    ("<Answer>4</Answer>", None),
    ("4", None),
    ("", None),
    (None, None),
    (4, None),
    ([{"type": "text", "text": "<answer>"}, {"type": "text", "text": "4</answer>"}, {"type": "image"}, 3], "4"),
    ("<answer>" * 100_000 + "4</answer>", "4"),
], ids=lambda value: repr(value)[:30])
def test_the_answer_is_in_the_last_pair(content, answer):
    assert final_answer({"role": "assistant", "content": content}) == answer


def test_reasoning_holds_no_answer():
    assert final_answer({"role": "assistant", "reasoning_content": tag(4), "content": "4"}) is None
    assert final_answer({"role": "assistant", "reasoning_content": tag(4)}) is None


# Dice and seeds

def test_dice_are_fair_and_repeatable():
    rolls = [Dice("a", seed).between(1, 6) for seed in range(6000)]
    assert all(850 < rolls.count(face) < 1150 for face in range(1, 7))
    assert rolls == [Dice("a", seed).between(1, 6) for seed in range(6000)]
    assert Dice("a", 1).shuffled(range(50)) != list(range(50)) == sorted(Dice("a", 1).shuffled(range(50)))
    orders = [tuple(Dice("b", seed).shuffled("abc")) for seed in range(6000)]
    assert len(set(orders)) == 6 and all(850 < orders.count(order) < 1150 for order in set(orders))


def digest():
    """Of the first tasks of every family and level; what they check by is left out."""
    tasks = [family(seed, level=level) for family, highest in FAMILIES.items() for level in range(1, highest + 1)
             for seed in range(3)]
    tasks += [programs(seed, sandbox=SANDBOX, level=level) for level in (1, 2, 3) for seed in range(3)]
    text = "\n".join(f"{task.name} {task.seed} {task.prompt} {task.solution}" for task in tasks)
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_same_seed_is_the_same_task_on_every_python():
    assert digest() == "d9424ec434df49fe2281e8d129ca9ad9ac82f3eddbc55715648dc61f34d199bf"


def test_a_seed_does_not_depend_on_the_hashing_of_this_process():
    program = ("from glm5_jax.envs.verifiable.puzzles import queue\n"
               "from glm5_jax.envs.verifiable.sequences import strings\n"
               "print(queue(5, level=3).prompt, strings(5, level=3).prompt)")
    printed = [subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, cwd=ROOT,
                              capture_output=True, text=True, check=True).stdout for seed in ("1", "2")]
    assert printed[0] == printed[1] and "queue" in printed[0]


def test_an_unknown_level_is_named():
    for family, highest in FAMILIES.items():
        for level in (0, highest + 1, -1):
            with pytest.raises(ValueError, match=f"level: expected 1 to {highest}( steps)?, found {level}"):
                family(0, level=level)
    assert graded(2, "abc") == "b"


# What holds for every family

@pytest.mark.parametrize("family, level", LEVELS)
def test_the_solution_scores_and_the_echo_of_the_prompt_does_not(family, level):
    tasks = [family(seed, level=level) for seed in range(30)]
    for seed, task in enumerate(tasks):
        assert (task.seed, task.name) == (seed, f"{family.__name__}-{level}")
        assert task.reward(say(tag(task.solution))) == 1
        assert task.reward(say(f"{task.prompt}\nSo {tag(f' {task.solution} ')}.")) == 1
        assert task.reward(say(task.prompt)) == 0
        assert task.reward(say(task.solution)) == 0
        assert task.reward(say(f"{tag(task.solution)} {tag('')}")) == 0
    assert len({task.prompt for task in tasks}) > 10


HOSTILE = ["", " ", "...", "0", "\0", "\ud800", "٣", "nan", "inf", "1e999999999", "9" * 5000, "1" * 100 + "/0", "0/0",
           "__import__('os').abort()", "None", "True", "a" * 300_000, " " * 300_000, "1," * 100_000, "," * 100_000,
           "(" * 100_000, "Ann:" * 50_000, "Ann: knight, " * 20_000, "{0.__class__}", "%s", "</answer><answer>", "-",
           "<answer>"]


@pytest.mark.parametrize("family, level", LEVELS)
def test_hostile_answers_are_wrong_and_nothing_else(family, level):
    task = next(task for seed in range(9) if (task := family(seed, level=level)).solution != "0")
    for answer in HOSTILE:
        assert task.check(answer) is False, answer[:30]


@pytest.mark.parametrize("family, level", LEVELS)
def test_all_answers_at_once_are_no_answer(family, level):
    tasks = [family(seed, level=level) for seed in range(10)]
    for task in tasks:
        wrong = sorted({other.solution for other in tasks} - {task.solution})
        for joint in ("\n", " ", ", ", " or ", "; "):
            assert not task.check(joint.join([task.solution, *wrong[:3]]))
            assert not task.check(joint.join([task.solution, task.solution]))
        assert task.reward(say("".join(map(tag, [task.solution, wrong[0]])))) == float(task.check(wrong[0]))


# Each family against an independent reading of its prompt

def evaluate(node):
    """The value of a parsed expression, in exact fractions."""
    if isinstance(node, ast.Expression):
        return evaluate(node.body)
    if isinstance(node, ast.BinOp):
        apply = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
        return apply[type(node.op)](evaluate(node.left), evaluate(node.right))
    return Fraction(node.value)


@pytest.mark.parametrize("level", range(1, 9))
def test_arithmetic(level):
    for seed in range(60):
        task = arithmetic(seed, level=level)
        value = evaluate(ast.parse(re.match(r"What is (.*?)\?", task.prompt)[1], mode="eval"))
        assert task.solution == str(value)
        for near in (value + 1, -value, value + Fraction(1, 10**30), 1 / value if value else 1):
            assert task.check(str(near)) == (near == value)
        assert task.check(f"{value.numerator * 3}/{value.denominator * 3}")
        for odd in ("+", "=", "about ", "0x"):
            assert not task.check(odd + task.solution)
        assert not task.check(task.solution + ".") and not task.check(task.solution + " or 1")


def test_arithmetic_grows_with_the_level():
    numbers = [len(re.findall(r"\d+", re.match(r"What is (.*?)\?", arithmetic(0, level=level).prompt)[1]))
               for level in range(1, 9)]
    assert numbers == [2, 2, 2, 3, 3, 4, 5, 6]
    assert any("/" in arithmetic(seed, level=5).solution for seed in range(20))
    assert not any("/" in arithmetic(seed, level=4).prompt.split("?")[0] for seed in range(50))


@pytest.mark.parametrize("text, value", [
    ("12", 12), ("-7/3", Fraction(-7, 3)), ("14/6", Fraction(7, 3)), ("0.25", Fraction(1, 4)), ("-0", 0), ("007", 7),
    ("0.1", Fraction(1, 10)), ("1/0", None), ("1/00", None), ("1/2/3", None), ("1.5/2", None), ("1e3", None),
    ("1_0", None), ("1,000", None), ("+1", None), (".5", None), ("5.", None), ("- 1", None), ("½", None), ("1\n", None),
    ("1/-2", None), ("9" * 101, None)])
def test_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("level", range(1, 6))
def test_sorting(level):
    for seed in range(30):
        task = sorting(seed, level=level)
        order, listed = re.match(r"Sort these numbers from (\w+) to \w+: ([-\d, ]+)\.", task.prompt).groups()
        numbers = [int(number) for number in listed.split(", ")]
        right = sorted(numbers) if order == "smallest" else sorted(numbers)[::-1]
        assert task.solution == ", ".join(map(str, right))
        assert task.check(" ".join(map(str, right))) and task.check("\n".join(map(str, right)))
        assert task.check(",".join(map(str, right)))
        for near in (right[1:], right[:-1], right + right[-1:], numbers, right[::-1], [right[0] + 1, *right[1:]]):
            assert task.check(", ".join(map(str, near))) == (near == right)
        for odd in (f"[{task.solution}]", task.solution + ",", task.solution + ".", task.solution.replace(",", ";")):
            assert not task.check(odd)


def test_each_transform_by_hand():
    assert {step: change("sazbe") for step, change in TRANSFORMS.items()} == {
        "reverse it": "ebzas",
        "remove every vowel (a, e, i, o, u)": "szb",
        "write every letter twice in a row": "ssaazzbbee",
        "move its first letter to the end": "azbes",
        "keep its first, third, fifth letter and so on": "sze",
        "replace every letter by the next one of the alphabet (z by a)": "tbacf",
        "sort its letters alphabetically": "abesz",
    }


@pytest.mark.parametrize("level", range(1, 7))
def test_strings(level):
    for seed in range(30):
        task = strings(seed, level=level)
        word, changes = re.match(r"Take the word (\w+); (.*)\. What is", task.prompt).groups()
        steps = changes.split(", then ")
        assert len(steps) == level and len(word) == 4 + 2 * level
        result = functools.reduce(lambda word, step: TRANSFORMS[step](word), steps, word)
        assert task.solution == result != ""
        for near in (result[1:], result + "a", result.upper(), f'"{result}"', " ".join(result) + " ."):
            assert not task.check(near)


def truth(text, speaker, world):
    """Whether a statement holds, from its words alone."""
    if match := re.fullmatch(r"(\w+) is a knave\.", text):
        return world[match[1]] == "knave"
    if match := re.fullmatch(r"(\w+) and I are of the same kind\.", text):
        return world[match[1]] == world[speaker]
    if match := re.fullmatch(r"Exactly (\d+) of us are knights\.", text):
        return list(world.values()).count("knight") == int(match[1])
    match = re.fullmatch(r"(\w+) is a knight or (\w+) is a knave\.", text)
    return world[match[1]] == "knight" or world[match[2]] == "knave"


@pytest.mark.parametrize("level", range(1, 7))
def test_knights(level):
    forms = set()
    for seed in range(30):
        task = knights(seed, level=level)
        said = dict(re.findall(r'^(\w+) says: "(.*)"$', task.prompt, re.MULTILINE))
        assert len(said) == level + 1
        forms |= {re.sub(r"[A-Z]\w\w |\d", "", text) for text in said.values()}
        worlds = [dict(zip(said, kinds)) for kinds in itertools.product(("knight", "knave"), repeat=len(said))]
        possible = [world for world in worlds if all(
            truth(text, name, world) == (world[name] == "knight") for name, text in said.items())]
        assert len(possible) == 1
        assert task.solution == ", ".join(f"{name}: {kind}" for name, kind in possible[0].items())
        assert [world for world in worlds if task.check(", ".join(f"{n}: {k}" for n, k in world.items()))] == possible
        pieces = task.solution.split(", ")
        assert task.check(",".join(pieces[::-1]).upper())
        other = pieces[0].replace("knight", "x").replace("knave", "knight").replace("x", "knave")
        for near in (pieces[1:], pieces + [other], [other, *pieces], pieces + ["Zoe: knight"], pieces + [""]):
            assert not task.check(", ".join(near))
    assert len(forms) == (3 if level == 1 else 4)


@pytest.mark.parametrize("level", range(1, 6))
def test_queue(level):
    for seed in range(12):
        task = queue(seed, level=level)
        people = re.findall(r"[A-Z]\w+", task.prompt.split(" stand")[0])
        assert len(people) == level + 2
        clues = re.findall(r"^(\w+) (stands somewhere before|stands next to|is not number) (\w+)\.$", task.prompt,
                           re.MULTILINE)

        def holds(order, clue):
            a, relation, b = clue
            place = order.index(a)
            if relation == "is not number":
                return place + 1 != int(b)
            other = order.index(b)
            return place < other if relation == "stands somewhere before" else abs(place - other) == 1

        orders = list(itertools.permutations(people))
        possible = [order for order in orders if all(holds(order, clue) for clue in clues)]
        assert [", ".join(order) for order in possible] == [task.solution]
        for spared in clues:
            assert sum(all(holds(order, clue) for clue in clues if clue != spared) for order in orders) > 1
        assert task.check(" ".join(possible[0]).lower())
        assert [order for order in orders if task.check(", ".join(order))] == possible


# Programs

PROBLEMS = [problem for grade in GRADES for problem in grade]


@pytest.mark.parametrize("line, k, outputs", [
    ("4 -6 7 0 3", 3, ["3", "0 3 4 -6 7", "3", "10", None, None]),
    ("5 5 2", 2, ["1", "2 5 5", "2", "10", None, None]),
    ("1", 2, ["0", "1", "none", None, None, None]),
    ("aaabbcaa", 2, [None] * 4 + ["a3 b2 a2", None]),
    ("abc", 2, [None] * 4 + ["none", None]),
    ("(())()", 2, [None] * 5 + ["deep"]),
    ("()()", 2, [None] * 5 + ["flat"]),
    ("())(", 1, [None] * 5 + ["broken"]),
    ("((", 1, [None] * 5 + ["broken"]),
])
def test_the_problems_by_hand(line, k, outputs):
    for problem, output in zip(PROBLEMS, outputs, strict=True):
        assert output is None or problem.solve(line, k) == output


class Recorder:
    """Stands for a sandbox: runs the program here, and keeps what it was given."""

    python = sys.executable

    def __init__(self, outcome=Outcome.EXIT, returncode=0):
        self.outcome, self.returncode, self.calls = outcome, returncode, []

    def run(self, command, *, stdin, files):
        self.calls.append((command, stdin, files))
        output = []
        exec(compile(files["program.py"], "program.py", "exec"),
             {"input": lambda: stdin.removesuffix("\n"), "print": output.append})
        return types.SimpleNamespace(outcome=self.outcome, returncode=self.returncode,
                                     stdout="".join(f"{line}\n" for line in output))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_programs_are_judged_outside_on_inputs_nobody_has_seen(level):
    for seed in range(20):
        sandbox = Recorder()
        task = programs(seed, sandbox=sandbox, level=level)
        assert task.check(task.solution)
        assert task.check(f"```python\n{task.solution}\n```") and task.check(f"```\n{task.solution}```")
        calls = sandbox.calls[:HIDDEN]
        assert len(sandbox.calls) == 3 * HIDDEN
        shown = dict(re.findall(r"Input: (.*)\nOutput: (.*)", task.prompt))
        inputs = [stdin.removesuffix("\n") for _, stdin, _ in calls]
        assert len(shown) == 2 and len(set(inputs) | set(shown)) == 2 + HIDDEN
        assert not any(line in task.prompt.replace("Input: ", "\n").split("\n") for line in inputs)
        problem = next(one for one in PROBLEMS if one.solve.__name__ in task.solution)
        k = int(re.search(r", (\d)\)\)$", task.solution)[1])
        for command, stdin, files in calls:  # nothing of what is right goes in
            assert command == [sys.executable, "-I", "program.py"]
            assert files == {"program.py": task.solution.encode()}
        assert all(problem.solve(line, k) == output for line, output in shown.items())
        assert len({problem.solve(line, k) for line in inputs}) > 1
        for wrong in (f"print({shown!r}.get(input(), ''))", "print(input())", "", "...",
                      *(f"print({problem.solve(line, k)!r})" for line in inputs)):
            assert not task.check(wrong)


@pytest.mark.parametrize("outcome, returncode", [(Outcome.EXIT, 1), (Outcome.EXIT, None), *(
    (outcome, code) for outcome in Outcome if outcome not in (Outcome.EXIT, Outcome.KILLED) for code in (0, None))])
def test_right_output_from_a_failed_run_is_wrong(outcome, returncode):
    task = programs(0, sandbox=Recorder(outcome, returncode))
    assert not task.check(task.solution)


def test_a_sandbox_killed_from_outside_is_no_wrong_answer():
    task = programs(0, sandbox=Recorder(Outcome.KILLED, None))
    with pytest.raises(RuntimeError, match="killed from outside"):
        task.check(task.solution)


def test_a_long_program_never_reaches_the_sandbox():
    sandbox = Recorder()
    task = programs(0, sandbox=sandbox)
    assert not task.check(task.solution + "#" * MOST_CHARACTERS) and sandbox.calls == []


def test_a_sandbox_that_fails_is_a_failed_episode():
    class Broken(Recorder):
        def run(self, command, *, stdin, files):
            raise OSError("no room")

    one = run_episode(Verifiable(functools.partial(programs, sandbox=Broken())), lambda *_: say(tag("print(1)")),
                      task="programs", seed=0)
    assert one.end is EndReason.FAILED and one.failure.detail == "OSError: no room"


def test_programs_in_the_real_sandbox():
    task = programs(0, sandbox=SANDBOX)
    assert task.check(task.solution)
    cheats = ["print('\ud800')", "import sys; sys.exit(0)", "raise SystemExit", "\0", "import os; os.abort()",
              f"{task.solution}\nimport os; os._exit(3)", f"{task.solution}\nprint('more')", "syntax error here"]
    assert [cheat for cheat in cheats if task.check(cheat)] == []


# Episodes

ENVIRONMENTS = {family.__name__: family for family in FAMILIES} | {
    "programs": functools.partial(programs, sandbox=SANDBOX)}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_oracle_scores_one_and_an_empty_agent_nothing(name):
    env = Verifiable(ENVIRONMENTS[name])
    seen = []

    def oracle(messages, tools):
        seen.append((messages, tools, env.task))
        return say(f"Easy. {tag(env.task.solution)}")

    one = run_episode(env, oracle, task=name, seed=3)
    assert (one.end, one.reward, one.turns[0].info) == (EndReason.DONE, 1, {"answered": True})
    nothing = run_episode(env, lambda *_: say(""), task=name, seed=3)
    assert (nothing.end, nothing.reward, nothing.turns[0].info) == (EndReason.DONE, 0, {"answered": False})
    [(messages, tools, task)] = seen
    assert list(messages) == [{"role": "user", "content": task.prompt}] and not tools
    assert task.prompt == ENVIRONMENTS[name](3).prompt and tag(task.solution) not in task.prompt
    assert env.task is None


def test_a_step_before_a_reset_is_an_error():
    with pytest.raises(RuntimeError, match="reset"):
        Verifiable(arithmetic).step(say(""))
    env = Verifiable(lambda seed: Task("t", seed, "?", "!", lambda answer: answer == "!"))
    env.reset(0)
    assert env.step(say(tag("!"))) == Step((), 1.0, True, {"answered": True})


# The adapter for reasoning-gym, on a package that stands for it

class Sums:
    def __init__(self, seed, size, terms=2):
        assert size == 1
        self.seed, self.terms, self.checked = seed, terms, []

    def __getitem__(self, index):
        return {"question": f"{self.terms} times {self.seed}?", "answer": str(self.terms * self.seed),
                "metadata": {"index": index}}

    def score_answer(self, answer, entry):
        if answer == "raise":
            raise KeyError(answer)
        if answer == "dear":
            return 1.0
        return 1.0 if answer.lstrip("0") == entry["answer"] else 0.99


class Generous(Sums):
    def score_answer(self, answer, entry):
        return 1.0


@pytest.fixture()
def gym(monkeypatch):
    """A stand-in for the package; what is appended to the list it gives is added to the source of its data sets."""
    source = []
    kinds = {"sums": Sums, "generous": Generous}
    module = types.ModuleType("reasoning_gym")
    module.create_dataset = lambda name, **config: kinds[name](**config)
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setattr("inspect.getsource", lambda _: "".join(source))
    return source


def test_reasoning_gym_tasks(gym):
    make = reasoning_gym_tasks("sums", terms=3)
    task = make(7)
    assert (task.name, task.seed, task.solution) == ("reasoning_gym/sums", 7, "21")
    assert task.prompt.startswith("3 times 7?") and "<answer>" in task.prompt
    assert task.check("21") and task.check("0021")
    assert not task.check("22"), "almost full marks are none"
    assert not task.check("raise") and not task.check("dear" * 10_000)
    env = Verifiable(make)
    assert run_episode(env, lambda *_: say(tag(env.task.solution)), task="sums", seed=1).reward == 1
    assert run_episode(env, lambda *_: say(""), task="sums", seed=1).reward == 0


def test_reasoning_gym_evaluates_nothing_that_could_do_harm(gym):
    assert reasoning_gym_tasks("sums")(7).check("dear")
    gym.append("value = parse_expr(answer)")
    task = reasoning_gym_tasks("sums")(7)
    assert not task.check("dear")
    assert task.check("14") and task.check("014")
    gym.append("\ndef parse_expr(text): ...")
    assert reasoning_gym_tasks("sums")(7).check("dear")


def test_reasoning_gym_refuses_what_checks_nothing(gym):
    with pytest.raises(ValueError, match="'generous'"):
        reasoning_gym_tasks("generous")
    with pytest.raises(KeyError):
        reasoning_gym_tasks("unknown")
    with pytest.raises(TypeError):
        reasoning_gym_tasks("sums", colour=3)


def test_reasoning_gym_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"glm5-jax\[tasks\]"):
        reasoning_gym_tasks("sums")


@pytest.mark.parametrize("answer", [
    "14", "-3.5", "(1 + 2) * 3 / 4", "x**3/3 - 2*x**2 + C", "-2*x**3*cos(x) + 6*x**2*sin(x)",
    "sin(x)*cos(x)", "exp(2*x) + 3*exp(x)", "log(x) + C", "0x1f", "1e-7", "-4*(-2*x - 8)**(3/2)/3 + C",
    "sin(x)**2 + (x**2 + 1)**3", "[[1, 2], [3, 4]]", "['Q', '_', '.']", "[1.0, -2]", "['10.5', '3']"])
def test_formulas_and_lists_are_harmless(answer):
    assert harmless(answer)


@pytest.mark.parametrize("answer", [
    "", "exit()", "(exit)()", "open('a', 'w')", "[open][0]('a')", "[x for x in range(9)]", "[x][0](1)", "['a'](1)",
    "().__class__", "(1).real", "x.y", "x . y", "lambda x: x", "__import__('os')", "[__import__('os')]", "[x.y]",
    "9**9**9", "9**99", "x**9**9", "x**999", "x**(9**9)", "((x+9)**99)**99", "x**(99)**99", "exp(9)**9**9",
    "(exp(9)**9)**9", "exp(exp(9))", "exp((exp(9)))", "exp(1 + (exp(9)))", "2**x", "99!", "[1]*9",
    "'a'*9", "x := 3", "f(open)", "１" * 600, "[" * 6000,
    "exec", "x\\y", "{1}", "x;y", "x if y else z", "#", "x@y", "x%y", "x<<99"])
def test_everything_else_is_not(answer):
    assert not harmless(answer)
