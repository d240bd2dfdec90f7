from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain import methods
from posttrain.methods.parts import beside, fields_beside, objectives_of, parts_of, written
from posttrain.objective.advantage import Demonstration, GroupNormalised
from posttrain.objective.estimator import Objective
from posttrain.objective.mask import Clip, DropTruncated
from posttrain.objective.mixture import Mixture, Term
from posttrain.objective.pairs import Preference, Sigmoid
from posttrain.objective.schedule import Decline


def plain_sampler(rows: object, seed: int) -> Any:
    """Stands for a function that makes a sampler."""


@dataclass(frozen=True)
class Several:
    parts: tuple[object, ...] = ()
    hidden: int = field(default=0, init=False)


class Opaque:
    """Its text is an address."""


@pytest.mark.parametrize(
    ("part", "whole", "brief"),
    [
        (Clip(0.2, 0.28), "Clip(low=0.2, high=0.28)", "Clip(high=0.28)"),
        (Clip(), "Clip(low=0.2, high=0.2)", "Clip"),
        (DropTruncated(), "DropTruncated()", "DropTruncated"),
        ((Clip(), DropTruncated()), "Clip(low=0.2, high=0.2), DropTruncated()", "Clip, DropTruncated"),
        ((), "none", "none"),
        (
            Preference(Sigmoid(0.3), reference=False),
            "Preference(loss=Sigmoid(beta=0.3, label_smoothing=0.0), reference=False)",
            "Preference(Sigmoid(beta=0.3), reference=False)",
        ),
        (Several((1, "a")), "Several(parts=(1, 'a'))", "Several(parts=(1, 'a'))"),
        (Several(), "Several(parts=())", "Several"),
        (Clip, "Clip", "Clip"),
        (plain_sampler, "plain_sampler", "plain_sampler"),
        (partial(Clip, 0.1, high=0.3), "Clip(0.1, high=0.3)", "Clip(0.1, high=0.3)"),
        (partial(Clip, low=0.2), "Clip(low=0.2)", "Clip"),
        (Path("models/teacher"), "models/teacher", "models/teacher"),
        (Opaque(), "Opaque", "Opaque"),
        (0.5, "0.5", "0.5"),
        (None, "None", "None"),
        ("a name", "'a name'", "'a name'"),
    ],
)
def test_parts_as_calls(part: object, whole: str, brief: str) -> None:
    assert written(part) == whole
    assert written(part, brief=True) == brief


def test_a_method_by_its_parts() -> None:
    assert parts_of(methods.dapo(), brief=True) == {
        "advantage": "GroupNormalised",
        "denominator": "OldPolicy",
        "masks": "Clip(high=0.28), DropTruncated",
        "aggregate": "TokenMean",
        "divergences": "none",
        "sampler": "Undecided",
    }
    assert parts_of(methods.grpo())["advantage"] == "GroupNormalised(scale='group', eps=0.0001)"


def test_whatever_differs_beside_the_objective_is_shown() -> None:
    assert beside(methods.sft()) == {}
    assert beside(methods.ppo()) == {"critic": "True"}
    assert beside(methods.sft().replace(sampler=plain_sampler)) == {"sampler": "plain_sampler"}
    # every other field of a method too, whichever there are
    assert {"sampler", "critic"} <= fields_beside().keys()
    for name in fields_beside():
        assert beside(methods.sft().replace(**{name: Opaque()})) == {name: "Opaque"}


RL, IMITATION = methods.grpo().objective, Objective(Demonstration())


def test_a_mixture_by_its_terms() -> None:
    assert isinstance(RL, Objective)
    mixed = Mixture((Term(RL, ("policy",)), Term(IMITATION, ("expert",), Decline(0.9, 0.1))))
    method = methods.grpo().replace(objective=mixed, critic=True)
    found = parts_of(method, brief=True)
    assert list(found) == ["terms", "critic"]
    first, second = found["terms"]
    assert (first["sources"], first["weight"], first["advantage"]) == ("policy", "1.0", "GroupNormalised")
    assert (second["sources"], second["weight"], second["advantage"]) == (
        "expert",
        "Decline(0.9, 0.1)",
        "Demonstration",
    )
    assert objectives_of(method) == [RL, IMITATION]


def test_a_pipeline_by_its_stages() -> None:
    pipeline = methods.sft() >> methods.grpo().replace(advantage=GroupNormalised("none"))
    first, second = parts_of(pipeline, brief=True)["stages"]
    assert (first["method"], first["advantage"]) == ("sft", "Demonstration")
    assert (second["method"], second["advantage"]) == ("grpo", "GroupNormalised(scale='none')")
    assert objectives_of(pipeline) == [stage.objective for stage in pipeline.stages]
