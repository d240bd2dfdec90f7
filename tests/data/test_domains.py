"""Rows of several domains: drawn by weights, every row of a domain once before any comes again, and resumable."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from posttrain.data.domains import ByDomain
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory

SIZES = {"add": 6, "copy": 10, "sort": 4}


def rows(sizes: dict[str, int] = SIZES) -> list[Prompt]:
    names = [name for name, size in sizes.items() for _ in range(size)]
    return [Prompt(torch.tensor([1]), text=f"{n}{i}", key=i, meta={"domain": n}) for i, n in enumerate(names)]


def drawn(sampler: ByDomain, count: int) -> list[str]:
    return [str(rows()[i].meta["domain"]) for i in sampler.take(count)]


def test_frequencies_go_to_the_weights() -> None:
    weights = {"add": 5, "copy": 1, "sort": 4}
    found = Counter(drawn(ByDomain(rows(), 3, weights), 4000))
    for name, weight in weights.items():
        assert abs(found[name] / 4000 - weight / 10) < 0.025  # three standard errors of the largest
    alike = Counter(drawn(ByDomain(rows(), 3), 3000))
    assert all(abs(count / 3000 - 1 / 3) < 0.03 for count in alike.values())


def test_a_domain_without_weight_never_comes() -> None:
    assert set(drawn(ByDomain(rows(), 0, {"sort": 1.0, "copy": 0.0}), 200)) == {"sort"}


def test_within_a_domain_every_row_once_before_any_again() -> None:
    taken = ByDomain(rows(), 5).take(300)
    for name, size in SIZES.items():
        own = [i for i in taken if rows()[i].meta["domain"] == name]
        for start in range(0, len(own) - size, size):
            assert len(set(own[start : start + size])) == size


def test_how_many_are_taken_at_a_time_does_not_matter_and_seeds_do() -> None:
    whole, parts = ByDomain(rows(), 1).take(60), ByDomain(rows(), 1)
    assert [i for count in (1, 7, 0, 52) for i in parts.take(count)] == whole
    assert ByDomain(rows(), 2).take(60) != whole


def test_a_restored_sampler_goes_on_where_it_was() -> None:
    whole, other = ByDomain(rows(), 4), ByDomain(rows(), 4)
    whole.take(23)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert other.take(50) == whole.take(50)


def test_domains_of_groups_by_another_label() -> None:
    demonstration = Trajectory(torch.tensor([1, 2]), torch.tensor([False, True]))
    groups = [Group([demonstration], Prompt(torch.tensor([1]), meta={"level": i % 2})) for i in range(4)]
    sampler = ByDomain(groups, 0, {"1": 1.0}, by="level")
    assert {i % 2 for i in sampler.take(20)} == {1}
    assert sampler.metrics() == {"share/0": 0.0, "share/1": 1.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"adds": 1.0}, "'adds', which no row has; the rows have add, copy, sort"),
        ({"add": -1.0}, "from 0"),
        ({}, "above 0"),
    ],
)
def test_weights_must_fit(weights: dict[str, float], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        ByDomain(rows(), 0, weights)


def test_rows_must_have_the_label() -> None:
    with pytest.raises(PosttrainError, match=r"'add0' has no meta\['level'\]"):
        ByDomain(rows(), by="level")
    with pytest.raises(PosttrainError, match="no row"):
        ByDomain([])
