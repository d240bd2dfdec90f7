from __future__ import annotations

import numpy as np
import pytest

from posttrain import methods
from posttrain.methods import Compression, Method, Pipeline, registry
from posttrain.trajectory import PosttrainError


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_a_method_carries_its_name_and_arguments() -> None:
    @methods.method(family="policy-gradient", card=("030", "046"))
    def my_own(clip: float = 0.3, beta: float = 0.0) -> Method:
        """Something new."""
        return methods.grpo(clip, beta)

    made = my_own(beta=0.5)
    assert (made.name, made.arguments) == ("my-own", {"clip": 0.3, "beta": 0.5})
    assert made.objective == methods.grpo(0.3, 0.5).objective
    entry = methods.find("My_Own")
    assert entry.function is my_own
    assert (entry.cards, entry.parameters) == (("030", "046"), {"clip": 0.3, "beta": 0.0})
    assert (entry.kind, entry.summary, entry.branch, entry.verdict) == ("online", "Something new.", "3.2a", "none")
    assert [stage.name for stage in entry.stages] == ["my-own"]


def test_a_published_recipe_of_several_stages() -> None:
    @methods.method(family="hybrid", name="cold-start", card="046")
    def cold_start(clip: float = 0.1) -> Pipeline:
        """Imitation first."""
        return methods.sft() >> methods.grpo(clip)

    entry = methods.find("cold-start")
    assert (entry.kind, entry.branch) == ("pipeline", "1.3")
    assert [stage.name for stage in entry.stages] == ["sft", "grpo"]
    assert [stage["method"] for stage in entry.parts["stages"]] == ["sft", "grpo"]
    assert cold_start(0.4).stages[1].arguments == {"clip": 0.4, "beta": 0.0}


def test_a_compression() -> None:
    @methods.method(family="quantization", name="my-own.2", card="000")
    def my_own(bits: int = 3, ranges: tuple[int, ...] = (1, 2)) -> Compression:
        """Something smaller."""
        return methods.gptq(bits)

    made = my_own(ranges=[3, 4])  # type: ignore[arg-type]
    assert (made.name, made.arguments) == ("my-own.2", {"bits": 3, "ranges": (3, 4)})
    assert made.solver == methods.gptq(3).solver
    entry = methods.find("My_Own.2")
    assert (entry.kind, entry.stages, entry.branch) == ("compression", (), "4.1q")
    expected = ["transforms", "allocation", "solver", "activations", "attention", "calibration", "skip"]
    assert list(entry.parts) == expected
    assert entry.parts["solver"].startswith("GPTQ(sequential=True, grid=Uniform(bits=3, group=128, ")
    assert entry.parts["transforms"] == entry.parts["allocation"] == entry.parts["activations"] == "none"
    assert entry.parts["calibration"] == "Calibrated(samples=64, length=512)"


def test_arguments_of_a_compression_are_of_its_types() -> None:
    class Part:
        pass

    def my_own(bits: int = 3, share: float | None = None, part: object = None) -> Compression:
        """Something smaller."""
        return methods.gptq(int(bits))

    my_own.__annotations__["part"] = Part | None
    made = methods.method(family="quantization", name="my-own.3", card="000")(my_own)
    part = Part()
    assert made(np.int64(4), np.float32(0.5), part).arguments == {"bits": 4, "share": 0.5, "part": part}
    for given, message in (
        ({"bits": 2.5}, "bits is 2.5; input should be a valid integer"),
        ({"bits": None}, "bits is None; input should be a valid integer"),
        ({"bits": True}, "bits is True; input should be a valid integer"),
        ({"share": "half"}, "share is 'half'; input should be a valid number"),
    ):
        with pytest.raises(PosttrainError, match=f"^my-own.3: {message}"):
            made(**given)
    my_own.__annotations__["part"] = "Unknown"
    assert made(bits=2.5).arguments["bits"] == 2.5, "types that are not there are not checked"
    with pytest.raises(PosttrainError, match=r"^gptq: group is None; input should be a valid integer$"):
        methods.gptq(group=None)  # type: ignore[arg-type]
    with pytest.raises(PosttrainError, match=r"^wanda: sparsity is 'half'; input should be a valid number"):
        methods.wanda(sparsity="half")  # type: ignore[arg-type]


def test_no_method_takes_a_negative_damping() -> None:
    damped = [entry for entry in methods.registered().values() if "damping" in entry.parameters]
    assert {"gptq", "sparsegpt", "spqr", "billm"} < {entry.name for entry in damped}
    for entry in damped:
        entry.function(damping=0)
        for damping in (-1, -0.01, float("nan"), float("inf")):
            with pytest.raises(PosttrainError, match=f"^damping is {damping}; expected a number from 0 on$"):
                entry.function(damping=damping)


def test_a_branch_of_its_own() -> None:
    @methods.method(family="preference", branch="2.3u")
    def fine() -> Method:
        """Stands where it says."""
        return methods.dpo()

    @methods.method(family="preference", branch="2.9")
    def lost() -> Method:
        """Stands nowhere."""
        return methods.dpo()

    @methods.method(family="of my own")
    def mine() -> Method:
        """Of a family that no branch knows."""
        return methods.dpo()

    assert methods.find("fine").branch == "2.3u"
    assert methods.find("mine").branch is None
    with pytest.raises(PosttrainError, match=r"method lost has branch '2.9'; expected one of 1, 1.1, "):
        _ = methods.find("lost").branch


def test_a_method_needs_a_docstring() -> None:
    def silent() -> Method:
        return methods.sft()

    with pytest.raises(PosttrainError, match="method silent has no docstring"):
        methods.method(family="sft-objective")(silent)


def test_an_unknown_name_is_answered_with_the_nearest_or_all() -> None:
    with pytest.raises(PosttrainError, match=r"^unknown method 'gprpo'; did you mean grpo\?$"):
        methods.find("gprpo")
    with pytest.raises(PosttrainError, match=r"^unknown method 'quux'; known: .*\bgrpo, "):
        methods.find("quux")


def test_methods_come_by_family_and_name() -> None:
    found = list(methods.registered().values())
    assert [(e.family, e.name) for e in found] == sorted((e.family, e.name) for e in found)
