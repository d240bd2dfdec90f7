"""The simulation of overlap: closed forms in its limits, an independent event queue, and what must hold always."""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.plan.overlap import Completions, Service, simulate, sweep
from posttrain.trajectory import PosttrainError


def alike(steps: int, count: int, tokens: float = 1.0) -> np.ndarray:
    return np.full((steps, count), tokens)


def ragged(steps: int, count: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    return Completions(mean=3.0, spread=spread).draw(steps, count, seed)


def test_one_worker_without_overlap_takes_the_sum_of_all_times() -> None:
    times, tokens = Service(update=2.5, token=0.5, completions=6, slots=1, prefill=0.25), ragged(7, 6)
    found = simulate(times, 1, 0, tokens)
    assert found.ends[-1] == pytest.approx(7 * 2.5 + 0.25 * 42 + 0.5 * tokens.sum(), rel=1e-12)
    assert found.stalest == 0


def test_workers_without_end_leave_the_training_bound() -> None:
    times = Service(update=2.0, token=0.1, completions=8, slots=4)
    found = simulate(times, 10_000, 4, ragged(60, 8), warmup=20)  # the longest completion is far shorter than 5 updates
    assert found.throughput == pytest.approx(times.training_bound, rel=1e-12)
    assert found.trainer == pytest.approx(1.0)


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
@pytest.mark.parametrize(("update", "sync", "slots"), [(1.0, 0.5, 4), (9.0, 0.0, 4), (5.0, 1.0, 12), (0.1, 0.2, 1)])
def test_equal_lengths_give_the_formula_of_a_pipeline(staleness: int, update: float, sync: float, slots: int) -> None:
    """Period: the trainer, the workers, or a completion's way through `staleness + 1` steps, whichever is longest."""
    count, token = 12, 0.7
    drawing = count / slots * token
    period = max(update, drawing, (drawing + update + sync) / (staleness + 1))
    times = Service(update=update, token=token, completions=count, slots=1, sync=sync)
    steps = 24 * (staleness + 1)
    found = simulate(times, slots, staleness, alike(steps, count), warmup=steps // 2)
    assert found.step == pytest.approx(period, rel=1e-9)


def test_synchronous_steps_wait_for_the_longest_of_n_exponentials() -> None:
    count, steps = 32, 4000
    tokens = np.random.default_rng(0).exponential(1.0, (steps, count))
    found = simulate(Service(update=1.5, token=1.0, completions=count, slots=8), 4, 0, tokens)
    harmonic = sum(1 / n for n in range(1, count + 1))
    deviation = math.sqrt(sum(1 / n**2 for n in range(1, count + 1)))
    assert found.step == pytest.approx(1.5 + harmonic, abs=4 * deviation / math.sqrt(steps))


def by_events(times: Service, workers: int, staleness: int, tokens: np.ndarray) -> list[float]:
    """The same cluster as an event queue: what may start does whenever a slot gets free or weights come out."""
    steps, count = tokens.shape
    waiting = [(s, times.prefill + times.token * float(t)) for s in range(steps) for t in tokens[s]][::-1]
    events: list[tuple[float, int, str, int]] = []
    free, version, trained, training = workers * times.slots, 0, 0, False
    left, ends, number = [count] * steps, [0.0] * steps, 0

    def push(at: float, kind: str, step: int) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (at, number, kind, step))

    push(0.0, "begin", 0)
    while events:
        now, _, kind, step = heapq.heappop(events)
        if kind == "done":
            free, left[step] = free + 1, left[step] - 1
        elif kind == "weights":
            version += 1
        elif kind == "updated":
            ends[step], trained, training = now, trained + 1, False
            push(now + times.sync, "weights", step)
        while free and waiting and waiting[-1][0] <= version + staleness:
            of, seconds = waiting.pop()
            free -= 1
            push(now + seconds, "done", of)
        if not training and trained < steps and left[trained] == 0:
            training = True
            push(now + times.update, "updated", trained)
    return ends


@st.composite
def clusters(draw: Any) -> tuple[Service, int, int, np.ndarray]:
    count = draw(st.integers(1, 6))
    times = Service(
        update=draw(st.floats(0.01, 5)), token=draw(st.floats(0.01, 2)), completions=count,
        slots=draw(st.integers(1, 3)), sync=draw(st.floats(0, 2)), prefill=draw(st.floats(0, 1)),
    )  # fmt: skip
    spread = draw(st.floats(0, 2))
    return times, draw(st.integers(1, 4)), draw(st.integers(0, 3)), ragged(8, count, draw(st.integers(0, 99)), spread)


@settings(max_examples=60, deadline=None)
@given(clusters())
def test_it_is_what_an_event_queue_gives(cluster: tuple[Service, int, int, np.ndarray]) -> None:
    assert simulate(*cluster).ends == pytest.approx(by_events(*cluster), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(clusters())
def test_what_holds_of_every_cluster(cluster: tuple[Service, int, int, np.ndarray]) -> None:
    times, workers, staleness, tokens = cluster
    found = simulate(times, workers, staleness, tokens)
    assert found.stalest <= staleness
    assert found.throughput <= times.training_bound * (1 + 1e-9)
    service = times.prefill + times.token * tokens
    assert found.ends[-1] >= service.sum() / (workers * times.slots) - 1e-9
    assert 0 < found.trainer <= 1 + 1e-9
    assert 0 < found.rollout <= 1 + 1e-9
    # more workers, or more staleness, never delay an update
    for other in (simulate(times, workers + 1, staleness, tokens), simulate(times, workers, staleness + 1, tokens)):
        assert all(a <= b + 1e-9 for a, b in zip(other.ends, found.ends, strict=True))
    twice = Service(
        2 * times.update, 2 * times.token, times.completions, times.slots, 2 * times.sync, 2 * times.prefill
    )
    assert simulate(twice, workers, staleness, tokens).ends == pytest.approx([2 * e for e in found.ends], rel=1e-9)


def test_lengths_have_the_mean_and_the_spread_asked_for() -> None:
    drawn = Completions(mean=200.0, spread=0.8).draw(400, 500, 1)
    assert drawn.mean() == pytest.approx(200, rel=0.01)
    assert drawn.std() / drawn.mean() == pytest.approx(0.8, rel=0.03)
    assert Completions(mean=200.0, spread=0.0).draw(2, 3, 0).tolist() == [[200.0] * 3] * 2
    assert Completions(spread=2.0, longest=600).draw(50, 50, 0).max() == 600
    assert set(Completions(measured=(3.0, 5.0)).draw(20, 20, 0).flatten()) == {3.0, 5.0}


def test_a_sweep_finds_where_each_curve_saturates() -> None:
    times = Service(update=4.0, token=0.01, completions=64, slots=4)
    curves = sweep(times, Completions(mean=100), [1, 2, 4, 8, 16, 32], [0, 2], [0.0, 1.0], steps=24)
    assert [(c.spread, c.staleness) for c in curves] == [(0.0, 0), (0.0, 2), (1.0, 0), (1.0, 2)]
    # equal lengths, overlapped: 16 waves of a second take one worker 16 s, so that four of them keep up with 4 s
    assert curves[1].saturates == 4
    assert curves[1].share == pytest.approx(1.0)
    assert curves[0].share < 0.9  # without overlap the trainer waits
    assert curves[2].points[-1].outcome.throughput < curves[0].points[-1].outcome.throughput  # and for stragglers
    assert all(
        a.outcome.throughput <= b.outcome.throughput + 1e-9
        for c in curves
        for a, b in zip(c.points, c.points[1:], strict=False)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Service(update=-1, token=1, completions=4), "update is -1"),
        (lambda: Service(update=0, token=0, completions=4), "both 0 seconds"),
        (lambda: Service(update=1, token=1, completions=0), "completions is 0"),
        (lambda: Completions(mean=0), "expected a positive"),
        (lambda: simulate(Service(1, 1, 4), 0, 0, alike(3, 4)), "at least 1 worker"),
        (lambda: simulate(Service(1, 1, 4), 1, 0, alike(3, 5)), "expected at least 1 worker"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        make()
