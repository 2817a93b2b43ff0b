"""Thinking over many turns: prompts continue what was sampled, or the break is reported with its cause."""

from hypothesis import given, settings, strategies as st
import pytest

from glm5_jax.text import chat, mask, stream, tools
from glm5_jax.text.thinking import INTERLEAVED, PRESERVED, Break, Cause, Extension, extend
from glm5_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.packaged()


def sample(tokenizer, reasoning, content, calls, stop):
    """The ids a model samples behind a generation prompt, in the order of the format."""
    def special(marker):
        return [tokenizer.id_of(marker)]

    ids = [] if reasoning is None else tokenizer.encode(reasoning) + special("</think>")
    ids += tokenizer.encode(content)
    for name, value in calls:
        ids += special("<tool_call>") + tokenizer.encode(name) + special("<arg_key>") + tokenizer.encode("k")
        ids += special("</arg_key>") + special("<arg_value>") + tokenizer.encode(value)
        ids += special("</arg_value>") + special("</tool_call>")
    return ids + special(stop)


forged = st.lists(st.one_of(st.text(max_size=4), st.sampled_from(SPECIAL_TOKENS + ("7", "[1,2]", "1.0"))),
                  max_size=4).map("".join)
replies = st.tuples(st.none() | forged.map(str.strip), forged.map(str.strip),
                    st.lists(st.tuples(st.sampled_from(["ls", "run"]), forged), max_size=2))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.tuples(replies, st.booleans(), forged), min_size=1, max_size=4),
       st.sampled_from([INTERLEAVED, PRESERVED]))
def test_prompts_continue_what_was_sampled(tokenizer, turns, thinking):
    messages = [{"role": "user", "content": "go"}]
    for (reasoning, content, calls), ends_turn, text in turns:
        prompt, _ = mask.encode(tokenizer, messages, add_generation_prompt=True,
                                **thinking.options(think=reasoning is not None))
        completion = sample(tokenizer, reasoning, content, calls, "<|user|>" if ends_turn else "<|observation|>")
        reply = stream.read_ids(tokenizer, completion, thinking=reasoning is not None)
        message, errors = tools.understand(reply)
        assert not errors
        messages += [message, {"role": "user" if ends_turn else "tool", "content": text}]
        following, weights = mask.encode(tokenizer, messages, add_generation_prompt=True, **thinking.options())
        found = extend(tokenizer, prompt, completion, following)
        # A lone </think> stays where it is when thoughts are cleared.
        cleared = ends_turn and thinking is INTERLEAVED and _current_thoughts(messages[:-1])
        if cleared:
            assert isinstance(found, Break) and found.cause in (Cause.THOUGHT_CLEARED, Cause.EMPTY_THOUGHT)
            assert found.in_prompt and (found.expected, found.found) != ("", "")
            assert prompt[found.position] == tokenizer.id_of("<think>")
        else:
            assert isinstance(found, Extension)
            assert [*prompt, *completion, *found.added] == following
            # What is learned of this turn is what was sampled.
            assert weights[len(prompt):len(prompt) + len(completion)] == [1] * len(completion)


def _current_thoughts(messages):
    last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    return [message for message in messages[last_user:] if message.get("reasoning_content")]


def test_modes_are_the_options_of_render():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "r"},
                {"role": "user", "content": "c"}]
    assert "<think>r</think>" in chat.render(messages, **PRESERVED.options())
    assert "<think>r</think>" not in chat.render(messages, **INTERLEAVED.options())
    for thinking in (INTERLEAVED, PRESERVED):
        asked = {think: chat.render(messages, add_generation_prompt=True, **thinking.options(think=think))
                 for think in (True, False)}
        assert asked[True].endswith("<|assistant|><think>") and asked[False].endswith("<|assistant|></think>")


PROMPT = [{"role": "user", "content": "go"}]


def step(reasoning="r", content="a", stop="<|user|>", thinking=INTERLEAVED, said=None, then="user"):
    """One completion, and the prompt that a client makes of it."""
    tokenizer = Tokenizer.packaged()
    prompt, _ = mask.encode(tokenizer, PROMPT, add_generation_prompt=True)
    completion = sample(tokenizer, reasoning, content, [], stop)
    message = {"role": "assistant", "reasoning_content": reasoning, "content": content} | (said or {})
    following, _ = mask.encode(tokenizer, PROMPT + [message, {"role": then, "content": "x"}], **thinking.options())
    return tokenizer, prompt, completion, following


@pytest.mark.parametrize("cause, in_prompt, arguments", [
    (Cause.THOUGHT_CLEARED, True, {}),
    (Cause.EMPTY_THOUGHT, True, {"reasoning": "", "thinking": PRESERVED}),
    (Cause.WHITE_SPACE, False, {"content": "a\n", "thinking": PRESERVED}),
    (Cause.WHITE_SPACE, False, {"reasoning": "\nr", "thinking": PRESERVED}),
    (Cause.WHITE_SPACE, False, {"reasoning": "r\n", "stop": "<|observation|>", "then": "tool"}),
    (Cause.STOP, False, {"stop": "<|endoftext|>", "thinking": PRESERVED}),
    (Cause.TEXT, False, {"said": {"content": "other"}, "thinking": PRESERVED}),
])
def test_a_break_names_its_cause(cause, in_prompt, arguments):
    tokenizer, prompt, completion, following = step(**arguments)
    found = extend(tokenizer, prompt, completion, following)
    assert isinstance(found, Break) and (found.cause, found.in_prompt) == (cause, in_prompt)
    history = prompt + completion
    assert history[:found.position] == following[:found.position]
    assert history[found.position] != following[found.position]
    assert tokenizer.decode(history[found.position:]).startswith(found.expected) and found.found


def test_the_remaining_causes(tokenizer):
    tokenizer, prompt, completion, following = step(thinking=PRESERVED)
    assert extend(tokenizer, prompt, completion, following) == Extension(tuple(tokenizer.encode("x")))
    assert extend(tokenizer, prompt, completion, following[:-2]).cause is Cause.SHORTER
    assert extend(tokenizer, prompt, completion, []).position == 0
    closed, opened = tokenizer.id_of("</think>"), tokenizer.id_of("<think>")
    assert extend(tokenizer, [5, closed], [7], [5, opened, 7]).cause is Cause.THOUGHT_ADDED
    word = tokenizer.encode("import")
    letters = [tokenizer.encode(letter)[0] for letter in "import"]
    assert len(word) < len(letters)
    assert extend(tokenizer, [], letters, word).cause is Cause.TOKENS
    assert extend(tokenizer, [], [], [3]) == Extension((3,))
