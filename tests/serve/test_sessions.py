"""Invariants 1 and 2: a prompt begins with the ids that were sent and sampled, whatever the client and the tokenizer do
to their text, or a fork is on record. Beside it, a gateway that makes its prompts from text drifts on the same cases.
"""

import copy
import functools
import json
import random
import re
import unicodedata
from importlib import resources

import pytest

from glm5_jax.records import Completion, Trajectory, Turn, from_json, to_json
from glm5_jax.rl.assemble import rows
from glm5_jax.serve import sessions
from glm5_jax.serve.sessions import Call
from glm5_jax.text import mask, stream, template, tools
from glm5_jax.text.segments import SPELLED
from glm5_jax.text.tokenizer import Tokenizer

LOOK = tools.define("look", "Look.", {"at": {"type": "string"}, "n": {"type": "number"}, "far": {},
                                      "deep": {"type": "object"}})
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look around. "}]
SPLIT = re.compile(SPELLED.pattern[:-1] + r"|<\|endoftext\|>)")
CALLED = "<tool_call>look<arg_key>at</arg_key><arg_value>the  sea</arg_value></tool_call>"


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """The packaged one; one that normalises to NFC, one that loses the case of letters, one that loses spaces at the
    ends of a text, and one that knows no merge."""
    described = json.loads((resources.files("glm5_jax.text") / "assets" / "tokenizer.json").read_text("utf-8"))
    match kind:
        case "nfc":
            described["normalizer"] = {"type": "NFC"}
        case "lower":
            described["normalizer"] = {"type": "Lowercase"}
        case "strip":
            described["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
        case "bytes":
            described["model"]["merges"] = []
    return Tokenizer.from_json(json.dumps(described))


@functools.cache
def spellings(kind: str) -> dict[bytes, int]:
    known = tokenizer(kind)
    return {known.bytes_of(id): id for id in range(known.vocab_size) if id not in known.specials.values()}


def drawn(kind: str, text: str, rng: random.Random | None = None, letters: bool = False) -> tuple[int, ...]:
    """Ids of a text with its markers; cut into other tokens than an encoder would cut it into where there is an `rng`,
    and all of it `letters` where the markers in it are none."""
    known, ids = tokenizer(kind), list[int]()
    for index, piece in enumerate([text] if letters else SPLIT.split(text)):
        if index % 2:
            ids.append(known.id_of(piece))
            continue
        if rng is None:
            ids += known.encode(piece)
            continue
        data = piece.encode()
        while data:
            size = rng.choice([size for size in range(1, 9) if data[:size] in spellings(kind)])
            ids.append(spellings(kind)[data[:size]])
            data = data[size:]
    return tuple(ids)


def completion(ids, stop: str = "stop", version: int = 0) -> Completion:
    return Completion(ids, tuple(-(n + 1) / 64 for n in range(len(ids))), (version,) * len(ids), stop)


def said(kind: str, calls, messages, done: Completion, **options) -> Call:
    """A call of `messages` behind `calls`, answered with `done`."""
    question = sessions.ask(tokenizer(kind), calls, messages, [LOOK], **options)
    reply = stream.read_ids(tokenizer(kind), done.ids, thinking=options.get("enable_thinking", True))
    return Call(question, tools.understand(reply, [LOOK])[0], done, len(calls))


def encoded(kind: str, segments) -> tuple[int, ...]:
    known = tokenizer(kind)
    return tuple(id for segment in segments for id in
                 ([known.id_of(segment.text)] if segment.marker else known.encode(segment.text)))


def retokenised(kind: str, messages, **options) -> tuple[int, ...]:
    """The prompt as a gateway makes it that keeps messages instead of ids."""
    return tuple(mask.encode(tokenizer(kind), messages, [LOOK], add_generation_prompt=True, **options)[0])


def arguments(message, change):
    """The message with the arguments of its calls as JSON text, written by `change`."""
    message = copy.deepcopy(message)
    for one in message["tool_calls"]:
        one["function"]["arguments"] = change(one["function"]["arguments"])
    return message


def without(message, *names):
    return {name: value for name, value in message.items() if name not in names}


def normal(form: str, message):
    return message | {"content": unicodedata.normalize(form, message["content"])}


OBSERVED = [{"role": "tool", "content": "waves"}]
WIDE = "<tool_call>look<arg_key>n</arg_key><arg_value>1e2</arg_value><arg_key>deep</arg_key><arg_value>" \
       '{"b":[1.50,2],  "a":"\\u00e9"}</arg_value></tool_call>'
# name: what is sampled behind <think>, what the client makes of the reply, whether it drifts in canonical tokens too
ECHOES = {
    "as it was": (f"I look.</think>There.{CALLED}<|observation|>", lambda reply: reply, False),
    "thought left out": (f"I look.</think>{CALLED}<|observation|>", lambda reply: without(reply, "reasoning_content"),
                         True),
    "thought null": (f"I look.</think>{CALLED}<|observation|>", lambda reply: reply | {"reasoning_content": None},
                     True),
    "thought in the content": (f"i look.</think>so:{CALLED}<|observation|>", lambda reply: without(
        reply, "reasoning_content") | {"content": "<think>i look.</think>so:"}, False),
    "white space in the thought": (f"\n I look.\n\n</think>\n{CALLED}<|observation|>", lambda reply: reply, True),
    "empty thought": (f"</think>So.{CALLED}<|observation|>", lambda reply: without(reply, "reasoning_content"), True),
    "null content": (f"</think>{CALLED}<|observation|>", lambda reply: reply | {"content": None}, False),
    "content in parts": (f"</think>one two.{CALLED}<|observation|>", lambda reply: reply | {
        "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two."}]}, False),
    "white space at the ends": (f"</think>\n\nOne two. \n{CALLED}<|observation|>",
                                lambda reply: reply | {"content": reply["content"].strip()}, True),
    "text after a call": (f"</think>Before.{CALLED}After.<|observation|>", lambda reply: reply, True),
    "arguments as text": (f"</think>{WIDE}<|observation|>", lambda reply: arguments(reply, json.dumps), True),
    "arguments in other words": (f"</think>{WIDE}<|observation|>", lambda reply: arguments(
        reply, lambda found: json.dumps(found | {"n": 100}, sort_keys=True, indent=2)), True),
    "two calls": (f"</think>{CALLED}\n{CALLED}<|observation|>", lambda reply: reply | {
        "tool_calls": [{"id": f"call-{i}", "index": i} | call for i, call in enumerate(reply["tool_calls"])]}, True),
    "malformed call": (f"</think>{CALLED}<tool_call>look<arg_key>at</tool_call><|observation|>", lambda reply: reply,
                       True),
    "decomposed letters": ("</think>cafe\u0301 \u1112\u1161\u11ab\u2126 \ufb01<|user|>",
                           functools.partial(normal, "NFC"), True),
    "composed letters": ("</think>caf\u00e9 \ud55c\u03a9<|user|>", functools.partial(normal, "NFD"), True),
    "upper case": ("</think>SHOUTING, Mr. Ed?<|user|>", lambda reply: reply, False),
    "other stop": ("</think>Done.<|endoftext|>", lambda reply: reply, True),
    "stop of a call without one": ("</think>Done.<|observation|>", lambda reply: reply, True),
}
CUT = {"in the answer": "I look.</think>The sea i", "in the thought": "I loo", "in a call": f"</think>{CALLED[:-14]}",
       "behind a call": f"</think>{CALLED}", "at once": ""}
KINDS = ("packaged", "nfc", "lower", "strip", "bytes")


def following(reply):
    return OBSERVED if "tool_calls" in reply else [{"role": "user", "content": "And?"}]


def assert_continues(kind: str, call: Call, messages, closed: bool, **options):
    """The next prompt is the first one, what was sampled, and what the template puts behind it."""
    asked = sessions.ask(tokenizer(kind), [call], messages, [LOOK], **options)
    whole = list(template.segments(asked.messages, [LOOK], add_generation_prompt=True, **options))
    new = list(template.segments([*call.question.messages, call.reply], [LOOK], **options))
    assert asked.extends == 0 and asked.ids[:len(call.ids)] == call.ids
    added = encoded(kind, whole[len(new):])
    marker, stopped = added[0], bool(call.completion.ids) and call.completion.ids[-1]
    expected = added[1:] if closed and stopped == marker else added if closed else (tokenizer(kind).eos_id, *added)
    assert asked.ids[len(call.ids):] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ECHOES)
def test_an_honest_client_is_continued_in_ids(kind, case):
    text, echo, _ = ECHOES[case]
    for rng in (None, random.Random(case)):
        call = said(kind, [], ASKED, completion(drawn(kind, text, rng)))
        follows = following(call.reply)
        for options in ({"clear_thinking": False}, {}) if follows == OBSERVED else ({"clear_thinking": False},):
            again = said(kind, [], ASKED, call.completion, **options)
            assert_continues(kind, again, [*ASKED, echo(copy.deepcopy(call.reply)), *follows], True, **options)


@pytest.mark.parametrize("case", ECHOES)
def test_prompts_made_from_text_drift_on_these_cases(case):
    """The power of the test above. With other tokens for the same text there is always drift; with the tokens that the
    encoder itself would choose, in the cases that change the text."""
    text, echo, drifts = ECHOES[case]
    for rng in (None, random.Random(case)):
        call = said("packaged", [], ASKED, completion(drawn("packaged", text, rng)))
        again = retokenised("packaged", [*ASKED, echo(copy.deepcopy(call.reply)), *following(call.reply)],
                            clear_thinking=False)
        assert (again[:len(call.ids)] != call.ids) == (drifts or rng is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["length", "abort", "stop"])
@pytest.mark.parametrize("case", CUT)
def test_a_completion_that_was_cut_off_is_closed_and_continued(kind, stop, case):
    call = said(kind, [], ASKED, completion(drawn(kind, CUT[case], random.Random(1)), stop))
    messages = [*ASKED, call.reply, *OBSERVED]
    assert_continues(kind, call, messages, False)
    assert retokenised(kind, messages)[:len(call.ids) + 1] != (*call.ids, tokenizer(kind).eos_id)


def test_a_character_that_was_cut_in_half():
    half = (*drawn("bytes", "</think>caf"), spellings("bytes")["é".encode()[:1]])
    call = said("bytes", [], ASKED, completion(half, "length"))
    assert call.reply["content"] == "caf\ufffd"
    assert_continues("bytes", call, [*ASKED, call.reply, *OBSERVED], False)
    assert retokenised("bytes", [*ASKED, call.reply, *OBSERVED])[:len(call.ids)] != call.ids


@pytest.mark.parametrize("echo", [dict, lambda reply: without(reply, "reasoning_content")])
@pytest.mark.parametrize("text", ["Say </think> to end, <|user|> to ask.", "<tool_call>ls</tool_call>",
                                  "<think>a</think>b"])
def test_markers_that_a_model_spells_are_letters(text, echo):
    """Where the client leaves the thought out, the letters `</think>` in the content do not make one."""
    ids = drawn("packaged", "Hm.</think>") + drawn("packaged", text, random.Random(2), letters=True)
    call = said("packaged", [], ASKED, completion(ids, "length"))
    assert call.reply["content"] == text
    assert_continues("packaged", call, [*ASKED, echo(call.reply), *OBSERVED], False)


def test_without_thinking():
    call = said("packaged", [], ASKED, completion(drawn("packaged", "Hello.<|user|>", random.Random(3))),
                enable_thinking=False)
    for thinking in (True, False):
        asked = sessions.ask(tokenizer("packaged"), [call], [*ASKED, call.reply, ASKED[1]], [LOOK],
                             enable_thinking=thinking)
        assert asked.extends == 0 and asked.ids[:len(call.ids)] == call.ids
        assert asked.ids[-1] == tokenizer("packaged").id_of("<think>" if thinking else "</think>")


def change_call(name, value):
    return lambda messages: messages[2]["tool_calls"][0]["function"]["arguments"].__setitem__(name, value)


CHANGES = {
    "another answer": lambda messages: messages[2].__setitem__("content", "There!"),
    "another thought": lambda messages: messages[2].__setitem__("reasoning_content", "I listen."),
    "a thought taken out": lambda messages: messages[2].__setitem__("reasoning_content", ""),
    "another argument": change_call("n", 3),
    "one for true": change_call("far", 1),
    "an argument more": change_call("at", ""),
    "a call taken out": lambda messages: messages[2].pop("tool_calls"),
    "another question": lambda messages: messages[1].__setitem__("content", "Look away."),
    "a question in another normal form": lambda messages: messages[1].__setitem__("content", "Look around, cafe\u0301"),
    "another role": lambda messages: messages[1].__setitem__("role", "system"),
    "a message more": lambda messages: messages.insert(1, {"role": "user", "content": "Hello."}),
    "a message less": lambda messages: messages.pop(0),
    "no reply": lambda messages: messages.pop(2),
    "a new question, which clears the thought": lambda messages: messages.append({"role": "user", "content": "And?"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_really_another_context_is_a_fork(change):
    text = "I look.</think>There.<tool_call>look<arg_key>far</arg_key><arg_value>true</arg_value><arg_key>n</arg_key>" \
           "<arg_value>2</arg_value></tool_call><|observation|>"
    first = [ASKED[0], {"role": "user", "content": "Look around, caf\u00e9"}]
    call = said("packaged", [], first, completion(drawn("packaged", text)))
    messages = copy.deepcopy([*first, call.reply, *OBSERVED])
    assert sessions.ask(tokenizer("packaged"), [call], messages, [LOOK]).extends == 0
    CHANGES[change](messages)
    asked = sessions.ask(tokenizer("packaged"), [call], messages, [LOOK])
    assert asked.extends is None and asked.ids == retokenised("packaged", messages)


def test_tools_are_a_part_of_the_context():
    call = said("packaged", [], ASKED, completion(drawn("packaged", "Hm.</think>Yes.<|user|>")))
    messages = [*ASKED, call.reply, *OBSERVED]
    turned = [{key: LOOK[key] for key in reversed(LOOK)}]  # the same JSON value
    assert json.dumps(turned) != json.dumps([LOOK])
    assert sessions.ask(tokenizer("packaged"), [call], messages, turned).extends == 0
    for others in ([], [LOOK, LOOK], [tools.define("look", "Listen.", {})]):
        assert sessions.ask(tokenizer("packaged"), [call], messages, others).extends is None


def test_the_thought_that_was_shown_then_has_to_be_shown_now():
    """What decides is how the earlier call was rendered, not how this one would have rendered it."""
    first = said("packaged", [], ASKED, completion(drawn("packaged", "Hm.</think>Yes.<|user|>")))
    second = said("packaged", [first], [*ASKED, first.reply, ASKED[1]],
                  completion(drawn("packaged", "So.</think>No.<|observation|>")), clear_thinking=False)
    assert second.question.extends == 0
    messages = [*second.messages, *OBSERVED]
    ask = functools.partial(sessions.ask, tokenizer("packaged"), [first, second], messages, [LOOK])
    assert (ask(clear_thinking=False).extends, ask(clear_thinking=True).extends) == (1, None)
    cleared = said("packaged", [first], [*ASKED, first.reply, ASKED[1]], second.completion)
    assert cleared.question.extends is None
    ask = functools.partial(sessions.ask, tokenizer("packaged"), [first, cleared], messages, [LOOK])
    assert (ask(clear_thinking=False).extends, ask(clear_thinking=True).extends) == (0, 1)


def test_the_longest_call_is_continued_and_of_equals_the_latest():
    """The same answer, sampled again after the conversation went on, hides nothing of it."""
    text = "</think>Yes.<|observation|>"
    calls = [said("packaged", [], ASKED, completion(drawn("packaged", text, random.Random(0))))]
    onward = [*calls[0].messages, *OBSERVED]
    calls.append(said("packaged", calls, onward, completion(drawn("packaged", text, random.Random(1)))))
    calls += [said("packaged", [], ASKED, completion(drawn("packaged", text, random.Random(n)))) for n in (2, 3)]
    assert [call.question.extends for call in calls] == [None, 0, None, None]
    assert sessions.ask(tokenizer("packaged"), calls, [*calls[1].messages, *OBSERVED], [LOOK]).extends == 1
    assert sessions.ask(tokenizer("packaged"), calls, onward, [LOOK]).extends == 3


@pytest.mark.parametrize("messages, error", [
    ([{"role": "nobody"}], template.ChatError), ([{"role": "user", "content": 5}], template.ChatError),
    ([{"role": "user", "content": "\ud800"}], ValueError), ([{"role": "user", "extra": {1}}], TypeError)])
def test_messages_that_cannot_be(messages, error):
    with pytest.raises(error):
        sessions.ask(tokenizer("packaged"), [], messages)


WORDS = ("The sea. ", "caf\u00e9 ", "cafe\u0301\n", " 1 + 1", "\U0001f469\u200d\U0001f680", "</", "\n\n",
         "\u4f60\u597d", "x" * 9)


def random_session(seed: int, kind: str, options) -> list[Call]:
    """An agent that goes on from any earlier call, edits, branches and leaves thoughts out."""
    rng, calls = random.Random(seed), list[Call]()
    for number in range(7):
        base = rng.choice([None, *calls]) if number else None
        messages = copy.deepcopy([*base.messages] if base else ASKED)
        if base:
            echo = rng.choice([lambda reply: reply, lambda reply: without(reply, "reasoning_content"),
                               lambda reply: reply | {"content": (reply["content"] or "") + rng.choice(["", " ", "!"])},
                               functools.partial(normal, "NFC"), functools.partial(normal, "NFD")])
            messages[-1] = echo(messages[-1])
            messages += rng.choice([OBSERVED, [{"role": "user", "content": rng.choice(WORDS)}]])
        part = lambda: "".join(rng.choices(WORDS, k=rng.randint(0, 4)))
        text = part() + rng.choice(["</think>", ""]) + part() + rng.choice(["", CALLED, CALLED[:-20]])
        text, stop = rng.choice([(text + "<|user|>", "stop"), (text + "<|observation|>", "stop"), (text, "length")])
        calls.append(said(kind, calls, messages, completion(drawn(kind, text, rng), stop, number // 3), **options))
    return calls


def recorded(calls) -> list[Turn]:
    return [sessions.turn(calls[:n], call) for n, call in enumerate(calls)]


@pytest.mark.parametrize("clear_thinking", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_random_sessions_train_on_what_was_sampled_once(kind, clear_thinking):
    """Invariants 1 and 2 over the rows that a step sees: the sampled ids with their log-probs, each once."""
    forks = 0
    for seed in range(8):
        calls = random_session(seed, kind, {"clear_thinking": clear_thinking})
        one = Trajectory("r", "sea", seed, recorded(calls), "done")
        for n, call in enumerate(calls):
            assert one.prompt(n) == call.question.ids and one.sent(n) == call.question.messages
            if call.question.extends is not None:
                parent = calls[call.question.extends]
                assert call.question.ids[:len(parent.ids)] == parent.ids
        contexts = rows(one)
        forks += len(contexts) - 1
        trained = sorted((row.logprobs[n], row.ids[n], row.versions[n]) for row in contexts
                         for n in range(len(row.ids)) if row.trained[n])
        assert trained == sorted((logprob, id, version) for call in calls for id, logprob, version in zip(
            call.completion.ids, call.completion.logprobs, call.completion.versions))
        assert {row.ids for row in contexts} <= {call.ids for call in calls}
    assert forks > 0


@pytest.mark.parametrize("clear_thinking", [True, False])
def test_a_session_goes_on_from_its_record(clear_thinking):
    """The turns, through their JSON, are enough: every next call asks the same as in the session that never stopped."""
    options = {"clear_thinking": clear_thinking}
    continued = 0
    for seed in range(12):
        calls = random_session(seed, "packaged", options)
        turns = [from_json(Turn, to_json(turn)) for turn in recorded(calls)]
        again = sessions.restored(turns)
        assert [call.ids for call in again] == [call.ids for call in calls] and recorded(again) == turns
        for call in calls:
            messages = [*call.messages, *OBSERVED]
            asked, expected = (sessions.ask(tokenizer("packaged"), known, messages, [LOOK], **options)
                               for known in (again, calls))
            assert (asked.ids, asked.extends, asked.messages) == (expected.ids, expected.extends, expected.messages)
            continued += asked.extends is not None
            other = sessions.ask(tokenizer("packaged"), again, messages, [], **options)
            assert other.extends is None  # the record does not say which tools there were; its ids do
    assert continued > 40


def test_a_record_is_not_continued_by_another_rendering():
    first = said("packaged", [], ASKED, completion(drawn("packaged", "Hm.</think>Yes.<|user|>")))
    second = said("packaged", [first], [*ASKED, first.reply, ASKED[1]],
                  completion(drawn("packaged", "So.</think>No.<|observation|>")), clear_thinking=False)
    again = sessions.restored(recorded([first, second]))
    for clear_thinking, extends in ((False, 1), (True, None)):
        asked = sessions.ask(tokenizer("packaged"), again, [*second.messages, *OBSERVED], [LOOK],
                             clear_thinking=clear_thinking)
        assert asked.extends == extends


@pytest.mark.parametrize("turn", [Turn([], {"role": "assistant"}),
                                  Turn([], {"role": "assistant"}, (1,), completion((2,)), extends=0)])
def test_turns_that_are_no_record_of_a_session(turn):
    with pytest.raises(ValueError, match=r"turns\[0\]: expected tokens, and to extend an earlier turn; found"):
        sessions.restored([turn])


def test_raw_prompts():
    known = tokenizer("packaged")
    asked = sessions.ask_text(known, [], "<|user|>One")
    assert asked.ids == (known.id_of("<|user|>"), *known.encode("One"))
    letters = [spellings("packaged")[bytes([byte])] for byte in b" two"]
    call = Call(asked, {"role": "assistant", "content": " two"}, completion(letters, "length"))
    longer = sessions.ask_text(known, [call], "<|user|>One two three")
    assert (longer.extends, longer.ids) == (0, (*call.ids, *known.encode(" three")))
    assert sessions.turn([call], Call(longer, call.reply, call.completion)).messages == (
        {"role": "user", "content": " three"},)
    assert sessions.ask_text(known, [call], [*call.ids, 7]).extends == 0
    assert sessions.ask_text(known, [call], known.encode("<|user|>One two three", specials=True)).extends is None
    assert sessions.ask_text(known, [call], "<|user|>One too").extends is None
    assert sessions.ask(known, [call], [{"role": "user", "content": "<|user|>One"}, call.reply]).extends is None
    beyond = Call(asked, call.reply, completion((*letters, known.vocab_size), "length"))  # of a padded vocabulary
    for prompt, added in (("<|user|>One two three", known.encode(" three")), ([*beyond.ids, 7], [7])):
        assert sessions.ask_text(known, [beyond], prompt).ids == (*beyond.ids, *added)
    for prompt in ("", [], [known.vocab_size], [-1]):
        with pytest.raises(ValueError):
            sessions.ask_text(known, [], prompt)
