"""Weights from histories (card 012's unit checks with their numbers), and what they make of a batch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from flat_batches import sequence

from posttrain.objective.batch import Batch
from posttrain.objective.reweight import (
    ChannelImitated,
    ChannelNormalised,
    ConvergenceWeights,
    Reweighted,
    channels_of,
    convergence,
    shares,
)
from posttrain.trajectory import Group, PosttrainError, Source


def test_by_hand() -> None:
    older, newer = [4.0, 2.0], [1.0, 2.0]
    c, i = convergence([*older, *newer])
    assert c == pytest.approx(1.5 / 3)
    assert i == pytest.approx(0.5 / 4.5)
    assert convergence([*newer, *older])[0] == pytest.approx(2.0), "rising: above 1"
    assert convergence([0.1, 0.1, 5.0, 5.0])[0] == 2.0, "held below 2"


def test_two_channels_by_hand() -> None:  # (c)
    found = shares({"a": 1.0, "b": 2.0}, 5.0)
    assert found["a"] == pytest.approx(0.90033, abs=5e-6)
    assert found["b"] == pytest.approx(1.09967, abs=5e-6)


def test_a_constant_history() -> None:  # (e)
    assert convergence([0.7] * 6) == (pytest.approx(1.0), 0.0)


def test_nothing_left_to_improve() -> None:
    assert convergence([1e-4] * 4) == (0.0, 0.0)
    assert convergence([0.0] * 4) == (0.0, 0.0)


def full(window: int = 2, temperature: float = 5.0, **histories: list[float]) -> ConvergenceWeights:
    made = ConvergenceWeights(window, temperature)
    for values in zip(*histories.values(), strict=True):
        made.observe(dict(zip(histories, values, strict=True)))
    return made


def test_identical_histories_weigh_alike() -> None:  # (a)
    same = [0.9, 0.5, 0.4, 0.6]
    assert full(a=same, b=same, c=same).now() == pytest.approx({"a": 1, "b": 1, "c": 1})


def test_weights_sum_to_the_number_of_channels() -> None:  # (b)
    chance = torch.Generator().manual_seed(0)
    made = full(a=torch.rand(4, generator=chance).tolist(), b=[1, 2, 3, 4], c=[0, 0, 0, 0])
    assert sum(made.now().values()) == pytest.approx(3)


def test_a_high_temperature_weighs_alike() -> None:  # (d)
    assert full(temperature=math.inf, a=[1, 1, 0.1, 0.1], b=[1, 1, 2, 2]).now() == {"a": 1.0, "b": 1.0}
    assert full(temperature=1e6, a=[1, 1, 0.1, 0.1], b=[1, 1, 2, 2]).now()["b"] == pytest.approx(1, abs=1e-5)


def test_what_stands_still_weighs_more_than_what_improves_and_the_solved_least() -> None:
    found = full(flat=[0.8] * 4, better=[0.8, 0.8, 0.4, 0.4], shaky=[0.8, 0.8, 0.2, 1.4], solved=[0.0] * 4).now()
    assert found["shaky"] > found["flat"] > found["better"] > found["solved"]


def test_all_weigh_alike_until_every_channel_has_a_history_of_its_own() -> None:
    made = ConvergenceWeights(window=2)
    for step in range(6):
        made.observe({"a": 1.0 / (step + 1)} | ({"b": 0.5} if step % 2 else {}))
        assert made.now() == dict.fromkeys(made.history, 1.0)
    made.observe({"b": 0.5})
    assert len(made.history["b"]) == 4
    assert made.now()["b"] > 1 > made.now()["a"]
    assert made.history["a"] == pytest.approx([1 / 3, 1 / 4, 1 / 5, 1 / 6]), "no more than is needed is kept"


def test_a_restored_history_weighs_the_same() -> None:
    made, other = full(a=[1, 2, 3, 1], b=[1, 1, 1, 1]), ConvergenceWeights(2)
    other.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert other.now() == made.now()


def test_bad_arguments() -> None:
    with pytest.raises(PosttrainError, match="window=0"):
        ConvergenceWeights(0)


# -- in a batch ------------------------------------------------------------------------------------------------------


def batch(*members: tuple[str, Source, list[tuple[int, float]]]) -> Batch:
    """Groups by domain and source, each sequence by its number of action tokens and its reward."""
    made = []
    for seed, (domain, source, sequences) in enumerate(members):
        facts = {f"channel/{domain}": 1.0}
        given = [sequence(n, seed=seed, reward=r, rewards={"x": r, "y": 1 - r / 2}, source=source, facts=dict(facts))
                 for n, r in sequences]  # fmt: skip
        made.append(Group(given))
    return Batch.of(made)


def mixed() -> Batch:
    return batch(
        ("new", "policy", [(2, 1.0), (4, 0.0)]),
        ("old", "policy", [(3, 1.0), (1, 0.5), (2, 0.0)]),
        ("new", "policy", [(1, 0.0), (1, 0.0)]),
        ("copy", "replay", [(5, 1.0)]),
        ("read", "replay", [(2, 1.0)]),
        ("copy", "replay", [(1, 1.0)]),
    )


def test_channels_by_domain_and_by_component() -> None:
    found = channels_of(mixed())
    assert sorted(found) == ["copy", "new", "old", "read"]
    assert found["old"].nan_to_num(-1).tolist() == [-1, -1, 1.0, 0.5, 0.0, -1, -1, -1, -1, -1]
    by_part = channels_of(mixed(), ("y", "x"))
    assert list(by_part) == ["y", "x"]
    assert by_part["y"][1] == 1.0
    with pytest.raises(PosttrainError, match="no completion has the reward component 'z'"):
        channels_of(mixed(), ("z",))


def test_what_a_channel_is_worth() -> None:
    from posttrain.methods import recap

    made = recap(imitate=("copy", "read")).objective
    assert isinstance(made, Reweighted)
    world = mixed()
    world.old_logp = -torch.arange(1, world.target.numel() + 1, dtype=torch.float32)
    values = made.values(world)
    assert values["new"] == pytest.approx(1 - 0.25)
    assert values["old"] == pytest.approx(1 - 0.5)
    copied = [*range(15, 20), 22]  # of the 14 tokens of rollouts, 5 + 2 + 1 of demonstrations
    assert values["copy"] == pytest.approx(sum(copied) / 6)
    assert values["read"] == pytest.approx((20 + 21) / 2)
    parts = recap(imitate=("copy", "read"), components=("x", "y")).objective
    assert isinstance(parts, Reweighted)
    found = parts.values(world)
    assert sorted(found) == ["imitation", "x", "y"]
    assert found["imitation"] == pytest.approx(sum(range(15, 23)) / 8)
    assert found["x"] == pytest.approx(1 - 2.5 / 7)


def test_a_channel_without_weight_is_a_mistake() -> None:
    for part in (ChannelNormalised(), ChannelImitated()):
        with pytest.raises(RuntimeError, match="belongs in a Reweighted mixture"):
            part.of(mixed())
