"""What the recipe teaches: skills, each with problems to be judged by and demonstrations to begin from.

    skill = SKILLS["sums"]
    skill.conversation(seed, well=True)                          # to be learned by heart
    service(skill, gateway, seeds=skill.seeds(Part.PRACTISED))   # to be learned from rewards

The problems of a skill are split for good: what is demonstrated is never practised on, and neither is ever held out.
Half-hearted demonstrations, which guess where they should work or call a tool, make a policy that does both; rewards
then have something to choose from. A wrong guess itself is not learned: it is marked as erroneous.
"""

import asyncio
import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence

from glm5_jax.data.sft import Conversation
from glm5_jax.envs import courtesy, lookup, python_questions
from glm5_jax.envs.base import Environment, Limits
from glm5_jax.envs.tool_loop import ToolLoop
from glm5_jax.envs.verifiable import chains
from glm5_jax.envs.verifiable.task import Dice, Task, Verifiable
from glm5_jax.records import Message, Trajectory
from glm5_jax.rewards.courtesy import EXAMPLES
from glm5_jax.rl import rollout
from glm5_jax.rl.ledger import Order
from glm5_jax.rl.loop import EndOfData
from glm5_jax.rl.orchestrator import Reward, Service
from glm5_jax.rl.rollout import Run
from glm5_jax.serve.gateway import Gateway, Options
from glm5_jax.text import chat

NAMES = (*chains.KINDS, "lookup", "python", "courtesy")
GUESS = "guess"  # the thought of a half-hearted demonstration


class Part(enum.Enum):
    """What a problem is for: the tenths of a hash that are its."""

    DEMONSTRATED = range(0, 6)
    PRACTISED = range(6, 9)
    HELD_OUT = range(9, 10)


@dataclasses.dataclass(frozen=True)
class Skill:
    """One kind of problem."""

    name: str
    environment: Callable[[str], Environment]  # for the rollout of an id
    conversation: Callable[[int, bool], Conversation]  # of a seed: well, or half-heartedly
    key: Callable[[int], str]  # two seeds of one key are one problem
    max_new_tokens: int  # of a reply
    turns: int = 1
    thinking: bool = True
    run: Run = rollout.at_once
    end: int = 2**31  # seeds from here on are left alone

    def seeds(self, part: Part, count: int) -> tuple[int, ...]:
        """The first `count` seeds, fewer where there are not as many, whose problems belong to the part and differ."""
        found: list[int] = []
        seen: set[str] = set()
        for seed in range(min(self.end, 200 + 20 * count)):  # the smallest part is a tenth
            if len(found) == count:
                break
            key = self.key(seed)
            if key not in seen and Dice("part", self.name, key).below(10) in part.value:
                found.append(seed)
            seen.add(key)
        return tuple(found)


def service(skill: Skill, gateway: Gateway, *, seeds: Sequence[int], ratio: float = 1.0, most: int = 64, size: int = 1,
            temperature: float = 1.0, reward: Reward | None = None) -> Service:
    """The skill's problems, those of `seeds` over and over, played through the gateway; `reward` is added to what the
    environment itself gives. Raises EndOfData, when asked, where there are no seeds."""
    options = Options(max_new_tokens=skill.max_new_tokens, temperature=temperature, thinking=skill.thinking)

    async def play(order: Order, id: str, so_far: Trajectory | None, called_back: asyncio.Event) -> Trajectory:
        return await rollout.play(
            skill.environment(id), gateway, task=order.task, seed=order.seed, id=id, so_far=so_far,
            called_back=called_back, options=options, limits=Limits(turns=skill.turns), run=skill.run)

    def seed(number: int) -> int:
        if not seeds:
            raise EndOfData(f"{skill.name} has no problems here")
        return seeds[number % len(seeds)]

    return Service(skill.name, ratio, most, size, seed, play, reward)


def demonstrations(skills: Sequence[Skill], count: int, *, well: float, seed: int = 0) -> tuple[Conversation, ...]:
    """Up to `count` of each skill, the share `well` of them whole-hearted, in an order by `seed`."""
    dice = Dice("demonstrations", seed)
    found = [skill.conversation(number, dice.below(1000) < 1000 * well)
             for skill in skills for number in skill.seeds(Part.DEMONSTRATED, count)]
    return tuple(dice.shuffled(found))


def _chain(name: str, level: int) -> Skill:
    make = functools.partial(chains.KINDS[name], level=level, instruction="")

    def conversation(seed: int, well: bool) -> Conversation:
        task = make(seed)
        messages = (_asked(task), {"role": "assistant", "reasoning_content": task.work if well else GUESS,
                                   "content": f"<answer>{task.solution}</answer>"})
        return _demonstrated(messages, task, well)

    return Skill(name, lambda id: Verifiable(make), conversation, lambda seed: make(seed).prompt, max_new_tokens=40)


def _tool(name: str, problem: Callable, demonstrate: Callable[[int], list[Message]], turns: int, run: Run,
          flaky: float) -> Skill:
    def conversation(seed: int, well: bool) -> Conversation:
        messages, task = demonstrate(seed), problem(seed).task
        return _demonstrated(tuple(messages if well else (messages[0], messages[-1])), task, well)

    environment = lambda id: ToolLoop(problem, tools_in_prompt=False, flaky=flaky, rollout=id)
    # A question alone is no key: that of a look-up comes again with other answers.
    return Skill(name, environment, conversation, lambda seed: str(demonstrate(seed)), max_new_tokens=40, turns=turns,
                 thinking=False, run=run)


def _courtesy() -> Skill:
    def conversation(seed: int, well: bool) -> Conversation:
        return Conversation(tuple(courtesy.good(seed) if well else courtesy.mediocre(seed)))

    return Skill("courtesy", lambda id: courtesy.Courtesy(), conversation, lambda seed: courtesy.request(seed).prompt,
                 max_new_tokens=40, thinking=False, end=courtesy.COUNT - EXAMPLES)  # the rest teaches the rewards


def _asked(task: Task) -> Message:
    return {"role": "user", "content": task.prompt}


def _demonstrated(messages: tuple[Message, ...], task: Task, well: bool) -> Conversation:
    """The conversation; where it guesses, what it guesses is not learned."""
    if well:
        return Conversation(messages, place=f"{task.name}, seed {task.seed}")
    start = chat.render(messages).rindex("<answer>") + len("<answer>")
    return Conversation(messages, erroneous=((start, start + len(task.solution)),),
                        place=f"{task.name}, seed {task.seed}, a guess")


def skills(*, level: int = 5, hops: int = 1, flaky: float = 0.05) -> dict[str, Skill]:
    """All of the recipe by name: chains of `level` steps, look-ups of `hops` and calculations by tools, of whose
    episodes the share `flaky` fails, and courtesy."""
    found = [*(_chain(name, level) for name in chains.KINDS),
             _tool("lookup", functools.partial(lookup.problem, level=hops, instruction=""),
                   functools.partial(lookup.demonstration, level=hops, instruction=""), hops + 2, rollout.at_once,
                   flaky),
             _tool("python", functools.partial(python_questions.problem, instruction=""),
                   functools.partial(python_questions.demonstration, instruction=""), 3, rollout.threads, flaky),
             _courtesy()]
    return {skill.name: skill for skill in found}
