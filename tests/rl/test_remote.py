"""An engine behind HTTP: the same tokens as from the engine itself, and its refusals as what they are."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator

import httpx
import jax
import numpy as np
import pytest

from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import RequestTooLong, Sampling
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.transformer import init
from glm5_jax.records import Completion, PolicyVersion
from glm5_jax.rl import weights, worker
from glm5_jax.rl.remote import Remote
from glm5_jax.rl.weights import WeightsError
from glm5_jax.serve import __main__ as serve_main
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.generator import Closed, EngineLost

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=8, num_hidden_layers=1, intermediate_size=8, moe_intermediate_size=4,
    n_routed_experts=2, num_experts_per_tok=1, mlp_layer_types=("dense",), num_attention_heads=1, q_lora_rank=4,
    kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, index_n_heads=1, index_head_dim=8,
    index_topk=4, max_position_embeddings=64, num_nextn_predict_layers=0, dtype="float32")
TOKEN = "a worker's"
IDS = (3, 1, 4, 1, 5)


@dataclasses.dataclass
class Running:
    url: str
    driver: Driver
    folder: str
    stop: Callable[[], None]


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


@contextlib.contextmanager
def worked(params, folder: str) -> Iterator[Running]:
    """A worker in a thread, on a free port of this machine."""
    driver = Driver(Engine(params, CONFIG, slots=2, max_len=40, chunk=8, block=2))
    server = worker.Server(driver, TOKEN, lambda number: weights.fetch(folder, number, params))
    taken = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True

    with driver:
        yield Running("http://127.0.0.1:%d" % taken.getsockname()[1], driver, folder, stop)
        stop()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def running(params, tmp_path_factory) -> Iterator[Running]:
    with worked(params, str(tmp_path_factory.mktemp("policies"))) as running:
        yield running


@contextlib.asynccontextmanager
async def connected(running: Running):
    remote = await Remote.connect(running.url, TOKEN)
    try:
        yield remote
    finally:
        await remote.aclose()


async def whole(generator, ids, sampling, **options) -> Completion:
    return await whole_of(generator.stream(ids, sampling, **options))


async def whole_of(stream) -> Completion:
    pieces = [piece async for piece in stream]
    return sum(pieces[1:], pieces[0])


async def idle(driver: Driver) -> None:
    """When no request is left in the engine."""
    while await driver.call(lambda engine: engine.running + engine.waiting):
        pass


def test_the_tokens_are_the_engine_s_own(running):
    async def ask():
        async with connected(running) as remote:
            assert remote.max_len == 40
            asked = [Sampling(9, seed=seed, temperature=1.5) for seed in range(6)]
            far = await asyncio.gather(*(whole(remote, IDS, one, session=f"f{one.seed}") for one in asked))
            near = await asyncio.gather(*(whole(running.driver, IDS, one, session=f"n{one.seed}") for one in asked))
            rest = await whole(remote, IDS + near[0].ids[:4], asked[0], session="r", drawn=4)
            return far, near, rest

    far, near, rest = asyncio.run(ask())
    assert len({one.ids for one in near}) > 1
    assert [(one.ids, one.versions, one.stop) for one in far] == [(one.ids, one.versions, one.stop) for one in near]
    for one, other in zip(far, near):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)
    assert rest.ids == near[0].ids[4:]


def test_a_stream_that_is_left_frees_its_slot(running):
    """The engine stands still: the request cannot have ended by itself."""
    async def leave():
        async with connected(running) as remote:
            await running.driver.call(Engine.pause)
            pieces = remote.stream(IDS, Sampling(30), session="a")
            first = asyncio.ensure_future(anext(pieces))
            while not await running.driver.call(lambda engine: engine.waiting):
                await asyncio.sleep(0)
            await running.driver.call(two_blocks)
            assert 0 < len((await first).ids) < 30
            assert await running.driver.call(lambda engine: engine.running) == 1
            await pieces.aclose()
            await idle(running.driver)
            await running.driver.call(Engine.resume)

    asyncio.run(asyncio.wait_for(leave(), 60))
    assert running.driver.gauges.running == 0


def two_blocks(engine: Engine) -> None:
    engine.resume()
    for _ in range(2):
        engine.step()
    engine.pause()


def test_a_stream_that_is_called_back_ends_with_what_it_has(running):
    async def call_back():
        async with connected(running) as remote:
            pieces = remote.stream(IDS, Sampling(30, seed=1), session="a")
            got = [await anext(pieces)]
            remote.abort("a")
            got += [piece async for piece in pieces]
            again = await whole(remote, IDS, Sampling(30, seed=1), session="b")
            return sum(got[1:], got[0]), again

    part, again = asyncio.run(call_back())
    assert again.ids[:len(part.ids)] == part.ids and (part.stop == "abort" or part.ids == again.ids)


def test_refusals_are_what_they_are(running):
    async def ask(ids, sampling):
        async with connected(running) as remote:
            await whole(remote, ids, sampling, session="a")

    with pytest.raises(RequestTooLong, match="expected at most max_len = 40"):
        asyncio.run(ask(IDS, Sampling(36)))
    with pytest.raises(ValueError, match="expected 0 to 31"):
        asyncio.run(ask((32,), Sampling(1)))

    async def strange():
        await Remote.connect(running.url, "somebody else's")

    with pytest.raises(EngineLost, match="401"):
        asyncio.run(strange())


def test_a_worker_that_is_told_to_stop_lets_its_streams_go(params, tmp_path):
    """They end for the reader to go on elsewhere, though the engine would not have ended them."""
    async def scenario(running):
        async with connected(running) as remote:
            pieces = remote.stream(IDS, Sampling(30), session="a")
            await running.driver.call(Engine.pause)
            reading = asyncio.create_task(whole_of(pieces))
            while not await running.driver.call(lambda engine: engine.waiting + engine.running):
                pass
            running.stop()
            with pytest.raises(Closed, match="closed under the stream"):
                await asyncio.wait_for(reading, 60)

    with worked(params, str(tmp_path)) as running:
        asyncio.run(scenario(running))


def test_a_worker_whose_engine_has_ended_is_not_well(params):
    async def main():
        driver = Driver(Engine(params, CONFIG, slots=1, max_len=40))
        reached = httpx.ASGITransport(worker.application(driver, TOKEN, load=lambda number: pytest.fail("no push")))
        remote = await Remote.connect("http://worker", TOKEN, transport=reached)
        assert (await remote.health())["version"] == 0
        driver.close()
        with pytest.raises(Closed):
            await remote.health()
        await remote.aclose()

    asyncio.run(main())


def test_a_request_that_is_too_long_is_refused(running, monkeypatch):
    monkeypatch.setattr(worker, "MOST_BYTES", 500)

    async def ask():
        async with connected(running) as remote:
            await remote.health()
            with pytest.raises(ValueError, match="body: expected at most 500 bytes, found more"):
                await whole(remote, IDS * 100, Sampling(1), session="a")

    asyncio.run(ask())


def test_the_client_lets_a_connection_go_before_the_worker_does(running, monkeypatch):
    made = []

    class Recorded(httpx.AsyncClient):
        def __init__(self, **options):
            made.append(options["limits"])
            super().__init__(**options)

    async def connect():
        async with connected(running):
            pass

    monkeypatch.setattr(httpx, "AsyncClient", Recorded)
    asyncio.run(connect())
    server = worker.Server(running.driver, TOKEN, load=lambda number: pytest.fail("no push"))
    assert [limits.keepalive_expiry < server.config.timeout_keep_alive for limits in made] == [True]


@pytest.mark.parametrize("parser, arguments", [
    (worker._parser, ["--checkpoint", "c", "--policies", "p"]), (serve_main._parser, ["--checkpoint", "c"])])
def test_a_token_need_not_stand_among_the_arguments(parser, arguments, monkeypatch):
    monkeypatch.setenv("GLM5_JAX_TOKEN", "of the environment")
    assert parser().parse_args(arguments).token == "of the environment"
    assert parser().parse_args([*arguments, "--token", "named"]).token == "named"


def test_a_worker_that_is_not_there():
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    taken.close()
    with pytest.raises(EngineLost, match=f":{port}"):
        asyncio.run(Remote.connect(f"http://127.0.0.1:{port}", TOKEN))


def test_policies_reach_the_engine_whole_or_not_at_all(running, params):
    """Invariant 10: what is not whole is refused, and the engine serves on what it had."""
    changed = jax.tree.map(lambda x: x * 1.5, params)
    number = running.driver.gauges.version + 1
    policy = weights.publish(running.folder, changed, number=number, step=number)
    bad = weights.publish(running.folder, params, number=number + 1, step=number + 1)
    file = next(path for path in sorted(weights._directory(running.folder, bad.number).glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    async def push():
        async with connected(running) as remote:
            found = await remote.push(number)
            with pytest.raises(WeightsError, match="checksum"):
                await remote.push(number + 1)
            with pytest.raises(WeightsError, match="expected a policy, found none"):
                await remote.push(number + 2)
            with pytest.raises(ValueError, match="version"):
                await remote.push(number)
            return found, await remote.health(), await whole(remote, IDS, Sampling(9, seed=1), session="p")

    found, health, drawn = asyncio.run(push())
    assert found == policy == PolicyVersion(number, number, policy.checksum)
    assert set(drawn.versions) == {number} and health["version"] == number
    with Driver(Engine(changed, CONFIG, slots=1, max_len=40, chunk=8, block=2)) as alone:
        assert drawn.ids == asyncio.run(whole(alone, IDS, Sampling(9, seed=1), session="p")).ids
