"""The filter before training: who is kept, by whose tries, and that it is made once."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from posttrain.data.instance_filter import AT_A_TIME, Competent
from posttrain.data.sampler import Shuffled
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory


def prompts(count: int) -> list[Prompt]:
    return [Prompt(torch.tensor([1]), key=i) for i in range(count)]


class Drawn:
    """Rewards by the prompt's key; every call is remembered."""

    def __init__(self, rewards: dict[int, Sequence[float]]) -> None:
        self.rewards, self.calls = rewards, list[tuple[int, int]]()

    def __call__(self, prompts: Sequence[Prompt], samples: int) -> list[Group]:
        self.calls.append((len(prompts), samples))
        mask = torch.tensor([False, True])
        return [
            Group(
                [Trajectory(torch.tensor([1, 2]), mask, reward=r, rewards={"iou": r / 2}) for r in self.rewards[p.key]]
            )
            for p in prompts
        ]


REWARDS = {0: [0, 0, 0, 0], 1: [0, 0, 0, 1], 2: [1, 1, 1, 1], 3: [0.9, 0.9, 0.9, 0.9], 4: [0, 1, 1, 0]}


def kept(**options: object) -> list[int]:
    sampler = Competent(range(5), samples=4, **options)  # type: ignore[arg-type]
    sampler.survey(prompts(5), Drawn(REWARDS))
    return sampler.kept


def test_one_success_is_enough_and_none_is_not() -> None:  # (a)
    assert kept() == [1, 2, 4], "by any success: the fourth has the highest mean of those without one"
    assert kept(drop_solved=True) == [1, 4]
    assert kept(threshold=0.5) == [1, 2, 3, 4]
    assert kept(threshold=0.5, component="iou") == [1, 2, 4]


def test_without_a_threshold_it_is_the_plain_sampler() -> None:  # (b)
    sampler, plain = Competent(range(5), 7, samples=4, threshold=float("-inf")), Shuffled(range(5), 7)
    sampler.survey(prompts(5), Drawn(REWARDS))
    assert sampler.take(23) == plain.take(23)


def test_takes_the_kept_rows_alone_each_once_an_epoch() -> None:
    sampler = Competent(range(5), 1, samples=4)
    sampler.survey(prompts(5), Drawn(REWARDS))
    taken = sampler.take(12)
    assert all(sorted(taken[i : i + 3]) == [1, 2, 4] for i in range(0, 12, 3))
    assert sampler.epoch == 4
    assert sampler.metrics() == {"competent": 0.6}


def test_the_survey_is_made_once_in_pieces() -> None:
    count = AT_A_TIME + 5
    draw = Drawn({i: [float(i % 2)] * 2 for i in range(count)})
    sampler = Competent(range(count), samples=2)
    assert sampler.metrics() == {}
    for _ in range(3):
        sampler.survey(prompts(count), draw)
    assert draw.calls == [(AT_A_TIME, 2), (5, 2)]
    assert sampler.counts == [2 * (i % 2) for i in range(count)]


def test_a_restored_filter_tries_nothing_again() -> None:
    whole, other, unmade = (Competent(range(5), 3, samples=4) for _ in range(3))
    unmade.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert unmade.counts is None
    whole.survey(prompts(5), Drawn(REWARDS))
    whole.take(4)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    other.survey(prompts(5), Drawn({}))
    assert other.take(20) == whole.take(20)


def test_what_cannot_be() -> None:
    sampler = Competent(range(2), samples=2)
    with pytest.raises(PosttrainError, match="none of 2 prompts is solved at least once in 2 tries"):
        sampler.survey(prompts(2), Drawn({0: [0, 0], 1: [0.5, 0]}))
    with pytest.raises(PosttrainError, match="no component 'acc'; it has iou"):
        kept(component="acc")
    with pytest.raises(PosttrainError, match="samples is 0"):
        Competent(range(2), samples=0)
