from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.reward.reward import Reward, reward_from
from posttrain.reward.verifiers import ExactMatch, Length, MathVerify, Regex
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory


def prompt(answer: Any = "4") -> Prompt:
    return Prompt(torch.zeros(0, dtype=torch.int64), text="2 + 2", answer=answer)


def short(completion: str, prompt: Prompt) -> float:
    return 1 / (1 + len(completion))


def stopped(completion: str, prompt: Prompt, *, finish: str) -> bool:
    return finish == "stop"


def fussy(completion: str, prompt: Prompt, **extra: Any) -> float:
    if "?" in completion:
        raise ValueError("a question")
    return float(extra["tokens"])


def test_total_is_the_weighted_sum_and_parts_are_unweighted() -> None:
    reward = Reward({"right": (ExactMatch(), 2.0), "stopped": (stopped, 0.5), "short": (short, -1.0)})
    score = reward.score(prompt(), "4", tokens=2, finish="stop")
    assert score.parts == {"right": 1.0, "stopped": 1.0, "short": 0.5}
    assert score.total == pytest.approx(2.0 + 0.5 - 0.5)
    assert score.errors == {}


def test_a_raising_component_is_counted_and_scored_by_the_declared_value() -> None:
    reward = Reward({"right": (ExactMatch(), 1.0), "fussy": (fussy, 2.0)}, on_error=-0.5)
    assert reward.score(prompt(), "4", tokens=3, finish="stop").total == pytest.approx(7)
    score = reward.score(prompt(), "4?", tokens=3, finish="stop")
    assert score.parts == {"right": 0.0, "fussy": -0.5}
    assert score.total == pytest.approx(-1)
    assert score.errors == {"fussy": "fussy: ValueError: a question"}
    reward.score(prompt(), "??", tokens=3, finish="stop")
    assert reward.errors == {"right": 0, "fussy": 2}
    assert reward.first_error == "fussy: ValueError: a question"


@pytest.mark.parametrize("value", [float("nan"), math.inf, None, "1.0", [1.0], {}])
def test_what_is_not_a_finite_number_is_an_error(value: Any) -> None:
    reward = Reward({"odd": (lambda completion, prompt: value, 1.0)}, on_error=0.25)
    score = reward.score(prompt(), "x", tokens=1, finish="stop")
    assert score.total == 0.25
    assert reward.errors == {"odd": 1}


@pytest.mark.parametrize("value", [True, 1, 1.0, torch.tensor(1.0)])
def test_numbers_of_every_kind_are_taken(value: Any) -> None:
    reward = reward_from(lambda completion, prompt: value)
    score = reward.score(prompt(), "x", tokens=1, finish="stop")
    assert score.total == 1.0
    assert type(score.total) is float


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupted(completion: str, prompt: Prompt) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward_from(interrupted).score(prompt(), "x", tokens=1, finish="stop")


def test_score_groups_fills_trajectories_in_place() -> None:
    mask = torch.tensor([False, False, True, True, True])
    trajectories = [
        Trajectory(torch.arange(5), mask, text=text, finish=finish)  # type: ignore[arg-type]
        for text, finish in (("4", "stop"), ("5", "length"))
    ]
    reward = Reward({"right": (ExactMatch(), 1.0), "stopped": (stopped, 0.5), "tokens": (fussy, 0.1)})
    group = Group(trajectories, prompt())
    reward.score_groups([group])
    assert group.rewards.tolist() == pytest.approx([1.8, 0.3])
    assert trajectories[1].rewards == {"right": 0.0, "stopped": 0.0, "tokens": 3.0}
    with pytest.raises(PosttrainError, match="without a prompt"):
        reward.score_groups([Group(trajectories)])


def test_reward_from_a_recipe_mapping() -> None:
    reward = reward_from(
        {
            "math_verify": 1.0,
            "format": {"pattern": "Answer: .*", "weight": 0.2},
            "short": {"verifier": "length", "maximum": 4, "unit": "tokens", "weight": 0.1},
            "regex": {"pattern": "a"},
            "on_error": -1,
        }
    )
    assert reward.weights == {"math_verify": 1.0, "format": 0.2, "short": 0.1, "regex": 1.0}
    assert reward.components["short"][0] == Length(4)
    assert reward.components["regex"][0] == Regex("a")
    assert reward.on_error == -1.0
    assert reward.score(prompt(), "Answer: 4", tokens=3, finish="stop").total == pytest.approx(1 + 0.2 + 0.1 + 0)


def test_reward_from_names_callables_and_rewards() -> None:
    assert reward_from("math_verify").components == {"math_verify": (MathVerify(), 1.0)}
    assert reward_from(short).components == {"short": (short, 1.0)}
    assert reward_from({"brief": short}).components == {"brief": (short, 1.0)}
    reward = reward_from("exact_match")
    assert reward_from(reward) is reward


def test_reward_from_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def brief(completion, prompt, limit=3):\n    return len(completion) <= limit\n"
    source += "class Fixed:\n    def __init__(self, value):\n        self.value = value\n"
    source += "    def __call__(self, completion, prompt):\n        return self.value\n"
    (tmp_path / "my_rewards_for_import.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for path in ("my_rewards_for_import", "my_rewards_for_import.py"):
        reward = reward_from({f"{path}:brief": {"limit": 5, "weight": 2}, f"{path}:Fixed": {"value": 0.5}})
        score = reward.score(prompt(), "12345", tokens=1, finish="stop")
        assert score.parts == {"brief": 1.0, "Fixed": 0.5}
        assert score.total == pytest.approx(2.5)
    assert reward_from("operator:eq").components["eq"][0](1, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math_verfy", "unknown verifier 'math_verfy'; did you mean math_verify"),
        ({"exact_macth": 1.0}, "did you mean exact_match"),
        ("zzz", "known: box_match, contains"),
        ("no_such_module_anywhere:f", "cannot import it: ModuleNotFoundError"),
        ("math:no_such_function", "AttributeError"),
        ("math:pi", "that is a float; expected something callable"),
        ("missing.py:f", "cannot import it: FileNotFoundError"),
        ({"regex": 1.0}, "missing a required argument: 'pattern'"),
        ({"regex": {"patern": "a"}}, r"its arguments are \(pattern"),
        ({"length": {"maximum": "9"}}, r"reward length: .*its arguments are \(maximum: 'int'"),
        ({"math_verify": "much"}, "expected a weight"),
        ({"math_verify": True}, "expected a weight"),
        ({"math_verify": float("nan")}, "weight is nan"),
        ({"on_error": 1.0}, "at least one component"),
        ({"operator:eq": 1.0, "eq": {"verifier": "length", "maximum": 3}}, "two components are called 'eq'"),
        ({"math_verify": 1.0, "on_error": "x"}, "on_error is 'x'"),
        (3, "expected a name"),
        (lambda completion: 1.0, r"expected \(completion, prompt\)"),
        (lambda completion, prompt, answer: 1.0, "answer"),
    ],
)
def test_bad_specs_say_what_was_expected(spec: Any, message: str) -> None:
    with pytest.raises(PosttrainError, match=message) as caught:
        reward_from(spec)
    assert "\n" not in str(caught.value)
