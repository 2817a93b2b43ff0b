"""Sessions over scripted generators: what is on record after every way in which a call can go and end."""

import asyncio
import copy
import random

import pytest

from glm5_jax.infer.request import RequestTooLong, Sampling
from glm5_jax.records import Completion, StopReason, Trajectory
from glm5_jax.rl.assemble import rows
from glm5_jax.serve.gateway import Gateway, Options
from glm5_jax.serve.generator import Closed, EngineLost, Overloaded, UnknownSession
from glm5_jax.text import tools
from glm5_jax.text.grammar import Fault, Kind, collect
from glm5_jax.text.template import ChatError
from glm5_jax.text.tokenizer import Tokenizer
from tests.serve.fakes import ScriptedGenerator

TOKENIZER = Tokenizer.packaged()
ASKED = [{"role": "user", "content": "What is in /tmp?"}]
OBSERVED = [{"role": "tool", "content": "a.txt"}]
LOOK = tools.define("look", "Look.", {"at": {"type": "string"}})
SAID = "I look.</think>Let me see.<tool_call>look<arg_key>at</arg_key><arg_value>/tmp</arg_value></tool_call>" \
       "<|observation|>"


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, specials=True)


def saying(*texts: str, **options) -> tuple[Gateway, ScriptedGenerator]:
    """A gateway whose calls are answered with these texts by turns."""
    asked = []

    def script(prompt, sampling, session):
        if prompt not in asked:
            asked.append(prompt)
        return ids_of(texts[asked.index(prompt) % len(texts)])

    limit = options.pop("limit", 8)
    generator = ScriptedGenerator(script, **options)
    return Gateway(generator, TOKENIZER, limit=limit), generator


def assert_nothing_is_left(gateway: Gateway, generator: ScriptedGenerator) -> None:
    assert gateway.running == 0 and generator.running == []


def test_a_conversation_on_record():
    async def run():
        gateway, generator = saying(SAID, "</think>A file.<|user|>")
        session = gateway.open()
        first = await gateway.chat(session, ASKED, [LOOK]).answer()
        assert first.reply == {"role": "assistant", "reasoning_content": "I look.", "content": "Let me see.",
                               "tool_calls": [{"type": "function",
                                               "function": {"name": "look", "arguments": {"at": "/tmp"}}}]}
        assert first.completion.ids == tuple(ids_of(SAID)) and first.completion.stop is StopReason.STOP
        assert (first.model, first.turn, first.stopped_by, first.errors) == ("glm5", 0, None, ())
        second = await gateway.chat(session, [*ASKED, first.reply, *OBSERVED], [LOOK]).answer()
        assert second.prompt[:len(first.prompt + first.completion.ids)] == first.prompt + first.completion.ids
        assert [asked for asked, _, _ in generator.asked] == [first.prompt, second.prompt]
        turns = gateway.turns(session)
        assert [(turn.extends, turn.messages, turn.reply) for turn in turns] == [
            (None, tuple(ASKED), first.reply), (0, tuple(OBSERVED), second.reply)]
        assert [turn.completion for turn in turns] == [first.completion, second.completion]
        one = Trajectory("r", "ls", 0, turns, "done")
        assert one.prompt(1) == second.prompt and len(rows(one)) == 1
        assert gateway.close(session) == turns and generator.released == [session]
        assert_nothing_is_left(gateway, generator)

    asyncio.run(run())


@pytest.mark.parametrize("stop", [(), ("see", "zz")])
@pytest.mark.parametrize("text", [SAID, "Hm", "", f"</think>{SAID}", "</think>x<tool_call>look</arg_key>", SAID[:-15]])
def test_a_stream_says_what_the_answer_says(text, stop):
    """Invariant 3: whatever the pieces are."""
    async def run():
        answers = []
        for block in (1, 2, 3, 7, 1000):
            gateway, generator = saying(text, block=block)
            session = gateway.open("s")
            stream = gateway.chat(session, ASKED, [LOOK], Options(stop=stop))
            pieces = [piece async for piece in stream]
            answer = await stream.answer()
            assert all(piece.completion.stop is StopReason.ABORT for piece in pieces[:-1])
            whole = pieces[0].completion
            for piece in pieces[1:]:
                whole += piece.completion
            assert whole == answer.completion == gateway.turns(session)[0].completion
            read = collect([event for piece in pieces for event in piece.events])
            assert tools.understand(read, [LOOK]) == (answer.reply, list(answer.errors))
            answers.append(answer)
            assert_nothing_is_left(gateway, generator)
        assert all(answer == answers[0] for answer in answers)

    asyncio.run(run())


def test_malformed_calls_are_told_and_keep_the_ids():
    async def run():
        said = "</think>Oh.<tool_call>look<arg_key>at</arg_key></tool_call><tool_call>lock</tool_call><|user|>"
        gateway, _ = saying(said)
        session = gateway.open()
        answer = await gateway.chat(session, ASKED, [LOOK]).answer()
        assert [error.kind for error in answer.errors] == [Fault.MISSING_VALUE, tools.Misuse.UNKNOWN_TOOL]
        assert answer.completion.ids == tuple(ids_of(said))
        again = gateway.chat(session, [*ASKED, answer.reply, *OBSERVED], [LOOK])
        assert again.prompt[:len(answer.prompt) + len(ids_of(said))] == answer.prompt + tuple(ids_of(said))
        await again.aclose()

    asyncio.run(run())


def test_options_reach_the_generator():
    async def run():
        gateway, generator = saying("</think>A", max_len=200)
        session = gateway.open("s")
        stream = gateway.chat(session, ASKED, [], Options(5, 0.5, 0.9, 7, 11))
        await stream.answer()
        assert generator.asked[-1] == (stream.prompt, Sampling(5, 0.5, 0.9, 7, TOKENIZER.stop_ids, 11), "s")
        stream = gateway.chat(session, ASKED, [], Options(thinking=False))
        await stream.answer()
        assert stream.prompt[-1] == TOKENIZER.id_of("</think>")
        assert generator.asked[-1][1].max_new_tokens == 200 - len(stream.prompt)

    asyncio.run(run())


def test_seeds_are_counted():
    """By session and call: the same in every run, and another for each."""
    async def seeds(names):
        gateway, generator = saying("</think>A")
        for name in names:
            gateway.open(name)
        for _ in range(3):
            for name in names:
                await gateway.chat(name, ASKED).answer()
        return [[sampling.seed for _, sampling, session in generator.asked if session == name] for name in names]

    first, again = asyncio.run(seeds(["a", "b"])), asyncio.run(seeds(["b"]))
    assert again == [first[1]] and len(set(sum(first, []))) == 6


def test_names_are_counted_where_none_is_given():
    gateway, _ = saying("")
    gateway.open("session-1")
    assert [gateway.open() for _ in range(3)] == ["session-0", "session-2", "session-3"]
    with pytest.raises(ValueError, match="session: expected a name that is free, found 'session-2'"):
        gateway.open("session-2")


def test_calls_of_a_session_may_overlap():
    """Each continues what had ended when it began, and is on record in the order of the ends."""
    async def run():
        gateway, generator = saying("</think>A<|observation|>", "</think>B<|user|>", "</think>C<|user|>", block=1)
        session = gateway.open()
        first = await gateway.chat(session, ASKED).answer()
        messages = [*ASKED, first.reply, *OBSERVED]
        two, three = gateway.chat(session, messages), gateway.chat(session, [*messages, *OBSERVED])
        assert gateway.running == 2
        await anext(two)
        third = await three.answer()
        second = await two.answer()
        assert (third.turn, second.turn) == (1, 2)
        assert [turn.extends for turn in gateway.turns(session)] == [None, 0, 0]
        four = gateway.chat(session, [*messages, second.reply, *OBSERVED])
        assert (await four.answer()).turn == 3 and gateway.turns(session)[3].extends == 2
        contexts = rows(Trajectory("r", "ls", 0, gateway.turns(session), "done"))
        assert [sum(row.trained) for row in contexts] == [len(first.completion.ids + third.completion.ids), 2 * 3]
        assert_nothing_is_left(gateway, generator)

    asyncio.run(run())


def test_many_sessions_at_once_are_not_mixed():
    async def run():
        rng = random.Random(0)
        words = {f"s{n}": [f"</think>{n} {turn} {'x' * rng.randrange(9)}<|observation|>" for turn in range(3)]
                 for n in range(200)}
        order = random.Random(1)
        generator = ScriptedGenerator(lambda ids, sampling, name: ids_of(words[name][len(gateway.turns(name))]),
                                      block=2)
        gateway = Gateway(generator, TOKENIZER, limit=200)

        async def agent(name):
            gateway.open(name)
            messages = [{"role": "user", "content": name}]
            for turn in range(3):
                stream = gateway.chat(name, messages)
                async for _ in stream:
                    for _ in range(order.randrange(3)):
                        await asyncio.sleep(0)
                answer = await stream.answer()
                assert answer.completion.ids == tuple(ids_of(words[name][turn])) and answer.turn == turn
                messages += [answer.reply, *OBSERVED]
            (row,) = rows(Trajectory(name, "ls", 0, gateway.close(name), "done"))
            assert row.ids[-len(answer.completion.ids):] == answer.completion.ids

        await asyncio.gather(*map(agent, words))
        assert_nothing_is_left(gateway, generator)
        assert sorted(generator.released) == sorted(words)

    asyncio.run(run())


def script_of_seed(prompt, sampling, session):
    """As an engine draws: the n-th token by seed and n alone."""
    draw = [random.Random(sampling.seed * 1000 + n).randrange(300, 4000) for n in range(40)]
    return [*ids_of("</think>"), *draw, TOKENIZER.stop_ids[1]]


@pytest.mark.parametrize("reopened", ["no", "with the aborted turn", "without it"])
@pytest.mark.parametrize("pieces", [0, 1, 4])
def test_an_aborted_call_resumes_to_the_whole(pieces, reopened):
    """Invariant 4, and no token is on record twice."""
    async def run():
        whole, _ = (Gateway(ScriptedGenerator(script_of_seed), TOKENIZER) for _ in range(2))
        whole.open("s")
        first = await whole.chat("s", ASKED).answer()
        messages = [*ASKED, first.reply, *OBSERVED]
        expected = await whole.chat("s", messages).answer()

        generator = ScriptedGenerator(script_of_seed)
        gateway = Gateway(generator, TOKENIZER)
        gateway.open("s")
        await gateway.chat("s", ASKED).answer()
        stream = gateway.chat("s", messages)
        for _ in range(pieces):
            await anext(stream)
        gateway.abort("s")
        aborted = await stream.answer()
        assert aborted.completion.stop is StopReason.ABORT and len(aborted.completion.ids) == 3 * pieces
        if reopened != "no":
            turns = gateway.close("s")
            gateway = Gateway(generator, TOKENIZER)
            gateway.open("s", turns=turns if reopened == "with the aborted turn" else turns[:1])
        resumed = gateway.chat("s", messages, resume=aborted.completion)
        parts = [piece.completion async for piece in resumed]
        answer = await resumed.answer()
        assert (answer.prompt, answer.completion, answer.reply, answer.turn) == (
            expected.prompt, expected.completion, expected.reply, 1)
        assert sum(len(part.ids) for part in parts) == len(answer.completion.ids) - 3 * pieces
        assert gateway.turns("s") == whole.turns("s")
        assert_nothing_is_left(gateway, generator)

    asyncio.run(run())


def test_a_resumed_call_that_is_aborted_again_stays_one_call():
    async def run():
        gateway = Gateway(ScriptedGenerator(script_of_seed), TOKENIZER)
        session, completion = gateway.open(), None
        for count in range(1, 4):
            stream = gateway.chat(session, ASKED, resume=completion)
            await anext(stream)
            gateway.abort(session)
            completion = (await stream.answer()).completion
            assert len(completion.ids) == 3 * count and len(gateway.turns(session)) == 1
        stream = gateway.chat(session, ASKED, resume=completion)
        await anext(stream)
        await stream.aclose()
        assert len(gateway.turns(session)[0].completion.ids) == 12 and len(gateway.turns(session)) == 1

    asyncio.run(run())


@pytest.mark.parametrize("reopened", [True, False])
def test_an_aborted_call_that_was_continued_as_it_was_keeps_its_place(reopened):
    async def run():
        gateway = Gateway(ScriptedGenerator(script_of_seed), TOKENIZER)
        session = gateway.open("s")
        stream = gateway.chat(session, ASKED)
        await anext(stream)
        gateway.abort(session)
        aborted = await stream.answer()
        child = gateway.chat(session, [*ASKED, aborted.reply, *OBSERVED])
        if reopened:
            await child.answer()
            turns = gateway.close(session)
            gateway.open(session, turns=turns)
        resumed = await gateway.chat(session, ASKED, resume=aborted.completion).answer()
        await child.answer()
        one = Trajectory("r", "ls", 0, gateway.turns(session), "done")
        assert resumed.turn == (2 if reopened else 1) and one.turns[0].completion == aborted.completion
        index = 1 if reopened else 2
        assert one.turns[index].extends == 0 and one.prompt(index) == child.prompt

    asyncio.run(run())


def test_a_call_is_aborted_before_anybody_reads_it():
    async def run():
        gateway, generator = saying(SAID)
        session = gateway.open()
        stream = gateway.chat(session, ASKED)
        gateway.abort(session)
        answer = await stream.answer()
        assert answer.completion == Completion((), (), (), "abort") and generator.asked == []
        assert gateway.turns(session)[0].completion == answer.completion
        assert_nothing_is_left(gateway, generator)

    asyncio.run(run())


@pytest.mark.parametrize("way", ["aclose", "async with", "cancelled", "cancelled while reading"])
@pytest.mark.parametrize("pieces", [0, 2])
def test_a_client_that_is_gone_frees_the_slot(pieces, way):
    """What had come is on record as aborted; a call of which nothing had come is not."""
    async def run():
        gateway, generator = saying(SAID, limit=1)
        session = gateway.open()
        stream = gateway.chat(session, ASKED)
        for _ in range(pieces):
            await anext(stream)
        generator.gate.clear()
        if way == "aclose":
            await stream.aclose()
        elif way == "async with":
            async with stream:
                pass
        else:
            task = asyncio.create_task(stream.answer() if way == "cancelled" else anext(stream))
            await asyncio.sleep(0)
            assert generator.running == [session]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert_nothing_is_left(gateway, generator)
        generator.gate.set()
        assert [turn.completion.ids for turn in gateway.turns(session)] == [tuple(ids_of(SAID)[:6])] * bool(pieces)
        assert all(turn.completion.stop is StopReason.ABORT for turn in gateway.turns(session))
        with pytest.raises(Closed):
            await stream.answer()
        await stream.aclose()
        part = gateway.turns(session)[0].completion if pieces else None
        answer = await gateway.chat(session, ASKED, resume=part).answer()
        assert answer.completion.ids == tuple(ids_of(SAID)) and len(gateway.turns(session)) == 1

    asyncio.run(run())


@pytest.mark.parametrize("error", [EngineLost("gone"), Overloaded("full"), ValueError("no")])
@pytest.mark.parametrize("pieces", [0, 2])
def test_a_generator_that_fails(pieces, error):
    async def run():
        gateway, generator = saying(SAID)
        session = gateway.open()
        stream = gateway.chat(session, ASKED)
        for _ in range(pieces):
            await anext(stream)
        generator.error = error
        for _ in range(2):
            with pytest.raises(type(error), match=str(error)):
                await stream.answer()
        assert_nothing_is_left(gateway, generator)
        assert [turn.completion.ids for turn in gateway.turns(session)] == [tuple(ids_of(SAID)[:6])] * bool(pieces)
        generator.error = None
        assert (await gateway.chat(session, ASKED).answer()).completion.ids == tuple(ids_of(SAID))

    asyncio.run(run())


class Unfaithful(ScriptedGenerator):
    """Says what a generator must not."""

    def __init__(self, *parts: Completion):
        super().__init__(lambda *_: [])
        self.parts = parts

    async def stream(self, ids, sampling, *, session, drawn=0):
        for part in self.parts:
            yield part


def test_a_stream_that_has_no_last_piece_is_aborted():
    async def run():
        gateway = Gateway(Unfaithful(Completion((7,), (-1,), (0,), "abort")), TOKENIZER)
        answer = await gateway.chat(gateway.open(), ASKED).answer()
        assert answer.completion == Completion((7,), (-1,), (0,), "abort")

    asyncio.run(run())


def test_versions_that_go_back_are_refused():
    """Invariant 8."""
    async def run():
        gateway = Gateway(Unfaithful(Completion((7,), (-1,), (2,), "abort"), Completion((7,), (-1,), (1,), "stop")),
                          TOKENIZER)
        session = gateway.open()
        with pytest.raises(ValueError, match="versions: expected none below the one before"):
            await gateway.chat(session, ASKED).answer()
        assert gateway.running == 0 and gateway.turns(session) == ()

    asyncio.run(run())


def test_a_stop_string_calls_the_rest_back():
    async def run():
        gateway, generator = saying("</think>One END two three four five", block=2)
        session = gateway.open()
        stream = gateway.chat(session, ASKED, options=Options(stop=("END",)))
        answer = await stream.answer()
        assert (answer.reply["content"], answer.stopped_by) == ("One ", "END")
        assert answer.completion.ids == tuple(ids_of("</think>One END")) and answer.completion.stop is StopReason.STOP
        assert_nothing_is_left(gateway, generator)
        again = gateway.chat(session, [*ASKED, answer.reply, *OBSERVED])
        assert again.prompt[:len(answer.prompt + answer.completion.ids)] == answer.prompt + answer.completion.ids

    asyncio.run(run())


def test_no_more_calls_than_the_limit():
    async def run():
        gateway, generator = saying(SAID, limit=2)
        session = gateway.open()
        streams = [gateway.chat(session, ASKED) for _ in range(2)]
        for call in (gateway.chat, gateway.text):
            with pytest.raises(Overloaded, match="at most 2"):
                call(session, ASKED)
        await streams[0].aclose()
        streams[0] = gateway.chat(session, ASKED)
        for stream in streams:
            await stream.answer()
        assert_nothing_is_left(gateway, generator)

    asyncio.run(run())


@pytest.mark.parametrize("asked, error, words", [
    ({"messages": [{"role": "x"}]}, ChatError, r"messages\[0\].role"),
    ({"tools": [{"type": "function"}]}, ValueError, r"tools\[0\].name: expected a name"),
    ({"options": Options(temperature=-1)}, ValueError, "Sampling.temperature"),
    ({"options": Options(stop=("",))}, ValueError, "Options.stop: expected"),
    ({"options": Options(stop="END")}, ValueError, "Options.stop: expected"),
    ({"options": Options(max_new_tokens=0)}, ValueError, "Sampling.max_new_tokens"),
    ({"options": Options(max_new_tokens=95)}, RequestTooLong, r"at most 100 tokens in all, found \d+ \+ 95"),
    ({"messages": [{"role": "user", "content": "x y " * 99}]}, RequestTooLong, "at most 100 tokens in all, found"),
    ({"resume": Completion((5,), (-1,), (0,), "stop")}, ValueError, "resume: expected a completion with stop 'abort'"),
    ({"resume": Completion((5,) * 4, (-1,) * 4, (0,) * 4, "abort"), "options": Options(max_new_tokens=4)}, ValueError,
     "resume: expected fewer than max_new_tokens = 4 tokens, found 4"),
])
def test_calls_that_can_never_run_are_refused_at_once(asked, error, words):
    gateway, generator = saying(SAID, max_len=100)
    session = gateway.open()
    with pytest.raises(error, match=words):
        gateway.chat(session, **({"messages": ASKED} | asked))
    assert_nothing_is_left(gateway, generator)


def test_sessions_that_are_not_open():
    gateway, _ = saying(SAID)
    gateway.open("a")
    gateway.close("a")
    for call in (gateway.turns, gateway.abort, gateway.close, lambda name: gateway.chat(name, ASKED),
                 lambda name: gateway.text(name, "x")):
        with pytest.raises(UnknownSession, match="found 'a'"):
            call("a")


def test_closing_a_session_calls_its_streams_back():
    async def run():
        gateway, generator = saying(SAID)
        streams = [gateway.chat(gateway.open(name), ASKED) for name in ("a", "b")]
        for stream in streams:
            await anext(stream)
        assert gateway.close("a") == ()
        ended, other = [await stream.answer() for stream in streams]
        assert (ended.completion.stop, other.completion.stop) == (StopReason.ABORT, StopReason.STOP)
        assert len(ended.completion.ids) == 3
        assert_nothing_is_left(gateway, generator)

    asyncio.run(run())


def test_shutdown_waits_for_readers_and_takes_no_more_calls():
    async def run():
        gateway, generator = saying(SAID)
        session = gateway.open()
        read, closed, unread = (gateway.chat(session, ASKED) for _ in range(3))
        await anext(read)
        await anext(closed)
        generator.gate.clear()
        answer = asyncio.create_task(read.answer())
        shutdown = asyncio.create_task(gateway.shutdown())
        assert (await answer).completion.stop is StopReason.ABORT
        assert not shutdown.done()
        for call in (lambda: gateway.chat(session, ASKED), lambda: gateway.text(session, "x"), gateway.open):
            with pytest.raises(Closed):
                call()
        await closed.aclose()
        await shutdown
        assert (await unread.answer()).completion.ids == ()
        assert [len(turn.completion.ids) for turn in gateway.turns(session)] == [3, 3, 0]
        assert_nothing_is_left(gateway, generator)

    asyncio.run(run())


def test_raw_completions():
    async def run():
        gateway, generator = saying("One two</think>", " three<|endoftext|>")
        session = gateway.open()
        stream = gateway.text(session, "<|user|>Count: ")
        pieces = [piece async for piece in stream]
        first = await stream.answer()
        assert {event.kind for piece in pieces for event in piece.events} == {Kind.CONTENT}
        assert (first.reply, first.errors) == ({"role": "assistant", "content": "One two</think>"}, ())
        second = await gateway.text(session, "<|user|>Count: One two</think>!").answer()
        assert second.prompt == first.prompt + first.completion.ids + tuple(ids_of("!"))
        assert second.reply["content"] == " three" and second.completion.stop is StopReason.STOP
        assert [turn.extends for turn in gateway.turns(session)] == [None, 0]
        third = gateway.text(session, [5, 6])
        assert third.prompt == (5, 6)
        assert await third.aclose() is None and len(gateway.turns(session)) == 2

    asyncio.run(run())


def test_the_record_is_the_sessions_own():
    async def run():
        gateway, _ = saying(SAID)
        session = gateway.open()
        messages, definitions = copy.deepcopy((ASKED, [LOOK]))
        stream = gateway.chat(session, messages, definitions)
        messages[0]["content"], definitions[0]["function"]["name"] = "gone", "gone"
        answer = await stream.answer()
        assert answer.errors == () and gateway.turns(session)[0].messages == tuple(ASKED)
        kept = copy.deepcopy(answer.reply)
        answer.reply["tool_calls"][0]["function"]["name"] = "gone"
        assert gateway.turns(session)[0].reply == kept
        again = gateway.chat(session, [*ASKED, kept, *OBSERVED], [LOOK])
        assert again.prompt[:len(answer.prompt)] == answer.prompt
        await again.answer()
        assert gateway.turns(session)[1].extends == 0

    asyncio.run(run())


def test_a_session_goes_on_from_turns():
    async def run():
        gateway, generator = saying(SAID, "</think>A file.<|user|>")
        session = gateway.open()
        answer = await gateway.chat(session, ASKED, [LOOK]).answer()
        again = Gateway(generator, TOKENIZER)
        again.open("other", turns=gateway.turns(session))
        second = await again.chat("other", [*ASKED, answer.reply, *OBSERVED], [LOOK]).answer()
        assert second.turn == 1 and again.turns("other")[0] == gateway.turns(session)[0]
        assert again.turns("other")[1].extends == 0

    asyncio.run(run())
