"""The server over the `tiny` model: many streams at once, and what the engine holds when clients or the server go."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jax
import openai
import pytest

import glm5_jax as glm5
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Sampling
from glm5_jax.serve.__main__ import main
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.gateway import Gateway
from glm5_jax.serve.http import listening
from glm5_jax.text import mask
from glm5_jax.text.stream import read_ids
from tests.serve.live import Live, PATIENCE, serving, TOKEN, TOKENIZER, Watched

STREAMS, SLOTS, MAX_LEN, DRAWN = 200, 16, 128, 6
CONFIG = glm5.tiny()


class Halting(Engine):
    """Stands still behind the first tokens of what runs, where it is told to."""

    halts = False

    def step(self) -> bool:
        busy = super().step()
        if self.halts and self.running:
            self.pause()
        return busy

    def halt(self, halts: bool) -> None:
        self.halts = halts
        self.resume()


def engine() -> Halting:
    return Halting(glm5.init(CONFIG, jax.random.key(0)), CONFIG, slots=SLOTS, max_len=MAX_LEN, chunk=32, block=4)


class Crowd(Watched):
    """Says, too, when all are there."""

    def __init__(self, driver: Driver):
        super().__init__(driver)
        self.driver, self.all_here = driver, threading.Event()

    async def stream(self, *arguments: Any, **options: Any) -> Any:
        if self.running == STREAMS - 1:
            self.all_here.set()
        async for piece in super().stream(*arguments, **options):
            yield piece


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    with Driver(engine()) as driver:
        yield Crowd(driver)


@pytest.fixture
def live(crowd: Crowd) -> Iterator[Live]:
    with serving(Gateway(crowd, TOKENIZER)) as live:
        yield live


def within(live: Live, coroutine: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, live.loop).result(PATIENCE)


def assert_idle(live: Live, crowd: Crowd) -> None:
    """Neither the engine nor the gateway nor the server's loop holds anything any more."""
    assert crowd.idle.wait(PATIENCE)
    assert within(live, crowd.driver.call(lambda engine: (engine.running, engine.waiting))) == (0, 0)
    live.stop()
    assert (live.gateway.running, live.left) == (0, [])


def asked(number: int) -> list[Any]:
    return [{"role": "user", "content": f"Say {number} in {number % 7} words."}]


def drawn() -> list[Any]:
    """What the engine alone, without a gateway, draws for each of the streams."""
    alone = engine()
    numbers = []
    for number in range(STREAMS):
        ids, _ = mask.encode(TOKENIZER, asked(number), add_generation_prompt=True)
        numbers.append(alone.submit(ids, Sampling(DRAWN, seed=number, stop_ids=TOKENIZER.stop_ids)))
    while alone.step():
        pass
    results = {result.request: result.completion for result in alone.results()}
    return [results[number] for number in numbers]


async def openai_stream(client: openai.AsyncOpenAI, number: int) -> list[tuple[bytes, float]]:
    """The tokens of a stream: what each spells, and its log-prob."""
    tokens = []
    async for chunk in await client.chat.completions.create(model="glm5", messages=asked(number), max_tokens=DRAWN,
                                                            seed=number, stream=True, logprobs=True):
        for choice in chunk.choices:
            tokens += choice.logprobs.content if choice.logprobs else []
    return [(bytes(token.bytes), token.logprob) for token in tokens]


async def anthropic_stream(client: anthropic.AsyncAnthropic, number: int) -> tuple[str, str, int]:
    """The thought and the text of a stream, and how many tokens they took."""
    async with client.messages.stream(model="glm5", messages=asked(number), max_tokens=DRAWN,
                                      extra_body={"seed": number}) as stream:
        message = await stream.get_final_message()
    return ("".join(block.thinking for block in message.content if block.type == "thinking"),
            "".join(block.text for block in message.content if block.type == "text"), message.usage.output_tokens)


def test_of_many_streams_at_once_none_is_lost_or_mixed(live, crowd):
    """The engine stands still until all of them wait for it."""
    async def all_of_them() -> list[Any]:
        async with (openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=TOKEN, max_retries=0) as one,
                    anthropic.AsyncAnthropic(base_url=live.url, api_key=TOKEN, max_retries=0) as other):
            streams = [asyncio.create_task(openai_stream(one, number) if number % 2 else
                                           anthropic_stream(other, number)) for number in range(STREAMS)]
            assert await asyncio.to_thread(crowd.all_here.wait, PATIENCE)
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(
                crowd.driver.call(lambda engine: engine.resume()), live.loop))
            return await asyncio.gather(*streams)

    within(live, crowd.driver.call(lambda engine: engine.pause()))
    found = asyncio.run(all_of_them())
    for number, completion in enumerate(drawn()):
        if number % 2:
            assert found[number] == list(zip(map(TOKENIZER.bytes_of, completion.ids), completion.logprobs))
        else:
            reply = read_ids(TOKENIZER, completion.ids)
            assert found[number] == (reply.reasoning or "", reply.content, len(completion.ids))
    assert_idle(live, crowd)


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_front(live, crowd):
    with live.plain() as administrator:
        sessions = [administrator.post("/v1/sessions").json() for _ in range(3)]
        first, second, third = (session["token"] for session in sessions)
        asking = {"model": "glm5", "messages": asked(1), "max_tokens": 20}
        live.openai(first).chat.completions.create(**asking, seed=5, temperature=0.7)
        list(live.openai(second).chat.completions.create(**asking, seed=5, temperature=0.7, stream=True))
        live.anthropic(third).messages.create(**asking, extra_body={"seed": 5, "temperature": 0.7})
        turns = [administrator.get(f"/v1/sessions/{session['id']}").json()["turns"] for session in sessions]
    assert turns[0][0]["completion"]["ids"]
    assert turns[0] == turns[1] == turns[2]
    assert_idle(live, crowd)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_client_that_goes_away_leaves_the_engine_idle(live, crowd, path):
    within(live, crowd.driver.call(lambda engine: engine.halt(True)))
    asking = {"model": "glm5", "messages": asked(1), "max_tokens": 100, "stream": True}
    with live.plain() as client, client.stream("POST", path, json=asking) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        assert within(live, crowd.driver.call(lambda engine: engine.running)) == 1
    assert crowd.idle.wait(PATIENCE)
    within(live, crowd.driver.call(lambda engine: engine.halt(False)))
    assert_idle(live, crowd)


def test_a_server_that_stops_leaves_the_engine_idle(live, crowd):
    within(live, crowd.driver.call(lambda engine: engine.halt(True)))
    asking = {"model": "glm5", "messages": asked(1), "max_tokens": 100, "stream": True, "n": 20}
    with live.plain() as client, client.stream("POST", "/v1/chat/completions", json=asking) as answer:
        pieces = answer.iter_text()
        said = next(pieces)
        live.server.should_exit = True
        said += "".join(pieces)
    assert "called back" in said.splitlines()[-2]
    live.stop()
    asyncio.run(crowd.driver.call(lambda engine: engine.halt(False)))
    assert asyncio.run(crowd.driver.call(lambda engine: (engine.running, engine.waiting))) == (0, 0)
    assert (live.gateway.running, live.left) == (0, [])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in the released layout, with its tokenizer."""
    directory = tmp_path_factory.mktemp("served") / "hf"
    config = CONFIG.replace(num_hidden_layers=2, mlp_layer_types=CONFIG.mlp_layer_types[:2],
                            indexer_types=CONFIG.indexer_types[:2])
    glm5.save_hf(directory, config, glm5.init(config, jax.random.key(0)))
    (directory / "tokenizer.json").write_text(TOKENIZER.marked.to_str(), encoding="utf-8")
    return directory


def test_the_command_serves_a_checkpoint_until_it_is_interrupted(checkpoint):
    command = [sys.executable, "-m", "glm5_jax.serve", "--checkpoint", str(checkpoint), "--port", "0",
               "--slots", "1", "--max-len", "512", "--token", TOKEN]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        told = dict(server.stdout.readline().split(maxsplit=1) for _ in range(3))
        assert told["at"].startswith("http://127.0.0.1:") and told["token"].strip() == TOKEN
        # One slot and many answers: it cannot end before it is told to.
        asking = {"model": "hf", "messages": asked(1), "stream": True, "n": 100}
        with httpx.stream("POST", f"{told['at'].strip()}/v1/chat/completions", json=asking,
                          headers={"x-api-key": TOKEN}, timeout=PATIENCE) as answer:
            pieces = answer.iter_text()
            said = next(pieces)
            assert answer.status_code == 200, said
            server.send_signal(signal.SIGINT)
            said += "".join(pieces)
        assert "called back" in said.splitlines()[-2]
        assert server.wait(PATIENCE) == 0


@pytest.mark.parametrize("arguments, told", [
    (["--checkpoint", "no/such/directory"], "no/such/directory"),
    (["--max-len", "1000000"], "max-len: expected at most the model's 4096, found 1000000"),
    (["--slots", "0"], "slots: expected at least 1"),
    (["--port", "70000"], "port: expected 0 to 65535, found 70000"),
])
def test_the_command_says_what_is_wrong(checkpoint, capsys, arguments, told):
    assert main(["--checkpoint", str(checkpoint), "--max-len", "64", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(checkpoint, capsys):
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["--checkpoint", str(checkpoint), "--max-len", "64", "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err
