"""Demonstrations come in prompt by prompt, where the rollouts succeed too rarely."""

from __future__ import annotations

import pytest
from scripted import context, exact, prompt

from posttrain.reward.reward import Reward
from posttrain.rollout.strategies.gate import Gate
from posttrain.trajectory import Group, PosttrainError

ANSWERS = {"none": ["no", "no", "no"], "one": ["no", "yes", "no"], "two": ["yes", "yes", "no"]}


def sources(groups: list[Group]) -> list[list[str]]:
    return [[t.source for t in g.trajectories] for g in groups]


def run(gate: Gate, **options: object) -> tuple[list[Group], dict[str, float]]:
    here = context(ANSWERS, 3, **options)  # type: ignore[arg-type]
    return gate([prompt(q, "yes") for q in ANSWERS], here), here.metrics


OWN = ["policy"] * 3


@pytest.mark.limit("ahpo")
@pytest.mark.parametrize(("fewer", "opened"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)])
def test_the_gate_opens_below_a_number_of_successes(fewer: int, opened: int) -> None:
    # card 038, checks (a) to (c): 0 never, more than the group always, 1 where nobody succeeded
    groups, metrics = run(Gate(fewer))
    assert sources(groups) == [[*OWN, "expert"]] * opened + [OWN] * (3 - opened)
    assert metrics["gated"] == pytest.approx(opened / 3)


@pytest.mark.limit("hpt")
@pytest.mark.parametrize(("fewer", "opened"), [(0, 0), (1, 1), (4, 3)])
def test_instead_of_the_rollouts_there_is_the_demonstration_alone(fewer: int, opened: int) -> None:
    # card 046: gate -1 keeps all rollouts, gate n none
    groups, metrics = run(Gate(fewer, instead=True))
    assert sources(groups) == [["expert"]] * opened + [OWN] * (3 - opened)
    assert metrics["reward"] == pytest.approx(3 / 9)  # of everything drawn, also of what was dropped
    assert all(t.reward == 1 for g in groups for t in g.trajectories if t.source == "expert")


def test_a_graded_reward_below_success_is_none() -> None:
    here = context({"a": ["oh yes", "yes!"]}, 2)
    groups = Gate(1)([prompt("a", "yes")], here)
    assert sources(groups) == [["policy", "policy", "expert"]]
    assert sources(Gate(1, success=0.5)([prompt("a", "yes")], context({"a": ["oh yes", "no"]}, 2))) == [["policy"] * 2]


def test_success_can_be_of_one_component() -> None:
    reward = Reward({"exact": (exact, 1.0), "short": (lambda text, prompt: float(len(text) < 3), 1.0)})
    groups, _ = run(Gate(1), reward=reward)
    assert sources(groups)[0] == OWN  # "no" is short: the total is 1
    groups, _ = run(Gate(1, component="exact"), reward=reward)
    assert sources(groups)[0] == [*OWN, "expert"]
    with pytest.raises(PosttrainError, match="no component 'exakt'; expected one of exact, short"):
        run(Gate(1, component="exakt"), reward=reward)


def test_a_prompt_without_a_solution_keeps_its_rollouts() -> None:
    here = context({"none": ["no", "no"]}, 2)
    assert sources(Gate(9, instead=True)([prompt("none", None)], here)) == [["policy", "policy"]]
    assert here.metrics["gated"] == 0
