"""What `posttrain compare` takes where nothing is said."""

from __future__ import annotations

from posttrain import lab
from posttrain.cli.compare import _set_for_lab, _task


def test_without_a_task_the_demos_sums_or_the_lab_models_own() -> None:
    sums = _task(None, "smollm2-135m")
    assert (sums.name, len(sums.heldout)) == ("chain_sum", 200)
    assert _task(None, "lab:tiers@2").heldout[0].prompt == lab.task("tiers").heldout[0].prompt
    assert _task("{reasoning_gym: chain_sum, train: 4, heldout: 3}", "lab:tiers").name == "chain_sum"


def test_lab_models_learn_with_the_labs_settings_unless_told() -> None:
    given = {"batch": (4, "--batch 4")}
    _set_for_lab(given)
    assert given["batch"] == (4, "--batch 4")
    assert given["learning_rate"][0] == 3e-4
    assert "steps" not in given
