"""The process reward of a right answer, on solutions of the lab's word problems."""

from __future__ import annotations

import pytest
import torch

from posttrain.lab import worlds
from posttrain.reward.shapings.process import ProcessReward
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory
from scored_groups import context, rewards_of, scored

TASK = worlds.words(depth=(4, 4), heldout=0, train=5)


def earned(solution: str, shaping: ProcessReward, item: int = 0) -> float:
    problem = TASK.train[item]
    prompt = Prompt(torch.tensor([1, 3]), text=problem.question, answer=problem.answer, meta=problem.meta)
    member = Trajectory(torch.tensor([1, 3]), torch.tensor([False, True]), text=solution, finish="stop")
    group = Group([member], prompt)
    TASK.reward.score_groups([group])
    shaping([group], context())
    return member.reward


def parts(item: int = 0) -> list[str]:
    return str(TASK.train[item].solution).split(";")


@pytest.mark.parametrize("item", range(5))
def test_the_card_s_checks(item: int) -> None:
    *lines, answer = parts(item)
    shaping, size = ProcessReward(), len(lines)
    assert size == 4
    assert earned(";".join([*lines, answer]), shaping, item) == pytest.approx(1.0)
    value = (int(lines[0][-1]) + 1) % 10
    changed = [lines[0][:-1] + str(value), *lines[1:]]
    assert earned(";".join([*changed, answer]), shaping, item) == pytest.approx(0.2 + 0.8 * (1 - 1 / size))
    extra = [*lines, "1+1=zz:2"]
    assert earned(";".join([*extra, answer]), shaping, item) == pytest.approx(0.2 + 0.8 * (1 - 1 / size))
    assert earned(";".join([*lines[1:], answer]), shaping, item) == pytest.approx(0.2 + 0.8 * (1 - 1 / size))
    assert earned(answer, shaping, item) == pytest.approx(0.2)
    assert earned(";".join([answer] * 9), shaping, item) == pytest.approx(0.2)  # no more than the size is taken away
    assert earned(";".join([*lines, str((int(answer) + 1) % 10)]), shaping, item) == 0.0


def test_strict_and_outcome_only() -> None:
    *lines, answer = parts()
    faulty, whole = ";".join([*lines[1:], answer]), ";".join([*lines, answer])
    assert earned(faulty, ProcessReward(strict=True)) == 0.0
    assert earned(whole, ProcessReward(strict=True)) == pytest.approx(1.0)
    assert earned(faulty, ProcessReward(1.0, 0.0)) == earned(whole, ProcessReward(1.0, 0.0)) == 1.0


def test_what_it_reports() -> None:
    group = scored(["a", "b", "c"], [0.0] * 3, answer=[1.0, 1.0, 0.0], process=[1.0, 0.5, 1.0])
    ProcessReward()([group], step := context())
    assert rewards_of(group) == pytest.approx([1.0, 0.6, 0.0])
    assert step.metrics == {"process": 0.75, "false_right": 0.5}
    none = scored(["a"], [0.0], answer=[0.0], process=[0.0])
    ProcessReward()([none], step := context())
    assert step.metrics == {}
    with pytest.raises(PosttrainError, match="no component 'steps'; it has answer"):
        ProcessReward(steps="steps")([scored(["a"], [0.0], answer=[1.0])], context())
