"""The baselines of quantization, as the catalogue makes them."""

from __future__ import annotations

import pytest

from posttrain import methods
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Calibrated
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.trajectory import PosttrainError


@pytest.mark.limit("rtn")
def test_rtn_is_the_nearest_on_its_grid() -> None:
    made = methods.rtn(bits=3, group=64, zero="float", clip="mse")
    assert made.solver == RoundToNearest(Uniform(3, 64, "float", "mse"))
    assert (made.name, made.transforms, made.allocation, made.activations) == ("rtn", (), None, None)
    assert made.arguments == {"bits": 3, "group": 64, "zero": "float", "clip": "mse"}


@pytest.mark.limit("gptq")
def test_gptq_has_the_papers_defaults() -> None:
    made = methods.gptq()
    assert made.solver == GPTQ(Uniform(4, 128, "integer"), damping=0.01, block=128, act_order=False)
    assert made.calibration == Calibrated(64, 512)
    assert methods.gptq(act_order=True).solver == GPTQ(Uniform(4, 128), act_order=True)


@pytest.mark.parametrize("make", [methods.rtn, methods.gptq])
def test_arguments_that_there_are_not(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PosttrainError, match="bits is 9; a uniform grid has 1 to 8"):
        make(bits=9)
    with pytest.raises(PosttrainError, match="zero is 'half'; expected none, integer or float"):
        make(zero="half")
    with pytest.raises(PosttrainError, match="clip is 'mean'; expected none or mse"):
        make(clip="mean")
