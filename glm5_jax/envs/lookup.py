"""A number in a store that the model can only see by calls: `lookup("red kite")` is "old door", and that is "475".

    env = tool_loop.ToolLoop(functools.partial(lookup.problem, level=2))
"""

from glm5_jax.envs.tool_loop import Problem, Tool, ToolError, conversation
from glm5_jax.envs.verifiable.task import INSTRUCTION, Dice, Task, graded
from glm5_jax.records import Message

DEFINITION: Message = {
    "name": "lookup", "parameters": {"properties": {"key": {"type": "string"}}, "required": ["key"]}}
# A key is one of each: 2,560 different questions. All are one or two tokens of the packaged tokenizer.
ADJECTIVES = (
    "red gold gray white old new big tall short long wide thin round soft hard cold hot dry wet light clean clear "
    "slow late open full empty free rich poor young low calm bright real fine double single simple common").split()
NOUNS = (
    "kite door lamp hat coat chair key map book pen star sun tree leaf apple bird lion bear ring coin bell gate wall "
    "tower hill lake stone ship bus car ball cup card clock flag tent page paper letter table cat dog hen ant nest "
    "bread cake bed pan jar net web fan pin log cap bee cow pig owl cave mill boot oak").split()


def problem(seed: int, level: int = 1) -> Problem:
    """A question that takes as many calls as its level, 1 to 3; all levels ask it in the same words.

    The answer is a number of three digits. An unknown key is an error for the model to react to.
    """
    task, store = _question(seed, level)

    def lookup(key: str) -> str:
        if key not in store:
            raise ToolError(f"error: no key {key!r}")
        return store[key]

    return Problem(task, (Tool(DEFINITION, lookup),))


def demonstration(seed: int, level: int = 1) -> list[Message]:
    """The messages of `problem(seed, level)` solved, without a thought."""
    task, store = _question(seed, level)
    return conversation(task, [("lookup", {"key": key}, value) for key, value in store.items()])


def _question(seed: int, level: int) -> tuple[Task, dict[str, str]]:
    """The task, and its store in the order in which it has to be asked."""
    hops = graded(level, (1, 2, 3))
    dice = Dice("lookup", level, seed)
    keys = [f"{adjective} {noun}" for adjective, noun in zip(dice.shuffled(ADJECTIVES)[:hops], dice.shuffled(NOUNS))]
    number = str(dice.between(100, 999))
    # In quotation marks a key is made of the same tokens as in a call: a small model has to copy them.
    prompt = f'Look up "{keys[0]}" and then each result, until it is a number. {INSTRUCTION}'
    task = Task(f"lookup-{level}", seed, prompt, number, lambda answer: answer == number)
    return task, dict(zip(keys, [*keys[1:], number]))
