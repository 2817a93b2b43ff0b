"""Recall tasks: exact lengths with any tokenizer, facts where they should be, and scores that guessing cannot move."""

import dataclasses
import hashlib
import itertools
import re

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
import tokenizers

from glm5_jax.data import long_context, packing, sources
from glm5_jax.data.long_context import KINDS, listed, needles, notes, prose, recited, terse, variables
from glm5_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def trained(texts, vocab_size, pre_tokenizer):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=ALPHABET, show_progress=False))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer.from_json(tokenizer.to_str())


@pytest.fixture(scope="module")
def packaged():
    return Tokenizer.packaged()


@pytest.fixture(scope="module")
def others():
    """One token per byte; words as GPT-2 cuts them; and merges across words, where a sum of parts is no whole."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    texts = [" ".join(long_context.FILLER * 3), prose().lead]
    return {"bytes": trained([], 256 + 36, byte_level(add_prefix_space=False)),
            "words": trained(texts, 600, byte_level(add_prefix_space=False)),
            "phrases": trained(texts, 900, byte_level(add_prefix_space=False, use_regex=False))}


@pytest.fixture(scope="module")
def styles(packaged):
    return {"prose": prose(), "terse": terse(packaged)}


@pytest.mark.parametrize("style", ["prose", "terse"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(length=st.integers(500, 900), seed=st.integers(0, 2**40))
def test_length_is_exact_and_the_reply_scores_one(packaged, styles, style, kind, length, seed):
    task = KINDS[kind](packaged, styles[style], length, seed)
    assert len(task.ids) == length
    assert packaged.encode(task.prompt) == list(task.ids)
    assert packaged.encode(task.prompt + task.reply) == [*task.ids, *task.reply_ids]
    assert task.score(task.reply) == 1.0
    assert task.score(task.reply + "\nand so on") == 1.0
    assert (task.kind, task.seed) == (kind, seed)


@pytest.mark.parametrize("name", ["bytes", "words", "phrases"])
@pytest.mark.parametrize("kind", KINDS)
def test_length_is_exact_with_any_tokenizer(others, name, kind):
    for length in (2100, 2101, 2107, 2113):
        task = KINDS[kind](others[name], prose(), length, seed=length)
        assert others[name].encode(task.prompt) == list(task.ids)
        assert len(task.ids) == length
        assert task.score(task.reply) == 1.0


def test_tasks_are_written_out(packaged, styles):
    """Every machine and version makes these: another text here is another meaning for results measured before."""
    task = needles(packaged, styles["prose"], 90, 7, keys=2)
    assert task.prompt == (
        "Read these lines; a question about them follows.\nThe code of golden-badger is 1418.\n"
        "The code of pink-turtle is 7770. and and and and and\n"
        "What are the codes of golden-badger? Give the codes alone, in this order, with commas.\nAnswer:")
    assert task.reply == " 1418"
    task = needles(packaged, styles["terse"], 16, 7, keys=2)
    assert task.prompt == (" interpre the character should local exp identifier keys dis the dictionary functions two "
                           "dis for character")
    assert task.reply == " should"
    prompts = [make(packaged, style, 600, 5).prompt for make in KINDS.values() for style in styles.values()]
    digest = hashlib.sha256("".join(prompts).encode()).hexdigest()
    assert digest == "03d370a6e9502df19a5f172cc425e647f6e015400d4e9acb6f137db7070fdcdc"
    others = [make(packaged, style, 600, 6).prompt for make in KINDS.values() for style in styles.values()]
    assert len(set(prompts + others)) == 4 * len(KINDS)


@pytest.mark.parametrize("depths", [(0.0,), (0.25,), (0.5,), (1.0,)])
def test_a_needle_stands_at_its_depth(packaged, styles, depths):
    task = needles(packaged, styles["terse"], 512, 3, depths=depths)
    (start, end), = task.needles
    assert end - start == 3
    assert packaged.decode(task.ids[start:end]).split()[2] == task.answers[0]
    haystack = 512 - 2 - 3  # without the question and the needle
    assert abs(start - depths[0] * haystack) <= 0.5
    task = needles(packaged, styles["prose"], 2048, 3, depths=depths)
    (start, end), = task.needles
    haystack = len(packaged.encode(task.prompt[:task.prompt.rindex("\nWhat are the codes")])) - (end - start)
    assert abs(start - depths[0] * haystack) < 20  # half a sentence, and what stands in front


def test_needles_are_the_facts_in_order_of_position(packaged, styles):
    task = needles(packaged, styles["terse"], 256, 0, keys=3, queries=3, depths=(0.9, 0.1, 0.5))
    told = [packaged.decode(task.ids[start:end]).split() for start, end in task.needles]
    asked = task.prompt.split()[-3:]
    assert [key for _, key, _ in told] == [asked[1], asked[2], asked[0]]
    assert dict(zip(asked, task.answers)) == {key: value for _, key, value in told}


def test_an_uneven_filler_does_not_move_the_depth(packaged):
    style = dataclasses.replace(prose(), filler=("word " * 60 + "word.", "One."))
    for depth in (0.2, 0.5, 0.8):
        (start, end), = needles(packaged, style, 4000, 1, depths=(depth,)).needles
        assert abs(start - depth * 4000) < 80


def test_every_distractor_is_told_and_names_and_codes_differ(packaged, styles):
    task = needles(packaged, styles["prose"], 1500, 0, keys=6, values=3)
    told = re.findall(r"The code of (\S+) is (\d{4})\.", task.prompt)
    assert len(told) == len(set(code for _, code in told)) == 18
    assert sorted(len(list(group)) for _, group in itertools.groupby(sorted(key for key, _ in told))) == [3] * 6
    key = re.search(r"What are the codes of (\S+)\?", task.prompt)[1]
    assert task.answers == tuple(code for name, code in told if name == key)  # in order of appearance
    assert len(task.needles) == 3


def test_variables_follow_from_the_text(packaged, styles):
    task = variables(packaged, styles["prose"], 900, 4, chains=3, hops=4)
    known = {}
    for name, source, code in re.findall(r"The code of (\S+) is (?:that of (\S+)|(\d+))\.", task.prompt):
        known[name] = known[source] if source else code  # a copy never stands before its source
    asked = re.search(r"Who has the code (\d+)", task.prompt)[1]
    assert len(known) == 15
    assert {name for name, code in known.items() if code == asked} == set(task.answers)
    assert len(task.needles) == 5


def test_notes_follow_from_the_text(packaged, styles):
    for seed in range(5):
        task = notes(packaged, styles["prose"], 900, seed, topics=3, repeats=4, words=6)
        told = re.findall(r"Asked for a note about (\S+), they wrote: (.*)\.", task.prompt)
        asked = re.search(r"Write (\d+) and then, .* the (\w+) note about (\S+)\.", task.prompt)
        prefix, ordinal, topic = asked.groups()
        of_topic = [text for about, text in told if about == topic]
        assert (len(told), len(of_topic)) == (12, 4)
        assert task.reply == f" {prefix} {of_topic[long_context.ORDINALS.index(ordinal)]}"


def test_filler_of_real_text(packaged):
    documents = sources.packaged_text()[:3]
    style = dataclasses.replace(prose(), filler=long_context.lines(documents))
    task = needles(packaged, style, 1024, 0)
    told = task.prompt.removeprefix(style.lead).split("\n")
    assert sum(line in style.filler for line in told) > len(told) / 2
    assert len(task.ids) == 1024


# Guessing

@pytest.mark.parametrize("style", ["prose", "terse"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"single"}))
def test_naming_everything_scores_nothing(packaged, styles, style, kind):
    task = KINDS[kind](packaged, styles[style], 600, 0)
    words = re.findall(r"[\w-]+", task.prompt)
    for guess in (" ".join(words), ", ".join(dict.fromkeys(words)), task.prompt.replace("\n", " "),
                  task.reply + styles[style].comma + words[5], task.reply + styles[style].comma + task.reply):
        assert task.score(guess) == 0.0
    for guess in ("", " ", "\n\n", ",,,", "I do not know"):
        assert task.score(guess) == 0.0


def test_a_single_needle_is_one_answer(packaged, styles):
    task = needles(packaged, styles["prose"], 300, 0)
    assert [task.score(text) for text in (task.answers[0] + ".", "\n" + task.answers[0], "0000", task.answers[0][:3],
                                          task.answers[0] + " 1234", "It is " + task.answers[0])] == [1, 1, 0, 0, 0, 0]


items = st.lists(st.integers(0, 9).map(str), min_size=1, max_size=5, unique=True)


@given(items, st.lists(st.integers(0, 9).map(str), max_size=7))
def test_partial_credit_is_exact(answers, given_items):
    reply = ", ".join(given_items)
    by_place = sum(i < len(given_items) and given_items[i] == answer for i, answer in enumerate(answers))
    as_set = sum(answer in given_items for answer in answers)
    fits = len(given_items) <= len(answers)
    assert listed(reply, answers, ordered=True) == (by_place / len(answers) if fits else 0)
    assert listed(reply, answers, ordered=False) == (as_set / len(answers) if fits else 0)


def test_a_recital_needs_its_prefix_and_its_order():
    answers = ("41", "a", "b", "c", "d")
    assert recited("41 a b c d", answers) == 1
    assert recited("41 a b", answers) == pytest.approx(2 * 2 / 6)
    assert recited("41 d c b a", answers) == pytest.approx(2 * 1 / 8)
    assert recited("41", answers) == 0
    assert recited("a b c d", answers) == recited("42 a b c d", answers) == recited("41 a b c d e", answers) == 0
    assert recited("41 a x c d", answers) == pytest.approx(2 * 3 / 8)


# Terse

def test_every_word_of_a_terse_task_is_one_token(packaged, styles):
    style = styles["terse"]
    task = needles(packaged, style, 512, 0, keys=8, queries=4)
    assert len(task.prompt.split()) == 512
    assert len(task.reply_ids) == 4
    roles = [set(style.keys), set(style.values), set(style.filler), set(style.ordinals), {task.prompt.split()[-5]}]
    assert sum(map(len, roles)) == len(set.union(*roles))
    assert not set(task.ids) & set(packaged.specials.values())


def test_a_vocabulary_without_words_is_named(others):
    with pytest.raises(ValueError, match="expected 203 words of one token each, found 0"):
        terse(others["bytes"])


def test_examples_weigh_the_reply_alone(packaged, styles):
    tasks = [needles(packaged, styles["terse"], 60, seed, keys=4, queries=2) for seed in range(4)]
    examples = [task.example() for task in tasks]
    rows = packing.pack_best_fit([ids for ids, _ in examples], 62, loss_weights=[weights for _, weights in examples])
    assert rows.tokens.shape == (4, 62)
    assert sorted(map(tuple, rows.targets[rows.weights > 0].reshape(4, 2))) == sorted(task.reply_ids for task in tasks)
    assert np.all(rows.weights.sum(1) == 2)


# Errors

@pytest.mark.parametrize("arguments, message", [
    (dict(keys=0), "keys: expected 1 to 64, found 0"),
    (dict(keys=65), "keys: expected 1 to 64, found 65"),
    (dict(keys=2, queries=3), "queries: expected 1 to 2, found 3"),
    (dict(keys=8, values=9), "values: expected 1 to 8, found 9"),
    (dict(keys=2, values=2, queries=2), "expected one of them to be 1, found 2 and 2"),
    (dict(depths=(0.5, 0.5)), "depths: expected 1 numbers"),
    (dict(depths=(1.5,)), "depths: expected 1 numbers"),
    (dict(depths=(float("nan"),)), "depths: expected 1 numbers"),
])
def test_numbers_out_of_range(packaged, styles, arguments, message):
    with pytest.raises(ValueError, match=message):
        needles(packaged, styles["terse"], 512, 0, **arguments)


def test_other_errors(packaged, styles):
    style = styles["terse"]
    with pytest.raises(ValueError, match="length: expected at least the 5 tokens of facts and question, found 4"):
        needles(packaged, style, 4, 0)
    assert len(needles(packaged, style, 5, 0).ids) == 5
    with pytest.raises(ValueError, match="depths: expected none below the one before"):
        variables(packaged, style, 100, 0, hops=1, depths=(0.5, 0.4))
    with pytest.raises(ValueError, match="chains: expected 1 to 16, found 17"):
        variables(packaged, style, 100, 0, chains=17)
    with pytest.raises(ValueError, match="repeats: expected 1 to 8, found 9"):
        notes(packaged, style, 100, 0, repeats=9)
    with pytest.raises(ValueError, match="words: expected 1 to any number, found 0"):
        notes(packaged, style, 100, 0, words=0)
    with pytest.raises(ValueError, match="no filler and top-up of the style gives exactly 102 tokens"):
        needles(packaged, dataclasses.replace(style, filler=("the and",), top_up=()), 102, 0)
