"""Levels matched to the policy: which are kept, by whose tries, and that it is measured once."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from posttrain.data.difficulty import MatchedLevels
from posttrain.data.sampler import Shuffled
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory

LEVELS = ["easy", "medium", "hard", "hard", "medium", "easy"]


def rows(levels: Sequence[str] = LEVELS) -> list[Prompt]:
    return [Prompt(torch.tensor([1]), key=i, meta={"domain": level}) for i, level in enumerate(levels)]


class Tries:
    """Every prompt of a level is solved so many times of four."""

    def __init__(self, **solved: int) -> None:
        self.solved, self.keys = solved, list[int]()

    def __call__(self, prompts: Sequence[Prompt], samples: int) -> list[Group]:
        assert samples == 4
        self.keys += [p.key for p in prompts]
        mask = torch.tensor([False, True])
        return [
            Group(
                [
                    Trajectory(
                        torch.tensor([1, 2]), mask, reward=float(i < self.solved[p.meta["domain"]]), rewards={"f": 1.0}
                    )
                    for i in range(4)
                ]
            )
            for p in prompts
        ]


@pytest.mark.parametrize(
    ("solved", "kept"),
    [
        ((4, 2, 0), ["medium"]),
        ((3, 1, 0), ["easy", "medium"]),
        ((4, 0, 0), ["hard"]),  # none suits; 0 is 0.1 from the range, and 1 is 0.2; the first of equals
        ((4, 4, 4), ["easy"]),
    ],
)
def test_levels_within_the_range_or_the_nearest(solved: tuple[int, int, int], kept: list[str]) -> None:
    sampler = MatchedLevels(rows())
    sampler.survey(rows(), Tries(easy=solved[0], medium=solved[1], hard=solved[2]))
    assert sampler.chosen == kept
    assert {LEVELS[i] for i in sampler.take(24)} == set(kept)
    rates = {f"pass_rate/{n}": s / 4 for n, s in zip(("easy", "medium", "hard"), solved, strict=True)}
    assert sampler.metrics() == rates | {"matched": len(kept) / 3}


def test_the_nearest_level_may_lie_above() -> None:
    sampler = MatchedLevels(rows(), low=0.5, high=0.9)
    sampler.survey(rows(), Tries(easy=4, medium=1, hard=0))
    assert sampler.chosen == ["easy"]


def test_takes_every_kept_row_once_an_epoch() -> None:
    sampler = MatchedLevels(rows(), 3)
    sampler.survey(rows(), Tries(easy=3, medium=2, hard=0))
    taken = sampler.take(12)
    assert all(sorted(taken[i : i + 4]) == [0, 1, 4, 5] for i in range(0, 12, 4))


def test_a_probe_tries_so_many_of_each_level_and_only_once() -> None:
    tries = Tries(easy=4, medium=2, hard=0)
    sampler = MatchedLevels(rows(), probe=1)
    for _ in range(2):
        sampler.survey(rows(), tries)
    assert sorted(LEVELS[key] for key in tries.keys) == ["easy", "hard", "medium"]


@pytest.mark.parametrize("levels", [["only"] * 5, [""] * 5])
def test_one_level_is_taken_whole_without_a_try(levels: list[str]) -> None:
    prompts = rows(levels)
    if not levels[0]:
        for prompt in prompts:
            prompt.meta.clear()
    sampler, plain = MatchedLevels(prompts, 7), Shuffled(prompts, 7)
    sampler.survey(prompts, Tries())
    assert sampler.take(13) == plain.take(13)


def test_a_restored_sampler_goes_on_and_tries_nothing_again() -> None:
    whole, other = MatchedLevels(rows(), 3), MatchedLevels(rows(), 3)
    whole.survey(rows(), Tries(easy=4, medium=2, hard=0))
    whole.take(3)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    other.survey(rows(), Tries())
    assert other.take(9) == whole.take(9)
    assert other.metrics() == whole.metrics()


def test_rates_by_a_component_and_what_cannot_be() -> None:
    sampler = MatchedLevels(rows(), component="f")
    sampler.survey(rows(), Tries(easy=0, medium=0, hard=0))
    assert set(sampler.rates.values()) == {1.0}
    with pytest.raises(PosttrainError, match="no component 'g'; it has f"):
        MatchedLevels(rows(), component="g").survey(rows(), Tries(easy=0, medium=0, hard=0))
    with pytest.raises(PosttrainError, match=r"low=0.9, high=0.1"):
        MatchedLevels(rows(), low=0.9, high=0.1)
