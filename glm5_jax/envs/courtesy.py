"""Somebody says what happened to somebody near and asks a simple question: the small task of general RL.

A good reply begins with a short acknowledgement that fits the mood, gives the fact, and is brief and well-formed:

    My sister lost her keys. What is the opposite of hot?   ->   I am sorry. It is cold.

`marks` says exactly how good a reply is in each dimension. The environment itself rewards nothing: a reward over whole
episodes does, and may be as imperfect as rewards are.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

from glm5_jax.envs.base import Start, Step
from glm5_jax.envs.verifiable.task import Dice
from glm5_jax.records import Message

PEOPLE = ("My brother", "My sister", "My friend", "My aunt", "My uncle", "My son", "Our teacher", "Our neighbour")
# What happened, by mood, and the acknowledgements that fit.
EVENTS: Mapping[str, tuple[str, ...]] = {
    "glad": ("won a prize", "found a job", "passed the test", "had a baby", "got a medal", "sang very well"),
    "sad": ("lost the keys", "broke an arm", "missed the train", "failed the test", "is sick", "lost the game"),
    "worried": ("fears the storm", "fears the exam", "must see a doctor", "fears the dark", "is lost in the city",
                "fears a big dog"),
    "wishing": ("wants to be a singer", "wants to see the sea", "hopes for snow", "wants to learn chess",
                "wants a bike", "dreams of a garden"),
}
FITTING: Mapping[str, tuple[str, ...]] = {
    "glad": ("That is great!", "How nice!", "What good news!"),
    "sad": ("I am sorry.", "That is sad.", "What a pity."),
    "worried": ("It will be fine.", "No need to worry.", "Stay calm."),
    "wishing": ("What a wish!", "May it come true!", "I hope it works."),
}
NEUTRAL = ("Okay.", "I see.", "Sure.")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Questions of one form: what is asked, the sentence that answers it, and {subject: answer}."""

    question: str
    sentence: str
    answers: Mapping[str, str]


KINDS = (
    Kind("What color is {}?", "It is {}.", {
        "snow": "white", "grass": "green", "coal": "black", "a lemon": "yellow", "the sky": "blue", "blood": "red",
        "chocolate": "brown", "an elephant": "gray"}),
    Kind("How many legs has {}?", "It has {} legs.", {
        "a dog": "four", "a bird": "two", "an ant": "six", "a spider": "eight", "a cat": "four", "a bee": "six",
        "a horse": "four", "a duck": "two"}),
    Kind("What is the opposite of {}?", "It is {}.", {
        "hot": "cold", "big": "small", "up": "down", "wet": "dry", "old": "new", "fast": "slow", "long": "short",
        "early": "late", "full": "empty", "hard": "soft"}),
    Kind("What is a young {} called?", "It is a {}.", {
        "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "hen": "chick",
        "bear": "cub", "goat": "kid"}),
    Kind("What is the capital of {}?", "It is {}.", {
        "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens",
        "Cuba": "Havana", "Peru": "Lima", "Norway": "Oslo", "China": "Beijing"}),
    Kind("Which day comes after {}?", "It is {}.", {
        "Monday": "Tuesday", "Tuesday": "Wednesday", "Wednesday": "Thursday", "Thursday": "Friday",
        "Friday": "Saturday", "Saturday": "Sunday", "Sunday": "Monday"}),
)
FACTS = tuple((kind, subject) for kind in KINDS for subject in kind.answers)
STATEMENTS = tuple((mood, f"{person} {event}.") for mood, events in EVENTS.items() for event in events
                   for person in PEOPLE)
COUNT = len(STATEMENTS) * len(FACTS)  # seeds below this all have prompts of their own
MOST_WORDS = 8
WORDY = ("I must say that", "I can say that")
FLAWS = ("cold", "unfitting", "wrong", "wordy", "sloppy")
# An acknowledgement, then one sentence.
_FORM = re.compile(r"[A-Z][^.!?]*[.!?] [A-Z][^.!?]*\.")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, and what a good reply to it has to know."""

    prompt: str
    mood: str
    kind: Kind
    subject: str

    @property
    def answer(self) -> str:
        return self.kind.answers[self.subject]


@dataclasses.dataclass(frozen=True)
class Marks:
    """How good a reply is, 0 to 1 each."""

    correctness: float  # 1: it names the answer, and no other one of the kind that the prompt does not name
    tone: float  # 1: it begins with a fitting acknowledgement; 0.5: with a neutral one
    quality: float  # the share of: at most MOST_WORDS words; two well-formed sentences; no two words in a row repeated


class Courtesy:
    """The environment of one request and one reply. The reward of a step is 0; its info holds the marks."""

    def __init__(self) -> None:
        self.request: Request | None = None

    def reset(self, seed: int) -> Start:
        self.request = request(seed)
        return Start(({"role": "user", "content": self.request.prompt},))

    def step(self, message: Message) -> Step:
        if self.request is None:
            raise RuntimeError("Courtesy.step: expected a reset before it, found none")
        content = message.get("content")
        return Step((), 0.0, True, dataclasses.asdict(marks(self.request, content if isinstance(content, str) else "")))

    def close(self) -> None:
        self.request = None


def request(seed: int) -> Request:
    """The request of a seed, 0 or more; those of the seeds below COUNT are all different."""
    statement, fact = divmod(_order()[seed % COUNT], len(FACTS))
    (mood, text), (kind, subject) = STATEMENTS[statement], FACTS[fact]
    return Request(f"{text} {kind.question.format(subject)}", mood, kind, subject)


def read(prompt: str) -> Request:
    """The request that has this prompt; raises ValueError where none has."""
    statement, _, question = prompt.partition(". ")
    moods = [mood for mood, text in STATEMENTS if text == f"{statement}."]
    facts = [(kind, subject) for kind, subject in FACTS if kind.question.format(subject) == question]
    if not moods or not facts:
        raise ValueError(f"prompt: expected one of envs.courtesy, found {prompt!r:.100}")
    return Request(prompt, moods[0], *facts[0])


def marks(request: Request, reply: str) -> Marks:
    """The exact marks of a reply's text, which may be any."""
    words = _words(reply)
    named = set(words) & {answer.lower() for answer in request.kind.answers.values()} - set(_words(request.prompt))
    tone = (1.0 if reply.startswith(FITTING[request.mood]) else 0.5 if reply.startswith(NEUTRAL) else 0.0)
    pairs = list(zip(words, words[1:]))
    quality = (0 < len(words) <= MOST_WORDS, _FORM.fullmatch(reply) is not None, 0 < len(set(pairs)) == len(pairs))
    return Marks(float(named == {request.answer.lower()}), tone, sum(quality) / len(quality))


def good(seed: int) -> list[Message]:
    """A demonstration whose marks are all 1: the user's message and the assistant's."""
    asked = request(seed)
    opening = Dice("courtesy good", seed).choice(FITTING[asked.mood])
    return _conversation(asked, opening, asked.kind.sentence.format(asked.answer))


def mediocre(seed: int) -> list[Message]:
    """A demonstration with one or two of the FLAWS.

    A model that has learned good ones and these begins general RL somewhere in the middle.
    """
    dice = Dice("courtesy mediocre", seed)
    return flawed(seed, *dice.shuffled(FLAWS)[:dice.between(1, 2)])


def flawed(seed: int, *flaws: str) -> list[Message]:
    """A demonstration with these of the FLAWS; raises ValueError for another."""
    if unknown := set(flaws) - set(FLAWS):
        raise ValueError(f"flaws: expected some of {FLAWS}, found {sorted(unknown)}")
    asked, dice = request(seed), Dice("courtesy flawed", seed)
    answers = sorted(set(asked.kind.answers.values()) - {asked.answer})
    others = [text for mood, texts in FITTING.items() if mood != asked.mood for text in texts]
    sentence = asked.kind.sentence.format(dice.choice(answers) if "wrong" in flaws else asked.answer)
    if "wordy" in flaws:
        sentence = f"{dice.choice(WORDY)} {sentence[0].lower()}{sentence[1:]}"
    opening = dice.choice(others if "unfitting" in flaws else FITTING[asked.mood])
    if "cold" in flaws:
        opening = ""
    if "sloppy" in flaws:
        opening, sentence = opening.lower(), sentence.lower().removesuffix(".")
    return _conversation(asked, opening, sentence)


@functools.cache
def _order() -> list[int]:
    return Dice("courtesy").shuffled(range(COUNT))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _conversation(asked: Request, opening: str, sentence: str) -> list[Message]:
    reply = f"{opening} {sentence}".strip()
    return [{"role": "user", "content": asked.prompt}, {"role": "assistant", "content": reply}]
