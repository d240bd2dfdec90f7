"""Workers of a pool: a death costs time, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import PATIENCE, Light, cluster, killing  # noqa: F401 - a fixture

from posttrain.rollout.pool.cluster import Cluster, joined, ray_package
from posttrain.rollout.pool.workers import Workers
from posttrain.trajectory import PosttrainError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def light(**given: Any) -> Callable[[], Any]:
    return lambda: ray_package().remote(Light).options(num_cpus=1, max_restarts=0).remote(**given)


@pytest.fixture
def workers() -> Iterator[Workers]:
    said: list[str] = []
    made = Workers(light(), 2, "light worker", said.append)
    made.said = said  # type: ignore[attr-defined]
    yield made
    made.close()


def test_jobs_are_shared_out_and_answers_come_in_their_order(workers: Workers) -> None:
    futures = [workers.submit(lambda w, i=i: w.add.remote(i)) for i in range(40)]
    answers = [future.result(PATIENCE) for future in futures]
    assert [number for number, _ in answers] == list(range(1, 41))
    assert workers.replaced == 0


def test_one_that_is_killed_is_replaced_and_its_job_done_again(workers: Workers, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with killing(file):
        job = workers.submit(lambda w: w.wait_at.remote(str(file)))
        others = [workers.submit(lambda w, i=i: w.add.remote(i)) for i in range(10)]
        assert job.result(PATIENCE) == "done"
    assert [future.result(PATIENCE)[0] for future in others] == list(range(1, 11))
    assert workers.replaced == 1
    assert workers.said == ["a light worker died; another takes its place and does its work again"]  # type: ignore[attr-defined]


def test_what_a_job_raises_is_raised_here(workers: Workers) -> None:
    with pytest.raises(ValueError, match="by itself"):
        workers.submit(lambda w: w.fail.remote()).result(PATIENCE)
    assert workers.submit(lambda w: w.add.remote(1)).result(PATIENCE)[0] == 2


def test_a_job_that_kills_every_worker_gives_up(workers: Workers) -> None:
    with pytest.raises(PosttrainError, match="3 light workers died over the same work") as caught:
        workers.submit(lambda w: w.exit.remote()).result(PATIENCE)
    assert "\n" not in str(caught.value)
    assert workers.submit(lambda w: w.add.remote(1)).result(PATIENCE)[0] == 2, "the pool goes on"


def test_workers_that_cannot_be_made_are_an_error() -> None:
    broken = Workers(light(bad=True), 1, "light worker")
    with pytest.raises(PosttrainError, match=r"no light worker can be started: .*no such device"):
        broken.submit(lambda w: w.add.remote(1)).result(PATIENCE)
    with pytest.raises(PosttrainError, match="there is no light worker any more"):
        broken.submit(lambda w: w.add.remote(1)).result(PATIENCE)
    broken.close()


def test_close_ends_all_and_cancels_what_waits() -> None:
    made = Workers(light(), 1, "light worker")
    pid = made.submit(lambda w: w.ready.remote()).result(PATIENCE)
    busy, waiting = (made.submit(lambda w: w.sleep.remote(100)) for _ in range(2))
    made.close()
    made.close()
    for future in (busy, waiting):
        with pytest.raises(CancelledError):
            future.result(10)
    with pytest.raises(PosttrainError, match="closed"):
        made.submit(lambda w: w.ready.remote()).result(1)
    assert pid > 0


def test_a_cluster_that_is_too_small_is_one_line() -> None:
    with (
        pytest.raises(PosttrainError, match=r"has 6 CPUs and the run takes 99 \(99 workers of 1 CPUs"),
        joined(Cluster(workers=99)),
    ):
        pass
