"""Settings and methods as values: what is refused, how long a stage is, how parts are swapped."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain import methods
from posttrain.objective.advantage import LeaveOneOut
from posttrain.objective.mask import Clip
from posttrain.training.method import stages_of
from posttrain.training.settings import NAMES, Settings
from posttrain.trajectory import PosttrainError, Sampling


@pytest.mark.parametrize(
    ("given", "rows", "steps"),
    [
        ({"steps": 7, "epochs": 3}, 100, 7),
        ({"batch": 16}, 32, 2),
        ({"batch": 16}, 33, 3),
        ({"batch": 16, "epochs": 2}, 33, 6),
        ({"batch": 16, "epochs": 0.5}, 64, 2),
        ({"batch": 16, "epochs": 0.01}, 64, 1),
        ({"batch": 99}, 5, 1),
    ],
)
def test_total_steps(given: dict[str, Any], rows: int, steps: int) -> None:
    assert Settings(**given).total_steps(rows) == steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "batch is 0; expected at least 1"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001; expected at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup": 1.5}, "expected a share of the steps between 0 and 1"),
        ({"schedule": "triangle"}, "schedule is 'triangle'; expected constant, linear or cosine"),
        ({"top_p": 0}, "top_p is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        Settings(**given)


def test_settings_say_how_to_sample() -> None:
    given = Settings(max_tokens=5, temperature=0.7, top_k=4, top_p=0.9, min_p=0.1)
    assert given.sampling == Sampling(5, 0.7, 4, 0.9, 0.1)
    assert set(given.as_dict()) == set(NAMES)


def test_a_method_is_a_choice_of_parts() -> None:
    grpo = methods.grpo()
    other = grpo.replace(advantage=LeaveOneOut(), masks=(Clip(0.1, 0.3),), critic=True)
    assert other.objective.advantage == LeaveOneOut()
    assert other.objective.masks == (Clip(0.1, 0.3),)
    assert other.objective.denominator == grpo.objective.denominator
    assert other.critic
    assert grpo == methods.grpo(), "the original is untouched"
    assert grpo.with_settings(steps=3).settings.steps == 3
    with pytest.raises(TypeError):
        grpo.with_settings(stepz=3)


def test_pipelines_are_flat() -> None:
    one, two, three = methods.sft(), methods.dpo(), methods.grpo()
    assert stages_of((one >> two) >> three) == stages_of(one >> (two >> three)) == (one, two, three)
    assert stages_of(one) == (one,)


def test_what_compresses_is_no_stage_of_training() -> None:
    with pytest.raises(PosttrainError, match=r"^gptq does not train; expected a training method"):
        stages_of(methods.gptq())  # type: ignore[arg-type]
    with pytest.raises(PosttrainError, match=r"^gptq does not train"):
        methods.sft() >> methods.gptq()  # type: ignore[operator]
