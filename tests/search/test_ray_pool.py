"""Which actor of a pool gets a batch, without Ray: actors that answer when they are told to."""

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from archfront.search.executors import ray_pool
from archfront.search.executors.ray_options import PoolOptions


class Actors:
    """Stands for Ray: futures that the test completes."""

    def __init__(self) -> None:
        self.hellos: list[Future[Any]] = []
        self.under_way: dict[bytes, tuple[int, Future[Any]]] = {}
        self.made = 0

    def make(self, _: Any) -> Any:
        number, self.made = self.made, self.made + 1
        return SimpleNamespace(
            hello=SimpleNamespace(remote=self._hello),
            evaluate_packed=SimpleNamespace(remote=lambda tasks, _: self._evaluate(number, tasks)),
        )

    def _hello(self) -> Any:
        self.hellos.append(Future())
        return SimpleNamespace(future=lambda future=self.hellos[-1]: future)

    def _evaluate(self, actor: int, tasks: bytes) -> Any:
        future: Future[Any] = Future()
        self.under_way[tasks] = (actor, future)
        return SimpleNamespace(future=lambda: future)

    def greet(self) -> None:
        for hello in self.hellos:
            if not hello.done():
                hello.set_result({"host": "h", "node": "n", "code": {}})


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Actors:
    made = Actors()
    monkeypatch.setattr(ray_pool, "differences", lambda *_: [])
    monkeypatch.setattr(ray_pool.ray, "put", lambda value: value)
    monkeypatch.setattr(ray_pool.ray, "kill", lambda _: None)
    monkeypatch.setattr(ray_pool.Pool, "_actor", lambda _, setup: made.make(setup))
    return made


def when_done(then: Callable[[Future[Any]], None], future: Future[Any]) -> None:
    future.add_done_callback(then)


def test_batches_go_to_idle_actors_once(actors: Actors) -> None:
    sent: list[Any] = []
    pool = ray_pool.Pool(PoolOptions(slots=3), {}, lambda kind, content: sent.append((kind, content)), when_done)
    pool.start(b"")
    pool.resize(3)
    for batch in range(4):
        pool.evaluate(batch, b"%d" % batch, 1.0)
    assert not actors.under_way  # none has come up
    actors.greet()
    assert {name: actor for name, (actor, _) in actors.under_way.items()} == {b"0": 0, b"1": 1, b"2": 2}
    actors.under_way[b"1"][1].set_result(b"ok")
    assert actors.under_way[b"3"][0] == 1
    assert [(kind, result.batch, result.packed) for kind, result in sent] == [("result", 1, b"ok")]
    for name in (b"0", b"2", b"3"):
        actors.under_way[name][1].set_result(b"ok")
    # Two idle ones end, and their successors have not come up yet: neither gets anything.
    pool.resize(1)
    pool.evaluate(4, b"4", 1.0)
    assert actors.under_way[b"4"][0] == 0
    pool.resize(3)
    pool.evaluate(5, b"5", 1.0)
    pool.evaluate(6, b"6", 1.0)
    assert not {b"5", b"6"} & set(actors.under_way)
    actors.greet()
    assert {actors.under_way[name][0] for name in (b"5", b"6")} == {3, 4}


def test_an_actor_that_is_lost_gives_its_batch_back_and_its_place_away(actors: Actors) -> None:
    sent: list[Any] = []
    pool = ray_pool.Pool(PoolOptions(slots=1), {}, lambda kind, content: sent.append((kind, content)), when_done)
    pool.start(b"")
    pool.resize(1)
    actors.greet()
    pool.evaluate(0, b"0", 1.0)
    actors.under_way[b"0"][1].set_exception(RuntimeError("the host is gone"))
    assert [(result.batch, result.lost) for _, result in sent] == [(0, True)]
    pool.evaluate(1, b"1", 1.0)
    assert b"1" not in actors.under_way
    actors.greet()
    assert actors.under_way[b"1"][0] == 1
