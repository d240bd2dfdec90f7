"""Rounding of activations: by hand, against equations written here, and in limits."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.activations.crossquant import CrossQuant, CrossQuantStep, KernelOnly, kernel_proportion
from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.activations.static import Static
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep, chain, from_written, written
from posttrain.trajectory import PosttrainError

X = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, 16)


def moments(x: torch.Tensor = X) -> InputMoments:
    found = InputMoments(x.shape[-1], gram=False, keep=64)
    found.add(x)
    return found


def test_symmetric_by_the_token_by_hand() -> None:
    # 3 bits: s = 6 / 3 = 2, codes -4..3
    x = torch.tensor([[6.0, -3.1, 0.9], [0.0, 0.0, 0.0]])
    assert Dynamic(3).fit(None, 3, "")(x).tolist() == [[6.0, -4.0, 0.0], [0.0, 0.0, 0.0]]


def test_asymmetric_by_the_token_by_hand() -> None:
    # 2 bits over [0, 3] (0 is held): s = 1, z = 0; over [-1, 2]: s = 1, z = 1
    x = torch.tensor([[1.2, 3.0, 2.4], [-1.0, 2.0, 0.4]])
    assert Dynamic(2, symmetric=False).fit(None, 3, "")(x).tolist() == [[1.0, 3.0, 2.0], [-1.0, 2.0, 0.0]]


def test_a_clipped_range_cuts_off_and_goes_down_one_code_further() -> None:
    # s = 0.75 * 4 / 3 = 1: 4 is cut to 3, -4 is a code
    assert Dynamic(3, clip=0.75).fit(None, 2, "")(torch.tensor([[4.0, -4.0]])).tolist() == [[3.0, -4.0]]


def test_one_range_for_all_tokens_or_for_groups_of_channels() -> None:
    x = torch.tensor([[7.0, 0.4], [0.4, 0.4]])
    assert Dynamic(4, per="tensor").fit(None, 2, "")(x).tolist() == [[7.0, 0.0], [0.0, 0.0]]
    grouped = Dynamic(4, group=1).fit(None, 2, "")(x)
    assert torch.allclose(grouped, x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["token", "tensor"])
def test_many_bits_change_nothing(symmetric: bool, per: str) -> None:
    found = Dynamic(16, symmetric, per).fit(None, 16, "")(X)  # type: ignore[arg-type]
    assert (found - X).abs().max() < 1e-3 * X.abs().max()


def test_a_static_range_equals_the_dynamic_one_of_the_same_tokens() -> None:
    for symmetric in (True, False):
        static = Static(6, symmetric).fit(moments(), 16, "")
        assert torch.allclose(static(X), Dynamic(6, symmetric, "tensor").fit(None, 16, "")(X), atol=1e-5)


def test_a_static_range_cuts_off_what_it_has_not_seen() -> None:
    step = Static(3).fit(moments(torch.tensor([[3.0, -1.0]])), 2, "")
    assert step(torch.tensor([[9.0, -9.0]])).tolist() == [[3.0, -4.0]]


def test_a_quantile_leaves_outlying_tokens_out() -> None:
    x = torch.ones(64, 4)
    x[0, 0] = 100.0
    assert float(Static(8, quantile=0.9).fit(moments(x), 4, "").scale) == pytest.approx(1 / 127)
    assert float(Static(8).fit(moments(x), 4, "").scale) == pytest.approx(100 / 127)


@pytest.mark.limit("crossquant")
def test_crossquant_with_alpha_1_is_the_step_per_token_bit_for_bit() -> None:
    for bits in (4, 8):
        cross = CrossQuant(bits, alpha=1.0).fit(moments(), 16, "")
        assert torch.equal(cross(X), Dynamic(bits).fit(None, 16, "")(X))


def test_crossquant_with_alpha_0_is_a_step_per_channel() -> None:
    cross = CrossQuant(4, alpha=0.0).fit(moments(), 16, "")
    step = X.abs().amax(0) / 7
    assert torch.equal(cross(X), torch.round(X / step) * step)


def test_crossquant_by_the_equation_and_no_entry_is_cut_off() -> None:
    alpha, top = 0.15, 7
    token, channel = X.abs().amax(1, keepdim=True), X.abs().amax(0)
    step = token**alpha * channel ** (1 - alpha) / top
    codes = torch.round(X / step)
    assert codes.abs().max() <= top
    assert torch.allclose(CrossQuant(4, alpha).fit(moments(), 16, "")(X), codes * step, atol=1e-6)


def test_crossquant_of_a_product_by_hand() -> None:
    # X = u v^T: t = u max v = 2 u, c = v max u = 3 v; X / step = 7 u v / (2 u)^a (3 v)^(1 - a)
    u, v, alpha = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]), 0.5
    found = CrossQuant(4, alpha).fit(moments(torch.outer(u, v)), 2, "")(torch.outer(u, v))
    codes = [[round(7 * a * b / ((2 * a) ** 0.5 * (3 * b) ** 0.5)) for b in (2.0, 1.0)] for a in (1.0, 3.0)]
    assert codes == [[4, 3], [7, 5]]
    step = torch.outer((2 * u) ** 0.5, (3 * v) ** 0.5) / 7
    assert torch.allclose(found, torch.tensor(codes) * step)


def test_the_channels_of_crossquant_are_the_calibrations_alone() -> None:
    step = CrossQuant(4, 0.15).fit(moments(), 16, "")
    assert torch.equal(step(X[:1]), step(X)[:1])  # a token alone is rounded as among others
    assert step(10 * X.abs().amax(0, keepdim=True)).isfinite().all()


def test_channels_that_were_always_0() -> None:
    x = X.clone()
    x[:, 3] = 0
    step = CrossQuant(8, 0.15).fit(moments(x), 16, "")
    assert torch.isfinite(step(X)).all()
    assert (step(x)[:, 3] == 0).all()


def test_crossquant_has_the_smaller_kernel_where_a_channel_stands_out() -> None:
    x = X.clone()
    x[:, 5] *= 60
    token, cross = Dynamic(8).fit(None, 16, ""), CrossQuant(8, 0.15).fit(moments(x), 16, "")
    assert kernel_proportion(cross, x) < 0.3 * kernel_proportion(token, x)


def test_the_kernel_alone_is_zeroed() -> None:
    probe, token = KernelOnly(4).fit(None, 16, "")(X), Dynamic(4).fit(None, 16, "")(X)
    assert torch.equal(probe == 0, token == 0)
    assert torch.equal(probe[token != 0], X[token != 0])


@pytest.mark.parametrize(
    "made",
    [Dynamic(4, False, "token", 0.9, 8), Dynamic(5, per="tensor"), Static(6, False), CrossQuant(4, 0.3), KernelOnly(5)],
)
def test_steps_are_written_and_read(made: Dynamic | Static | CrossQuant | KernelOnly) -> None:
    step = made.fit(moments(), 16, "")
    read = from_written(written(chain([step])))
    assert read is not None
    read.load_state_dict(chain([step]).state_dict())  # type: ignore[union-attr]
    assert torch.equal(read(X), step(X))
    assert step(X.bfloat16()).dtype == torch.bfloat16
    assert step(X[:0]).shape == (0, 16)


def test_steps_keep_their_precision_when_the_models_is_changed() -> None:
    step = CrossQuant(4, 0.3).fit(moments(), 16, "")
    before = step.channel.clone()
    assert torch.equal(torch.nn.Sequential(step).bfloat16()[0].channel, before)


def test_folded_crossquant_works_on_divided_inputs() -> None:
    plain = CrossQuant(4, 0.15).fit(moments(), 16, "")
    folded: InputStep = CrossQuantStep(16, 4, 0.15, folded=True)
    folded.load_state_dict(plain.state_dict())
    assert torch.allclose(folded(X / plain.channel) * plain.channel, plain(X), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: Dynamic(1), "2 to 16"),
        (lambda: Dynamic(8, per="row"), "token or tensor"),  # type: ignore[arg-type]
        (lambda: Dynamic(8, clip=0.0), "share of the range"),
        (lambda: Dynamic(8, per="tensor", group=4), "single tokens"),
        (lambda: Dynamic(8, group=5).fit(None, 16, "x.q"), "do not divide the 16 inputs of x.q"),
        (lambda: Static(8, quantile=1.5), "share of tokens"),
        (lambda: Static(8).fit(InputMoments(4), 4, "x.q"), "x.q met no calibration token"),
        (lambda: CrossQuant(8, alpha=1.5), "alpha is 1.5"),
        (lambda: CrossQuant(8).fit(None, 4, "x.q"), "x.q met no calibration token"),
    ],
)
def test_errors(wrong: object, told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        wrong()  # type: ignore[operator]
