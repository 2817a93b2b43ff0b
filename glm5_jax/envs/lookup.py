"""A number in a store that the model can only see by calls: `lookup("red pen")` is "old chain", and that is "475".

    env = tool_loop.ToolLoop(functools.partial(lookup.problem, level=2))
"""

from glm5_jax.envs.tool_loop import Problem, Tool, ToolError, conversation
from glm5_jax.envs.verifiable.task import INSTRUCTION, Dice, Task, graded
from glm5_jax.records import Message

DEFINITION: Message = {
    "name": "lookup", "parameters": {"properties": {"key": {"type": "string"}}, "required": ["key"]}}
# A key is one of each: 1,280 different ones. Each is two tokens of the packaged tokenizer, the same two wherever it
# stands, so that a small model has only to copy them.
ADJECTIVES = (
    "red old new empty clear long late low even round right left last first main lower upper top local global static "
    "strict active current complex single special same weak super ready future").split()
NOUNS = (
    "hand pen penguin star table key letter map frame field file square column chain wrapper body cell group garbage "
    "pair pack package step stack slot store script title text word line list loop symbol sign message module memory "
    "place user").split()


def problem(seed: int, level: int = 1, *, instruction: str = INSTRUCTION) -> Problem:
    """A question that takes as many calls as its level, 1 to 3; levels 2 and 3 ask it in the same words.

    The answer is a number of three digits. An unknown key is an error for the model to react to.
    """
    task, store = _question(seed, level, instruction)

    def lookup(key: str) -> str:
        if key not in store:
            raise ToolError(f"error: no key {key!r}")
        return store[key]

    return Problem(task, (Tool(DEFINITION, lookup),))


def demonstration(seed: int, level: int = 1, *, instruction: str = INSTRUCTION) -> list[Message]:
    """The messages of the same `problem` solved, without a thought."""
    task, store = _question(seed, level, instruction)
    return conversation(task, [("lookup", {"key": key}, value) for key, value in store.items()])


def _question(seed: int, level: int, instruction: str) -> tuple[Task, dict[str, str]]:
    """The task, and its store in the order in which it has to be asked."""
    hops = graded(level, (1, 2, 3))
    dice = Dice("lookup", level, seed)
    keys = [f"{adjective} {noun}" for adjective, noun in zip(dice.shuffled(ADJECTIVES)[:hops], dice.shuffled(NOUNS))]
    number = str(dice.between(100, 999))
    # Without quotation marks its first token would be another one in the question than in a call.
    prompt = f'Look up "{keys[0]}"' + (" and then each result, until it is a number." if hops > 1 else ".")
    task = Task(f"lookup-{level}", seed, f"{prompt} {instruction}".strip(), number, lambda answer: answer == number)
    return task, dict(zip(keys, [*keys[1:], number]))
