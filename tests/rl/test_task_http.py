"""A task behind HTTP: the same as in process, and nothing lost when workers come and go (invariants 7, 19, 20)."""

import asyncio
import dataclasses
import json
import re
import urllib.parse

import httpx
import pytest
import uvicorn

from glm5_jax.records import Completion, EndReason, FailureReason, Trajectory, Turn, to_json
from glm5_jax.rl.executors import CallFailed, WorkerLost
from glm5_jax.rl.ledger import Order
from glm5_jax.rl.orchestrator import Orchestrator, Service
from glm5_jax.rl.task_client import TaskClient
from glm5_jax.rl.task_server import app
from tests.rl.harness import run

TOKEN = "secret"
ORDER = Order("g-0", "sums", 7, 2, 0)
TURN = Turn([{"role": "user", "content": "1 + 1?"}], {"role": "assistant", "content": "2"}, prompt=(5,),
            completion=Completion((7, 8), (-0.1, -0.2), (3, 3), "stop"))


def rollout(order, id, end="done", turns=(TURN,)):
    return Trajectory(id, order.task, order.seed, turns, end)


class Task:
    """One worker's side: plays in a second, or until it is called back."""

    def __init__(self):
        self.playing, self.ended, self.error, self.wait = [], [], None, 1.0
        self.cleans, self.cleaned, self.most = 0.0, 0, 0

    async def play(self, order, id, so_far, called_back):
        self.playing.append(id)
        self.most = max(self.most, len(self.playing) - len(self.ended))
        try:
            async with asyncio.timeout(self.wait):
                await called_back.wait()
            return rollout(order, id, "aborted")
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            await asyncio.sleep(self.cleans)
            self.cleaned += 1
            raise
        finally:
            self.ended.append(id)
        if self.error:
            raise self.error
        return dataclasses.replace(so_far, end="done") if so_far else rollout(order, id)

    async def reward(self, trajectory):
        if self.error:
            raise self.error
        return len(trajectory.turns) / 2

    def service(self, **fields):
        return Service(**{"name": "sums", "ratio": 1.0, "most": 8, "size": 2, "seeds": int, "play": self.play,
                          "reward": self.reward} | fields)


class Net(httpx.AsyncBaseTransport):
    """Hosts by name; one that is down refuses connections, and one that is mute never answers. Requests for some paths
    take seconds to arrive."""

    def __init__(self, **tasks):
        self.tasks, self.down, self.mute, self.late = tasks, set(), set(), {}
        self.hosts = {name: httpx.ASGITransport(app(task.service(), TOKEN, longest=10_000))
                      for name, task in tasks.items()}

    async def handle_async_request(self, request):
        host = request.url.host
        if host in self.down:
            raise httpx.ConnectError("refused")
        if host in self.mute:
            await asyncio.sleep(1e9)
        if request.url.path in self.late:
            await asyncio.sleep(self.late[request.url.path])
        return await self.hosts[host].handle_async_request(request)


def with_workers(scenario, *names, token=TOKEN, **options):
    async def main():
        net = Net(**{name: Task() for name in names})
        client = TaskClient("sums", [f"http://{name}" for name in names], token, transport=net, **options)
        watch = asyncio.create_task(client.watch())
        await scenario(net, client)
        assert not watch.done()
        watch.cancel()
        await asyncio.wait([watch])
        await client.close()

    run(main)


def called_back():
    return asyncio.Event()


def test_a_rollout_and_its_reward_are_those_of_the_service():
    async def scenario(net, client):
        assert await client.play(ORDER, "sums-0", None, called_back()) == rollout(ORDER, "sums-0")
        begun = rollout(ORDER, "sums-1", "aborted")
        assert await client.play(ORDER, "sums-1", begun, called_back()) == dataclasses.replace(begun, end="done")
        assert await client.reward(rollout(ORDER, "sums-0")) == 0.5
        assert client.inside == {"http://a": 0}

    with_workers(scenario, "a")


def test_workers_share_the_rollouts():
    async def scenario(net, client):
        await asyncio.gather(*(client.play(ORDER, f"sums-{i}", None, called_back()) for i in range(40)))
        assert [len(task.ended) for task in net.tasks.values()] == [20, 20]

    with_workers(scenario, "a", "b")


def test_a_rollout_is_called_back_through_the_wire():
    async def scenario(net, client):
        net.tasks["a"].wait = 1e6
        event = called_back()
        one = asyncio.create_task(client.play(ORDER, "sums-0", None, event))
        await asyncio.sleep(10)
        event.set()
        assert (await one).end is EndReason.ABORTED and asyncio.get_running_loop().time() < 20

    with_workers(scenario, "a")


def test_a_rollout_that_is_given_up_or_asked_for_anew_ends_at_the_worker():
    async def scenario(net, client):
        net.tasks["a"].wait = 100
        one = asyncio.create_task(client.play(ORDER, "sums-0", None, called_back()))
        await asyncio.sleep(1)
        one.cancel()
        await asyncio.wait([one])
        await asyncio.sleep(1)
        assert net.tasks["a"].ended == ["sums-0"]
        first = asyncio.create_task(client.play(ORDER, "sums-1", None, called_back()))
        await asyncio.sleep(1)
        assert (await client.play(ORDER, "sums-1", None, called_back())).end is EndReason.DONE
        with pytest.raises(CallFailed, match="409.*asked for anew"):
            await first
        assert net.tasks["a"].ended == ["sums-0", "sums-1", "sums-1"]

    with_workers(scenario, "a")


def test_a_call_back_may_overtake_the_rollout_or_get_lost():
    """It is repeated until the rollout ends."""
    async def scenario(net, client):
        net.tasks["a"].wait = 1e6
        net.late["/play"] = 5.0
        event = called_back()
        one = asyncio.create_task(client.play(ORDER, "sums-0", None, event))
        await asyncio.sleep(1)
        event.set()
        await asyncio.sleep(3)
        net.down.add("a")
        await asyncio.sleep(3)
        net.down.clear()
        assert (await one).end is EndReason.ABORTED and asyncio.get_running_loop().time() < 10

    with_workers(scenario, "a")


def test_a_rollout_begins_anew_when_the_one_before_has_cleaned_up():
    """Also one that the server waits for no more."""
    async def scenario(net, client):
        task = net.tasks["a"]
        task.wait, task.cleans = 100, 8.0
        first = asyncio.create_task(client.play(ORDER, "sums-0", None, called_back()))
        await asyncio.sleep(1)
        with pytest.raises(WorkerLost, match="status 503: .*'sums-0' still cleans up"):
            await client.play(ORDER, "sums-0", None, called_back())
        with pytest.raises(CallFailed, match="409.*asked for anew"):
            await first
        second = asyncio.create_task(client.play(ORDER, "sums-0", None, called_back()))
        await asyncio.sleep(1)
        second.cancel()
        await asyncio.sleep(6)
        assert (await client.play(ORDER, "sums-0", None, called_back())).end is EndReason.DONE
        assert task.playing == task.ended == ["sums-0"] * 3 and (task.cleaned, task.most) == (2, 1)

    with_workers(scenario, "a")


@pytest.mark.parametrize("error, raised, words", [
    (ZeroDivisionError("no"), CallFailed, "status 500: .*ZeroDivisionError: no"),
    (TimeoutError("late"), TimeoutError, "status 504: .*TimeoutError: late"),
    (WorkerLost("gone"), WorkerLost, "status 503: .*WorkerLost: gone")])
def test_what_the_service_raises_is_raised_here(error, raised, words):
    async def scenario(net, client):
        net.tasks["a"].error = error
        for call in (client.play(ORDER, "sums-0", None, called_back()), client.reward(rollout(ORDER, "sums-0"))):
            with pytest.raises(raised, match=words):
                await call
        assert client.alive()

    with_workers(scenario, "a")


@pytest.mark.parametrize("how", ["down", "mute"])
def test_work_of_a_dead_worker_is_done_elsewhere(how):
    """Invariant 7: every rollout ends, and it is of no worker that was deregistered."""
    async def scenario(net, client):
        for task in net.tasks.values():
            task.wait = 50
        orchestrator = Orchestrator([Service("sums", 1.0, 8, 2, int, client.play, client.reward, alive=client.alive)])
        plays = [asyncio.create_task(orchestrator.play(ORDER, f"sums-{i}", None)) for i in range(6)]
        await asyncio.sleep(1)
        getattr(net, how).add("a")
        late = asyncio.create_task(orchestrator.play(ORDER, "sums-6", None))
        await asyncio.sleep(46)  # three beats, and their waits
        assert set(client.inside) == {"http://b"}
        ended = await asyncio.gather(*plays, late)
        assert [one.reward for one in ended] == [0.5] * 7
        assert len(net.tasks["b"].ended) == 7 and orchestrator.next(0) is not None
        getattr(net, how).clear()
        await asyncio.sleep(20)
        assert set(client.inside) == {"http://a", "http://b"}

    with_workers(scenario, "a", "b")


def test_a_task_without_workers_gets_no_groups_and_its_rollouts_wait():
    async def scenario(net, client):
        orchestrator = Orchestrator([Service("sums", 1.0, 8, 2, int, client.play, alive=client.alive)], retries=0)
        net.down.add("a")
        await asyncio.sleep(40)
        assert not client.alive() and orchestrator.next(0) is None
        one = asyncio.create_task(orchestrator.play(ORDER, "sums-0", None))
        await asyncio.sleep(30)
        net.down.clear()
        assert (await one).end is EndReason.DONE and orchestrator.next(0) is not None
        net.down.add("a")
        await asyncio.sleep(40)
        failure = (await orchestrator.play(ORDER, "sums-1", None)).failure
        assert failure.reason is FailureReason.WORKER
        assert "expected a worker within 60 s, found none of" in failure.detail

    with_workers(scenario, "a")


def test_a_worker_of_another_task_is_none():
    async def scenario(net, client):
        net.hosts["a"] = httpx.ASGITransport(app(Task().service(name="other"), TOKEN))
        with pytest.raises(CallFailed, match="status 400: .*expected 'other' and a string, found 'sums'"):
            await client.play(ORDER, "sums-0", None, called_back())
        await asyncio.sleep(40)
        assert not client.alive()

    with_workers(scenario, "a")


def test_without_the_token_nothing_is_told():
    async def scenario(net, client):
        with pytest.raises(CallFailed, match="status 401: .*expected the token of this task"):
            await client.play(ORDER, "sums-0", None, called_back())
        await asyncio.sleep(40)
        assert not client.alive() and not net.tasks["a"].playing

    with_workers(scenario, "a", token="guess")
    with pytest.raises(ValueError, match="token: expected a secret"):
        app(Task().service(), "")


def ask(body, path="play", **fields):
    """The status and the error of one request."""
    async def main():
        transport = httpx.ASGITransport(app(Task().service(**fields), TOKEN, longest=2000))
        async with httpx.AsyncClient(transport=transport, base_url="http://a",
                                     headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            answer = await client.post("/" + path, content=body)
            return answer.status_code, answer.json().get("error", "")
    return run(main)


GOOD = {"order": dataclasses.asdict(ORDER), "id": "sums-0", "so_far": None}


@pytest.mark.parametrize("body, status, error", [
    ("{", 400, "body: expected JSON, found"), ("[" * 100_000, 413, "body: expected at most 2000 bytes"),
    ("[" * 1990, 400, "body: expected JSON, found"), ("[1]", 400, "found list"),
    (json.dumps({"id": "a"}), 400, r"expected an object with the fields \['id', 'order', 'so_far'\], found \['id'\]"),
    (json.dumps(GOOD | {"order": {"id": 3}}), 400, "order: expected an object with .*seed: int"),
    (json.dumps(GOOD | {"order": GOOD["order"] | {"seed": True}}), 400, "order: expected"),
    (json.dumps(GOOD | {"id": 3}), 400, "order.task and id: expected 'sums' and a string, found 'sums' and 3"),
    (json.dumps(GOOD | {"so_far": {"id": ""}}), 400, "Trajectory: expected the fields"),
    (json.dumps(GOOD), 200, "")])
def test_what_is_no_request_is_refused(body, status, error):
    found, words = ask(body)
    assert found == status and re.search(error, words)


def test_a_task_without_a_reward_has_none():
    assert ask(to_json(rollout(ORDER, "a")), "reward", reward=None) == (
        404, "expected a task with a reward of its own, found 'sums'")


def test_an_answer_that_is_too_long_is_refused():
    async def scenario(net, client):
        with pytest.raises(CallFailed, match="expected an answer of at most 100 bytes, found more"):
            await client.play(ORDER, "sums-0", None, called_back())

    with_workers(scenario, "a", longest=100)


def test_a_live_server_cancels_what_nobody_waits_for():
    """Over a real connection, which closes."""
    async def main():
        task = Task()
        task.wait = 1000
        server = uvicorn.Server(uvicorn.Config(app(task.service(), TOKEN), port=0, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        url = urllib.parse.urlunsplit(("http", "%s:%d" % server.servers[0].sockets[0].getsockname(), "", "", ""))
        client = TaskClient("sums", [url], TOKEN)
        one = asyncio.create_task(client.play(ORDER, "sums-0", None, called_back()))
        event = called_back()
        two = asyncio.create_task(client.play(ORDER, "sums-1", None, event))
        while len(task.playing) < 2:
            await asyncio.sleep(0.005)
        one.cancel()
        while task.ended != ["sums-0"]:
            await asyncio.sleep(0.005)
        event.set()
        assert await two == rollout(ORDER, "sums-1", "aborted")
        await client.close()
        server.should_exit = True
        await serving

    asyncio.run(main())
