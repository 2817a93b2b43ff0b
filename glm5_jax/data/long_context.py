"""Long prompts with an exactly known answer: needles, variables to track, and the n-th of many like notes to recall.

    task = needles(tokenizer, prose(), 4096, seed=0, keys=8, queries=4)
    task.ids, task.prompt       # 4,096 tokens, and their text: tokenizer.encode(task.prompt) == task.ids
    task.score(reply)           # 0.0 to 1.0

A haystack is filler with facts at chosen depths, a question is its end. `prose` speaks in sentences; in `terse` every
word is one token, so that keys, values and answers fit a model of a few hundred tokens of context. One rule keeps
guessing out of all scores: whoever answers more than was asked for scores 0. The kinds are those of RULER and MRCR.
Similar documents side by side are `interleave`'s.
"""

import bisect
import dataclasses
import difflib
import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from glm5_jax.data.sources import Document
from glm5_jax.text.tokenizer import Tokenizer

FILLER = (
    "The morning train was late again.", "Nobody had watered the plants on the balcony.",
    "A letter lay unopened on the kitchen table.", "Rain came in from the west towards evening.",
    "The baker closes an hour earlier in winter.", "Two children counted the boats in the harbour.",
    "Somebody had left a window open upstairs.", "The path leads past a mill and an orchard.",
    "Old maps of the valley hung in the hall.", "They talked about the harvest for a while.",
)
COLOURS = ("amber", "black", "blue", "brown", "copper", "coral", "golden", "green", "grey", "ivory", "orange", "pink",
           "purple", "red", "scarlet", "silver", "violet", "white", "yellow", "azure")
ANIMALS = ("badger", "beaver", "crane", "falcon", "ferret", "fox", "heron", "lizard", "lynx", "marten", "otter", "owl",
           "rabbit", "raven", "salmon", "spider", "squirrel", "turtle", "walrus", "weasel")
WORDS = ("autumn", "basket", "bridge", "candle", "carpet", "castle", "cellar", "cloud", "corner", "curtain", "desert",
         "engine", "feather", "forest", "garden", "hammer", "island", "journey", "kettle", "ladder", "lantern",
         "market", "meadow", "mirror", "mountain", "needle", "ocean", "paper", "pepper",
         "pillow", "planet", "pocket", "puzzle", "river", "saddle", "shadow", "signal", "silence", "station",
         "summer", "thunder", "ticket", "tower", "valley", "velvet", "violin", "winter", "wisdom")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


@dataclasses.dataclass(frozen=True)
class Style:
    """The words that a task is told in; keys, values, words and ordinals hold no white space and no comma."""

    keys: Sequence[str]      # names of codes, of variables, and of what notes are about
    values: Sequence[str]
    words: Sequence[str]     # what notes are made of
    ordinals: Sequence[str]
    filler: Sequence[str]    # what says nothing, a piece each
    lead: str                # before the haystack
    joint: str               # between its pieces
    top_up: Sequence[str]    # appended to the haystack, again and again, for the last tokens of the length
    comma: str               # between the answers
    fact: str                # {key} {value}
    copy: str                # {key} {source}
    note: str                # {key} {text}
    ask_codes: str           # {keys}
    ask_variables: str       # {value}
    ask_note: str            # {key} {ordinal} {prefix}


@dataclasses.dataclass(frozen=True)
class Recall:
    """One task. The model sees the prompt and nothing else of it."""

    kind: str
    seed: int
    prompt: str
    ids: tuple[int, ...]                  # of the prompt, exactly as many as asked for
    answers: tuple[str, ...]
    reply: str                            # a continuation of the prompt that scores 1
    reply_ids: tuple[int, ...]
    needles: tuple[tuple[int, int], ...]  # where in `ids` stands what the reply follows from: start, end
    score: Callable[[str], float]         # of any reply, of any length: 0.0 to 1.0

    def example(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and reply to learn from: ids, int32 [tokens], and their loss weights, float32, 1 on the reply."""
        ids = np.array(self.ids + self.reply_ids, np.int32)
        return ids, (np.arange(len(ids)) >= len(self.ids)).astype(np.float32)


def prose() -> Style:
    """English sentences, a line each; `dataclasses.replace(prose(), filler=lines(documents))` hides facts in text."""
    return Style(
        keys=tuple(f"{colour}-{animal}" for colour in COLOURS for animal in ANIMALS),
        values=tuple(map(str, range(1000, 10_000))),
        words=WORDS, ordinals=ORDINALS, filler=FILLER,
        lead="Read these lines; a question about them follows.\n", joint="\n", top_up=(" and", " a", "a"),
        comma=", ",
        fact="The code of {key} is {value}.", copy="The code of {key} is that of {source}.",
        note="Asked for a note about {key}, they wrote: {text}.",
        ask_codes="\nWhat are the codes of {keys}? Give the codes alone, in this order, with commas.\nAnswer:",
        ask_variables="\nWho has the code {value}, or a copy of it? Give the names alone, with commas.\nAnswer:",
        ask_note="\nWrite {prefix} and then, word for word, the {ordinal} note about {key}.\nAnswer:",
    )


def terse(tokenizer: Tokenizer, *, keys: int = 64, values: int = 64, filler: int = 64) -> Style:
    """One token per word, and no word in two roles: a fact is three tokens, an answer one.

    The words are the first of the vocabulary that are small letters behind a space. Raises ValueError if they are too
    few.
    """
    sizes = (3, len(ORDINALS), keys, values, filler)
    found: list[str] = []
    for id in range(tokenizer.vocab_size):
        text = tokenizer.decode([id])
        if re.fullmatch(" [a-z]{3,}", text) and tokenizer.encode(text) == [id]:
            found.append(text[1:])
        if len(found) == sum(sizes):
            break
    else:
        raise ValueError(f"tokenizer: expected {sum(sizes)} words of one token each, found {len(found)}; "
                         "ask for fewer keys, values or filler")
    words = iter(found)
    (fact, note, ask), ordinals, key_words, value_words, filler_words = (
        tuple(itertools.islice(words, size)) for size in sizes)
    return Style(
        keys=key_words, values=value_words, words=value_words, ordinals=ordinals, filler=filler_words,
        lead=" ", joint=" ", top_up=(" " + filler_words[0],), comma=" ",
        fact=f"{fact} {{key}} {{value}}", copy=f"{fact} {{key}} {{source}}", note=f"{note} {{key}} {{text}}",
        ask_codes=f" {ask} {{keys}}", ask_variables=f" {ask} {{value}}",
        ask_note=f" {ask} {{key}} {{ordinal}} {{prefix}}",
    )


def lines(documents: Sequence[Document]) -> tuple[str, ...]:
    """Filler of real text: every line of the documents that is not blank, without outer white space."""
    return tuple(line.strip() for document in documents for line in document.text.splitlines() if line.strip())


def needles(tokenizer: Tokenizer, style: Style, length: int, seed: int, *, keys: int = 1, values: int = 1,
            queries: int = 1, depths: Sequence[float] | None = None) -> Recall:
    """Codes in a haystack: `keys` names with `values` codes each, of which `queries` names are asked for.

    The score is the share of the codes that is right: by place for several queries, as a set for several values (not
    both at once). `depths` (0 the start, 1 the end) places the facts that are asked for, by name; the others, and all
    without it, are anywhere. Raises ValueError for numbers out of range, or a length that cannot be met.
    """
    _at_most("keys", keys, len(style.keys))
    _at_most("queries", queries, keys)
    _at_most("values", values, len(style.values) // keys)
    if queries > 1 and values > 1:
        raise ValueError(f"queries, values: expected one of them to be 1, found {queries} and {values}")
    rng = _rng("needles", keys, values, queries, seed)
    names = _sample(rng, style.keys, keys)
    codes = _sample(rng, style.values, keys * values)
    asked = queries * values
    placed = sorted(zip(_depths(rng, depths, asked) + _random_depths(rng, keys * values - asked), range(keys * values)))
    facts = [(depth, style.fact.format(key=names[i // values], value=codes[i]), i < asked) for depth, i in placed]
    order = range(asked) if queries > 1 else [i for _, i in placed if i < asked]
    kind = ("multi_query" if queries > 1 else "multi_value" if values > 1 else "multi_key" if keys > 1 else "single")
    question = style.ask_codes.format(keys=style.comma.join(names[:queries]))
    answers = tuple(codes[i] for i in order)
    return _recall(tokenizer, style, length, kind, seed, rng, facts, question, answers,
                   functools.partial(listed, answers=answers, ordered=queries > 1))


def variables(tokenizer: Tokenizer, style: Style, length: int, seed: int, *, chains: int = 2, hops: int = 3,
              depths: Sequence[float] | None = None) -> Recall:
    """Chains of names: the first is given a code, each of `hops` others copies the name before it; which have a code?

    The score is the share of the asked chain's `hops` + 1 names that is right, as a set. `depths` places the facts of
    that chain and must not fall. Raises ValueError as `needles`.
    """
    _at_most("hops", hops, len(style.keys) - 1)
    _at_most("chains", chains, min(len(style.keys) // (hops + 1), len(style.values)))
    rng = _rng("variables", chains, hops, seed)
    names, codes = _sample(rng, style.keys, chains * (hops + 1)), _sample(rng, style.values, chains)
    facts = []
    for chain, code in enumerate(codes):
        members = names[chain * (hops + 1):(chain + 1) * (hops + 1)]
        told = [style.fact.format(key=members[0], value=code)]
        told += [style.copy.format(key=key, source=source) for source, key in zip(members, members[1:])]
        places = sorted(_random_depths(rng, hops + 1)) if chain else _depths(rng, depths, hops + 1, rising=True)
        facts += [(depth, text, chain == 0) for depth, text in zip(places, told)]
    answers = tuple(names[:hops + 1])
    return _recall(tokenizer, style, length, "variables", seed, rng, facts, style.ask_variables.format(value=codes[0]),
                   answers, functools.partial(listed, answers=answers, ordered=False))


def notes(tokenizer: Tokenizer, style: Style, length: int, seed: int, *, topics: int = 2, repeats: int = 4,
          words: int = 8, depths: Sequence[float] | None = None) -> Recall:
    """Notes of `words` words, `repeats` on each of `topics`; the n-th on one topic is to be recalled behind a prefix.

    The score is 0 without the prefix, else `difflib`'s ratio of matching words. `depths` holds the one depth of the
    note that is asked for. Raises ValueError as `needles`.
    """
    _at_most("topics", topics, len(style.keys))
    _at_most("repeats", repeats, len(style.ordinals))
    _at_most("words", words, None)
    rng = _rng("notes", topics, repeats, words, seed)
    about = _sample(rng, style.keys, topics)
    prefix, = _sample(rng, style.values, 1)
    texts = [" ".join(style.words[_below(rng, len(style.words))] for _ in range(words))
             for _ in range(topics * repeats)]
    places = _depths(rng, depths, 1) + _random_depths(rng, topics * repeats - 1)
    facts = [(depth, style.note.format(key=about[i // repeats], text=texts[i]), i == 0)
             for i, depth in enumerate(places)]
    rank = sum(place < places[0] for place in places[1:repeats])
    question = style.ask_note.format(key=about[0], ordinal=style.ordinals[rank], prefix=prefix)
    answers = (prefix, *texts[0].split(" "))
    return _recall(tokenizer, dataclasses.replace(style, comma=" "), length, "notes", seed, rng, facts, question,
                   answers, functools.partial(recited, answers=answers))


# The tasks of an evaluation by name: each takes a tokenizer, a style, a length and a seed.
KINDS: Mapping[str, Callable[..., Recall]] = {
    "single": needles,
    "multi_key": functools.partial(needles, keys=8),
    "multi_value": functools.partial(needles, keys=4, values=4),
    "multi_query": functools.partial(needles, keys=8, queries=4),
    "variables": variables,
    "notes": notes,
}


def listed(reply: str, answers: Sequence[str], ordered: bool) -> float:
    """The share of `answers` (all different) that the first line of a reply lists; 0 if it lists more than they are.

    Items stand between commas or white space. `ordered`: an item counts only in its own place.
    """
    items = _first_line(reply)
    if len(items) > len(answers):
        return 0.0
    right = sum(map(str.__eq__, items, answers)) if ordered else len(set(items) & set(answers))
    return right / len(answers)


def recited(reply: str, answers: Sequence[str]) -> float:
    """How much of `answers`, a prefix and the words of a text, the first line of a reply repeats in order.

    0 without the prefix in front, or with more words than there are; else twice the matching words over all words.
    """
    items = _first_line(reply)
    if items[:1] != list(answers[:1]) or len(items) > len(answers):
        return 0.0
    return difflib.SequenceMatcher(None, list(answers[1:]), items[1:], autojunk=False).ratio()


def _first_line(reply: str) -> list[str]:
    """The items of the first line that is not blank, a full stop at its end aside."""
    line = next((line for line in reply.splitlines() if line.strip()), "")
    return [item for item in re.split(r"[\s,]+", line.strip().removesuffix(".")) if item]


def _recall(tokenizer: Tokenizer, style: Style, length: int, kind: str, seed: int, rng: random.Random,
            facts: Sequence[tuple[float, str, bool]], question: str, answers: tuple[str, ...],
            score: Callable[[str], float]) -> Recall:
    """The task whose haystack holds the facts: (depth, text, whether it is asked for)."""
    facts = sorted(facts, key=lambda fact: fact[0])
    prompt, starts = _haystack(tokenizer, style, length, rng, [(depth, text) for depth, text, _ in facts], question)
    spans = tokenizer.encode_spans(prompt)
    found = []
    for start, (_, text, asked) in zip(starts, facts):
        if asked:
            inside = [index for index, (_, begin, end) in enumerate(spans) if begin < start + len(text) and start < end]
            found.append((inside[0], inside[-1] + 1))
    reply = " " + style.comma.join(answers)
    return Recall(kind, seed, prompt, tuple(id for id, _, _ in spans), answers, reply, tuple(tokenizer.encode(reply)),
                  tuple(found), score)


def _haystack(tokenizer: Tokenizer, style: Style, length: int, rng: random.Random, facts: Sequence[tuple[float, str]],
              question: str) -> tuple[str, list[int]]:
    """A prompt of exactly `length` tokens, and where each fact, in the order of the depths, begins in its text."""
    tokens = functools.cache(lambda text: len(tokenizer.encode(text)))
    room = length - tokens(_laid(style, [], [0], facts, question)[0])
    if room < 0:
        raise ValueError(f"length: expected at least the {length - room} tokens of facts and question, found {length}")
    filler: list[str] = []
    ends = [0]
    while ends[-1] < room:
        piece = style.filler[_below(rng, len(style.filler))]
        filler.append(piece)
        ends.append(ends[-1] + max(1, tokens(piece + style.joint + piece) - tokens(piece)))
    # Tokens may join where pieces meet, so the sum of sizes is a guess: from there, fewer and fewer pieces.
    for count in range(len(filler), -1, -1):
        lay = functools.partial(_laid, style, filler[:count], ends[:count + 1], facts)
        tail = _topped_up(lambda tail: tokens(lay(tail + question)[0]), style.top_up, length)
        if tail is not None:
            return lay(tail + question)
    raise ValueError(f"length: no filler and top-up of the style gives exactly {length} tokens with this tokenizer")


def _laid(style: Style, filler: Sequence[str], ends: Sequence[int], facts: Sequence[tuple[float, str]], end: str
          ) -> tuple[str, list[int]]:
    """A prompt, with each fact behind the filler that ends nearest to its depth, and where each fact begins in it."""
    pieces: list[str] = []
    places = []
    done = 0
    for depth, fact in facts:
        target = depth * ends[-1]
        upto = bisect.bisect_left(ends, target)
        if upto and target - ends[upto - 1] <= ends[upto] - target:
            upto -= 1
        pieces += [*filler[done:upto], fact]
        places.append(len(pieces) - 1)
        done = upto
    pieces += filler[done:]
    starts = list(itertools.accumulate((len(piece + style.joint) for piece in pieces), initial=len(style.lead)))
    return style.lead + style.joint.join(pieces) + end, [starts[place] for place in places]


def _topped_up(count: Callable[[str], int], units: Sequence[str], length: int) -> str | None:
    """A text of units whose count is `length`; None if that is passed over, or already exceeded."""
    if count("") > length:
        return None
    tail: str | None = ""
    while tail is not None and (missing := length - count(tail)):
        steps = [tail + unit * times for times in (missing, 1) for unit in units]
        tail = next((step for step in steps if length - missing < count(step) <= length), None)
    return tail


def _rng(*key: str | int) -> random.Random:
    """Only `random()` of it is called: that alone is the same on every version of Python."""
    return random.Random(int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()))


def _below(rng: random.Random, count: int) -> int:
    return int(rng.random() * count)


def _sample(rng: random.Random, items: Sequence[str], count: int) -> list[str]:
    """`count` different items."""
    rest = list(items)
    return [rest.pop(_below(rng, len(rest))) for _ in range(count)]


def _random_depths(rng: random.Random, count: int) -> list[float]:
    return [rng.random() for _ in range(count)]


def _depths(rng: random.Random, depths: Sequence[float] | None, count: int, rising: bool = False) -> list[float]:
    if depths is None:
        return sorted(_random_depths(rng, count)) if rising else _random_depths(rng, count)
    if len(depths) != count or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths: expected {count} numbers from 0 to 1, found {list(depths)}")
    if rising and list(depths) != sorted(depths):
        raise ValueError(f"depths: expected none below the one before, found {list(depths)}")
    return list(depths)


def _at_most(name: str, value: int, most: int | None) -> None:
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: expected 1 to {most or 'any number'}, found {value}")
