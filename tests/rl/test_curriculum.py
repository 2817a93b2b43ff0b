"""What the recipe teaches: parts that share no problem, demonstrations that earn their reward, guesses unlearned."""

import asyncio
import dataclasses

import pytest

from glm5_jax.data import sft
from glm5_jax.data.sft import Conversation
from glm5_jax.envs import courtesy
from glm5_jax.envs.verifiable import chains
from glm5_jax.records import EndReason, FailureReason
from glm5_jax.rl import rollout
from glm5_jax.rl.curriculum import GUESS, NAMES, Part, demonstrations, service, skills
from glm5_jax.rl.ledger import Order
from glm5_jax.rl.loop import EndOfData
from glm5_jax.serve.gateway import Gateway
from glm5_jax.text.tokenizer import Tokenizer
from tests.rl import harness
from tests.serve.fakes import ScriptedGenerator

TOKENIZER = Tokenizer.packaged()
SKILLS = skills(flaky=0.0)
CHAINS = ("sums", "products", "turns")
TOOLS = ("lookup", "python")


def asked(skill, seed):
    return skill.conversation(seed, True).messages[0]["content"]


class Stand:
    """The service of a skill over a gateway that says what the demonstration of a seed does, three tokens a second."""

    def __init__(self, skill, seed=0, script=None, **options):
        # No thread: the clock is a virtual one.
        self.skill, self.seed = dataclasses.replace(skill, run=rollout.at_once), seed
        self.known = sft.encode(TOKENIZER, skill.conversation(seed, True))[0].tolist()
        self.generator = ScriptedGenerator(script or self.script, delay=lambda session: 1.0)
        self.service = service(self.skill, Gateway(self.generator, TOKENIZER), **{"seeds": (seed,)} | options)

    def script(self, prompt, sampling, session):
        assert tuple(self.known[:len(prompt)]) == prompt, "a prompt is not as it was demonstrated"
        return self.known[len(prompt):]

    async def play(self, id="one", so_far=None, called_back=None):
        order = Order("group", self.skill.name, self.service.seeds(0), 1, 0)
        return await self.service.play(order, id, so_far, called_back or asyncio.Event())


def played(skill, seed=0, id="one", **options):
    return harness.run(lambda: Stand(skill, seed, **options).play(id))


# Parts

def test_all_skills_are_there():
    assert tuple(SKILLS) == NAMES == (*CHAINS, *TOOLS, "courtesy")
    assert all(skill.name == name for name, skill in SKILLS.items())


@pytest.mark.parametrize("name", NAMES)
def test_parts_share_no_problem(name):
    """What a question asks is one problem, but of a look-up: its answer depends on the store."""
    skill = SKILLS[name]
    parts = {part: skill.seeds(part, 300) for part in Part}
    seeds = [seed for some in parts.values() for seed in some]
    assert len(seeds) == len(set(seeds)) and all(some == tuple(sorted(some)) for some in parts.values())
    if name != "lookup":
        assert len({asked(skill, seed) for seed in seeds}) == len(seeds)
    # Of the chains there are about two thousand each.
    assert all(len(some) == 300 or name in CHAINS and 150 < len(some) for some in parts.values())


def test_the_seeds_of_a_part_are_the_same_everywhere():
    assert [SKILLS["sums"].seeds(part, 5) for part in Part] == [
        (0, 1, 3, 7, 9), (2, 5, 6, 8, 12), (4, 11, 31, 40, 49)]


@pytest.mark.parametrize("name", NAMES)
def test_fewer_seeds_are_the_first_of_more(name):
    for part in Part:
        assert SKILLS[name].seeds(part, 1) == SKILLS[name].seeds(part, 60)[:1] != ()


def test_a_prompt_that_comes_again_under_a_later_seed_is_of_the_same_part():
    skill = SKILLS["courtesy"]
    assert skill.key(courtesy.COUNT + 3) == skill.key(3) != skill.key(4)


# Demonstrations

@pytest.mark.parametrize("name", NAMES)
def test_a_whole_hearted_demonstration_is_what_a_rollout_sees_and_earns_all_there_is(name):
    skill = SKILLS[name]
    for seed in skill.seeds(Part.DEMONSTRATED, 2 if name == "python" else 20):
        one, conversation = played(skill, seed), skill.conversation(seed, True)
        assert (one.failure, one.end, len(one.turns)) == (None, EndReason.DONE, 2 if name in TOOLS else 1)
        if name == "courtesy":
            assert one.reward == 0 and set(one.turns[0].info.values()) == {1.0}
        else:
            assert one.reward == 1
        if name in CHAINS:
            assert one.turns[0].reply["reasoning_content"] == chains.KINDS[name](seed, level=5).work
        # What is learned is what was sampled, from the first token to the stop.
        ids, weights = sft.encode(TOKENIZER, conversation)
        sampled = [id for turn in one.turns for id in turn.completion.ids]
        assert [id for id, weight in zip(ids, weights) if weight] == sampled and conversation.erroneous == ()


@pytest.mark.parametrize("name", CHAINS + TOOLS)
def test_of_a_half_hearted_demonstration_all_is_learned_but_the_answer(name):
    for seed in range(50):
        conversation = SKILLS[name].conversation(seed, False)
        question, reply = conversation.messages
        assert question["content"] == asked(SKILLS[name], seed) and "tool_calls" not in reply
        assert reply.get("reasoning_content") == (GUESS if name in CHAINS else None)
        ids, weights = sft.encode(TOKENIZER, conversation)
        _, whole = sft.encode(TOKENIZER, dataclasses.replace(conversation, erroneous=()))
        pieces = [TOKENIZER.decode([id]) for id in ids]
        ends = [sum(map(len, pieces[:count + 1])) for count in range(len(pieces))]
        start = "".join(pieces).rindex("<answer>") + len("<answer>")
        stop = "".join(pieces).rindex("</answer>")
        assert 0 < stop - start == len(reply["content"]) - len("<answer></answer>")
        in_answer = [end > start and end - len(piece) < stop for piece, end in zip(pieces, ends)]
        assert [*weights] == [0 if inside else weight for weight, inside in zip(whole, in_answer)]


def test_a_half_hearted_courtesy_is_not_the_best_there_is():
    for seed in range(50):
        question, reply = SKILLS["courtesy"].conversation(seed, False).messages
        request = courtesy.read(question["content"])
        assert courtesy.marks(request, reply["content"]) != courtesy.Marks(1.0, 1.0, 1.0)


def noted(name):
    """The skill with demonstrations that say of which seed they are, and whether well."""
    return dataclasses.replace(SKILLS[name], conversation=lambda seed, well: Conversation(
        ({"role": "user", "content": (name, seed, well)},)))


def notes(count, **options):
    found = demonstrations([noted("sums"), noted("courtesy")], count, **options)
    return [one.messages[0]["content"] for one in found]


@pytest.mark.parametrize("well, least, most", [(0.0, 0, 0), (0.3, 220, 260), (0.7, 540, 580), (1.0, 800, 800)])
def test_so_many_demonstrations_are_whole_hearted(well, least, most):
    found = notes(400, well=well)
    assert least <= sum(heart for _, _, heart in found) <= most
    assert sorted((name, seed) for name, seed, _ in found) == sorted(
        (name, seed) for name in ("sums", "courtesy") for seed in SKILLS[name].seeds(Part.DEMONSTRATED, 400))


def test_the_seed_settles_order_and_hearts():
    first, again, other = (notes(50, well=0.5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first != sorted(first)
    assert [note[:2] for note in first] != [note[:2] for note in other]
    assert set(first) != set(other)


# Services

def test_a_service_is_what_was_asked_for():
    async def reward(trajectory):
        return 0.5

    stand = Stand(SKILLS["sums"], seeds=(7, 3, 9), ratio=2.0, most=5, size=4, temperature=0.7, reward=reward)
    one = stand.service
    assert (one.name, one.ratio, one.most, one.size, one.reward) == ("sums", 2.0, 5, 4, reward)
    assert [one.seeds(number) for number in range(5)] == [7, 3, 9, 7, 3]


def test_a_problem_is_played_under_its_order_with_the_settings_of_the_skill():
    async def main():
        stand = Stand(SKILLS["lookup"], seed=8, temperature=0.7)
        one = await stand.play("eight")
        assert (one.id, one.task, one.seed) == ("eight", "lookup", 8)
        assert {(sampling.temperature, sampling.max_new_tokens, session)
                for _, sampling, session in stand.generator.asked} == {(0.7, 40, "eight")}

    harness.run(main)


def test_a_service_without_seeds_is_at_its_end():
    with pytest.raises(EndOfData, match="sums has no problems here"):
        Stand(SKILLS["sums"], seeds=()).service.seeds(0)


def test_who_only_calls_has_so_many_turns():
    def calls(prompt, sampling, session):
        return TOKENIZER.encode("<tool_call>lookup<arg_key>key</arg_key><arg_value>no key</arg_value></tool_call>"
                                "<|observation|>", specials=True)

    for hops in (1, 2, 3):
        one = played(skills(hops=hops, flaky=0.0)["lookup"], script=calls)
        assert (one.end, len(one.turns), one.reward) == (EndReason.TURNS, hops + 2, 0)


def test_a_rollout_called_back_goes_on():
    async def main():
        called_back = asyncio.Event()
        asyncio.get_running_loop().call_later(1.5, called_back.set)
        begun = await Stand(SKILLS["sums"]).play(called_back=called_back)
        assert begun.end is EndReason.ABORTED and len(begun.turns[0].completion.ids) == 3
        again = Stand(SKILLS["sums"])
        assert await again.play(so_far=begun) == await Stand(SKILLS["sums"]).play()
        assert again.generator.asked[0][0] == begun.turns[0].prompt + begun.turns[0].completion.ids

    harness.run(main)


@pytest.mark.parametrize("name", TOOLS)
def test_a_flaky_environment_fails_and_each_rollout_by_itself(name):
    one = played(skills(flaky=1.0)[name])
    assert (one.end, one.failure.reason) == (EndReason.FAILED, FailureReason.ENVIRONMENT)
    assert "made to fail" in one.failure.detail
    if name == "lookup":
        half = skills(flaky=0.5)[name]
        assert 5 <= sum(played(half, id=f"rollout-{n}").end is EndReason.FAILED for n in range(20)) <= 15


def test_levels_and_hops():
    short, long = skills(level=2), skills(level=7)
    for name, sign in (("sums", "+"), ("products", "*")):
        assert (asked(short[name], 0).count(sign), asked(long[name], 0).count(sign)) == (2, 7)
    assert [len(skills(hops=hops)["lookup"].conversation(0, True).messages) for hops in (1, 2, 3)] == [4, 6, 8]
