"""Sensitivity to decoding: a model is nothing beside itself, greedy is the flip rate, and the figures by hand."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain import tasks
from posttrain.evaluation.choices import multiple_choice
from posttrain.evaluation.decoding import DecodingSensitivity, decoding_sensitivity
from posttrain.evaluation.decoding_grid import AXES, DecodingGrid
from posttrain.evaluation.decoding_shift import Shift, distances, shifts
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.evaluation import Estimate
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.sampling import draw, probabilities
from posttrain.trajectory import PosttrainError, Prompt, Sampling
from tiny_models import make_policy, ragged_groups

SAMPLING = Sampling(max_tokens=4, temperature=1.0)
COLD = (0.0, 0.01, 0.3, 1.0, 2.0)


def letters(completion: str, prompt: Prompt) -> float:
    return float("b" in completion)


def task(count: int = 12) -> Task:
    rows = [{"prompt": f"{n}?", "answer": "b"} for n in range(count)]
    return tasks.from_rows(rows, heldout=count, reward=letters, name="letters", sampling=SAMPLING)


def policy(seed: int = 0) -> CausalPolicy:
    return CausalPolicy(make_model(seed), make_tokenizer(), f"tiny-{seed}")


def nearby(seed: int = 0, size: float = 0.02) -> CausalPolicy:
    """The same model with a little noise on its weights, as if it were quantized."""
    made = policy(seed)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    made.name = "nearby"
    return made


# -- distances


def test_a_model_is_at_no_distance_from_itself() -> None:
    """The card's exact check: D = 0 at all temperatures."""
    groups = ragged_groups()
    made = make_policy("llama", None)
    for found in shifts(made, make_policy("llama", None), groups, [Sampling(temperature=t) for t in COLD]):
        assert found == Shift(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_the_means_over_a_text_by_the_definition(name: str) -> None:
    one, other, groups = make_policy(name, None), make_policy(name, None, seed=1), ragged_groups()
    (found,) = shifts(one, other, groups, [Sampling(temperature=0.7)])
    kl, variation, entropy, flips = [], [], [], []
    for row in (t for g in groups for t in g.trajectories):
        places = row.action_mask.nonzero()[:, 0] - 1
        with torch.no_grad():
            z, r = (m.model(row.tokens[None]).logits[0, places].double() for m in (one, other))
        q, p = (x / 0.7 for x in (z, r))
        q, p = q.softmax(-1), p.softmax(-1)
        kl.append((p * (p / q).log()).sum(-1))
        variation.append((p - q).abs().sum(-1) / 2)
        entropy.append(-(q * q.log()).sum(-1) + (p * p.log()).sum(-1))
        flips.append((z.argmax(-1) != r.argmax(-1)).double())
    for mine, theirs in zip((found.kl, found.variation, found.entropy, found.flips), (kl, variation, entropy, flips),
                            strict=True):  # fmt: skip
        assert mine == pytest.approx(float(torch.cat(theirs).mean()), rel=1e-4, abs=1e-7)
    assert found.flips > 0


def test_greedy_is_the_flip_rate() -> None:
    """The card's exact check: without temperature two models differ where their likeliest tokens do."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(500, 9, generator=draw)
    r = z + 0.3 * torch.randn(500, 9, generator=draw)
    kl, variation, entropy, flips = distances(z, r, Sampling(temperature=0))
    assert 0 < flips.float().mean() < 0.5
    assert torch.equal(variation, flips.float())
    assert torch.equal(kl, torch.where(flips, torch.inf, 0.0))
    assert torch.equal(entropy, torch.zeros(500))
    nearly = distances(z.double(), r.double(), Sampling(temperature=1e-4))[1]
    assert torch.allclose(nearly, flips.double(), atol=1e-3)


def test_divergence_and_variation_fall_with_heat() -> None:
    draw = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(300, 40, generator=draw)
    r = z + 0.02 * torch.randn(300, 40, generator=draw)
    kl = [float(distances(z, r, Sampling(temperature=t))[0].mean()) for t in (0.5, 0.7, 1.0, 2.0)]
    assert kl == sorted(kl, reverse=True)


def test_a_low_temperature_does_not_underflow() -> None:
    z, r = torch.tensor([[0.0, 40.0]]), torch.tensor([[1.0, 40.0]])
    (kl, *_) = distances(z, r, Sampling(temperature=0.1))
    assert math.isfinite(float(kl))
    assert float(kl) == pytest.approx(0.0, abs=1e-6)


def test_truncated_distributions() -> None:
    """By hand: top-k 1 is greedy; tokens that only the reference draws make KL infinite and count in full."""
    z, r = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    kl, variation, _, _ = distances(z, r, Sampling(top_k=1))
    assert (float(kl), float(variation)) == (math.inf, 1.0)
    p = torch.tensor([math.e**2, math.e]) / (math.e**2 + math.e)
    (_, variation, entropy, flips) = distances(z, r, Sampling(top_k=2))
    assert float(variation) == pytest.approx(float(p[0]))  # what neither can draw alike: all but the middle's share
    assert float(entropy) == pytest.approx(0.0, abs=1e-6)
    assert bool(flips)


@pytest.mark.parametrize("sampling", [Sampling(top_k=3), Sampling(top_p=0.7), Sampling(min_p=0.2, temperature=0.6)])
def test_probabilities_are_what_is_drawn_from(sampling: Sampling) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).expand(20_000, -1)
    uniform = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    drawn = draw(logits.clone(), uniform, sampling)
    share = torch.bincount(drawn.token, minlength=12) / 20_000
    assert torch.allclose(share, probabilities(logits[:1], sampling)[0], atol=2e-4)
    held = probabilities(logits, sampling).gather(1, drawn.token[:, None])[:, 0]
    assert torch.allclose(held.log(), drawn.logp, atol=1e-5)


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(PosttrainError, match="vocabularies of 64 and 32 tokens"):
        shifts(make_policy("llama", None), make_policy("llama", None, vocab_size=32), ragged_groups(), [SAMPLING])


# -- the grid


def test_a_grid_moves_one_axis_at_a_time() -> None:
    grid = DecodingGrid.of(["temperature=0.5,1", "top-k=1,20"], Sampling(max_tokens=7, top_p=0.9))
    assert [str(s) for s in grid.settings] == ["temperature 0.5", "temperature 1", "top_k 1", "top_k 20"]
    samplings = [s.sampling for s in grid.settings]
    assert [(s.temperature, s.top_k, s.top_p, s.max_tokens) for s in samplings] == [
        (0.5, 0, 0.9, 7), (1.0, 0, 0.9, 7), (1.0, 1, 0.9, 7), (1.0, 20, 0.9, 7),
    ]  # fmt: skip
    assert isinstance(samplings[2].top_k, int)
    assert grid.places("top_k") == [2, 3]
    for axis in AXES:
        assert DecodingGrid(((axis, (1.0, 0.5) if axis not in ("top_k", "max_tokens") else (1, 2)),)).settings


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["temperature"], "expected AXIS=VALUE,VALUE"),
        (["temperature=hot,cold"], "expected AXIS=VALUE,VALUE"),
        (["temprature=1,2"], "did you mean temperature"),
        (["temperature=1"], "temperature has the values 1; expected at least two, all different"),
        (["temperature=1,1"], "expected at least two, all different"),
        (["top_k=1.5,2"], "top_k has the values 1.5, 2; expected whole numbers"),
        (["top_p=0.5,2"], "top_p is 2"),
        (["top_p=0.5,1", "top_p=0.5,0.7"], "expected each axis once"),
        ([], "along nothing; expected each axis once"),
    ],
)
def test_what_is_no_grid(axes: list[str], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        DecodingGrid.of(axes, Sampling())


# -- the whole


@pytest.fixture(scope="module")
def found() -> DecodingSensitivity:
    grid = DecodingGrid.of(["temperature=0,0.5,0.8,1", "top_k=1,3"], SAMPLING)
    return decoding_sensitivity({"float": policy(), "nearby": nearby(size=0.2)}, task(), grid, samples=3, limit=10)


def test_each_setting_is_an_evaluation_with_the_same_random_numbers(found: DecodingSensitivity) -> None:
    for name, made in (("float", policy()), ("nearby", nearby(size=0.2))):
        for place, setting in enumerate(found.grid.settings):
            samples = 1 if setting.sampling.temperature == 0 else 3
            alone = evaluate(
                engine_for(made), made.tokenizer, task(), samples=samples, sampling=setting.sampling, limit=10
            )
            assert np.array_equal(found.right[name][place], alone.correct.mean(1))
            assert found.accuracy[name][place] == alone.accuracy
    assert np.array_equal(found.right["float"][0], found.right["float"][4]), "top-k 1 is greedy"
    assert set(found.shifts) == {"nearby"}
    assert found.shifts["nearby"][0].variation == pytest.approx(found.shifts["nearby"][0].flips)
    assert found.shifts["nearby"][4].variation == pytest.approx(found.shifts["nearby"][0].flips)
    assert found.rate["nearby"] > 0


def test_a_model_beside_itself_has_no_excess() -> None:
    grid = DecodingGrid((("temperature", (0.5, 1.5)),), SAMPLING)
    same = decoding_sensitivity({"a": policy(), "b": policy()}, task(), grid, samples=2)
    assert same.excess("b", "temperature") == Estimate(0.0, 0.0, 0.0)
    assert same.apart("b") == []
    assert all(shift == Shift(0.0, 0.0, 0.0, 0.0) for shift in same.shifts["b"])
    assert same.slope("b") is None, "there is one temperature between 0.5 and 0.8"


def by_hand(right: dict[str, list[list[float]]]) -> DecodingSensitivity:
    grid = DecodingGrid((("temperature", (0.5, 0.6, 0.8, 1.0)), ("top_k", (1, 2))))
    arrays = {name: np.array(rows) for name, rows in right.items()}
    accuracy = {name: [Estimate(float(row.mean()), 0.0, 1.0) for row in rows] for name, rows in arrays.items()}
    rest = {name: [Shift(0.1, 0.2, 0.3, 0.4)] * 6 for name in list(right)[1:]}
    return DecodingSensitivity("t", grid, tuple(right), arrays, accuracy, rest, dict.fromkeys(right, 5.0), 1)


def test_sensitivity_slope_and_apart_by_hand() -> None:
    steady = [[0.5] * 40] * 6
    falling = [[q] * 40 for q in (0.9, 0.8, 0.6, 0.1, 0.5, 0.7)]
    made = by_hand({"float": steady, "small": falling})
    assert made.sensitivity("float", "temperature") == Estimate(0.0, 0.0, 0.0)
    assert made.sensitivity("small", "temperature").value == pytest.approx(np.std([0.9, 0.8, 0.6, 0.1]))
    assert made.excess("small", "top_k").value == pytest.approx(0.1)
    slope = made.slope("small")
    assert slope is not None
    assert slope.value == pytest.approx(np.polyfit([0.5, 0.6, 0.8], [0.9, 0.8, 0.6], 1)[0]) == pytest.approx(-1.0)
    assert [str(s) for s in made.apart("small")] == [
        "temperature 0.5", "temperature 0.6", "temperature 0.8", "temperature 1", "top_k 2",
    ]  # fmt: skip


def test_apart_is_more_than_two_standard_errors_of_the_difference() -> None:
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(6, 50))
    noise -= noise.mean(1, keepdims=True)
    error = noise.std(1, ddof=1) / np.sqrt(50)
    for gap, expected in ((1.99, 0), (2.01, 6)):
        made = by_hand({"float": np.zeros((6, 50)).tolist(), "small": (noise + gap * error[:, None]).tolist()})
        assert len(made.apart("small")) == expected


def test_intervals_are_of_problems_and_paired() -> None:
    """Problems of very different difficulty, all of which the second model solves as much less: no noise is left."""
    draw = np.random.default_rng(0)
    hard = draw.random((1, 60)) * np.array([[1.0], [0.9], [0.7], [0.5], [1.0], [0.5]])
    made = by_hand({"float": hard.tolist(), "small": (hard - 0.1).tolist()})
    excess = made.excess("small", "temperature")
    assert (excess.low, excess.value, excess.high) == pytest.approx((0, 0, 0), abs=1e-12)
    alone = made.sensitivity("float", "temperature")
    assert alone.low < alone.value < alone.high


def test_as_text_and_as_json(found: DecodingSensitivity) -> None:
    text = str(found)
    assert text.count("temperature 0.5") == 2
    assert "total variation" in text
    told = json.loads(found.to_json())
    assert told["settings"][1] == {"axis": "temperature", "value": 0.5}
    assert np.allclose(told["right"]["nearby"], found.right["nearby"])
    assert told["shifts"]["nearby"][0]["kl"] is None, "at temperature 0 KL is infinite"
    lonely = decoding_sensitivity(
        {"one": policy()}, task(), DecodingGrid((("temperature", (0.5, 1.0)),), SAMPLING), samples=1, limit=2
    )
    assert "total variation" not in str(lonely)
    assert not lonely.shifts


def test_progress_is_told_by_name() -> None:
    names: list[str] = []

    def counted(name: str) -> AbstractContextManager[None]:
        names.append(name)
        return nullcontext()

    grid = DecodingGrid((("temperature", (0.5, 1.0)),), SAMPLING)
    decoding_sensitivity({"a": policy(), "b": policy(1)}, task(), grid, samples=1, limit=2, counted=counted)
    assert names == ["a, temperature 0.5", "a, temperature 1", "b, temperature 0.5", "b, temperature 1", "b beside a"]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(PosttrainError, match="no model given"):
        decoding_sensitivity({}, task())
    rows = [{"prompt": "?", "options": ["a", "b"], "label": 0}]
    with pytest.raises(PosttrainError, match="multiple choice, where nothing is decoded"):
        decoding_sensitivity({"a": policy()}, multiple_choice(rows))
    other = CausalPolicy(make_model(0, vocab_size=300), make_tokenizer(), "wide")
    with pytest.raises(PosttrainError, match="vocabularies"):
        decoding_sensitivity({"a": policy(), "b": other}, task())
