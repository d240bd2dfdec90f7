"""ABQ-LLM: balanced levels, its losses by hand, its maps of attention, its correction."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.calls import run
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.levels import LevelsWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.solvers.abq import ArbitraryBit, CorrectedRange, attention_loss, direction_loss
from posttrain.compress.solvers.attention_maps import probabilities, watched_attention
from posttrain.compress.solvers.omniquant import ClippedRange, LearnedClipping
from posttrain.compress.solvers.reconstruct import Known
from tiny_blocks import GROUP, compressed, packed, text, tiny, walk, weights


def test_two_bits_have_five_levels_around_zero() -> None:
    weight = torch.tensor([[-2.0, -1.0, 0.1, 1.0, 2.0]])
    found = ClippedRange(weight, 2, 1, levels=5, start=30.0).pack()
    assert isinstance(found, LevelsWeight)
    assert found.unpacked().tolist() == [[0, 1, 2, 3, 4]]
    assert found.dequantize().tolist() == [[-2.0, -1.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize(("bits", "balance", "wanted"), [(2, True, 5), (1, True, 3), (2, False, None), (3, True, None)])
def test_which_bits_are_balanced(bits: int, balance: bool, wanted: int | None) -> None:
    model = compressed(tiny(), ArbitraryBit(Uniform(bits, GROUP), 1, balance=balance))
    for layer in packed(model).values():
        if wanted:
            assert isinstance(layer.weight, LevelsWeight)
            assert layer.weight.levels == wanted
        else:
            assert isinstance(layer.weight, UniformWeight)
            assert layer.weight.bits == bits


def test_the_direction_loss_by_hand() -> None:
    found = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    wanted = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    assert direction_loss(found, wanted).item() == pytest.approx(-torch.tensor((1 + 0.5**0.5) / 2).log().item())
    assert direction_loss(found, 5 * found).item() == pytest.approx(
        0.0, abs=1e-6
    )  # blind to sizes: hence the squared term
    assert direction_loss(found, found * torch.tensor([[[1.0], [-1.0]]])).isfinite()  # a mean cosine of 0


def test_the_attention_loss_is_the_divergence_both_ways() -> None:
    torch.manual_seed(0)
    p, q = torch.rand(2, 3, 4).softmax(-1), torch.rand(2, 3, 4).softmax(-1)
    both = (p * (p / q).log()).sum(-1).mean() + (q * (q / p).log()).sum(-1).mean()
    assert attention_loss(p, q).item() == pytest.approx(float(both), rel=1e-5)
    assert attention_loss(p, p).item() == 0
    a, b = p.softmax(-1), q.softmax(-1)
    literal = (a * (a / b).log()).mean() + (b * (b / a).log()).mean()
    assert attention_loss(p, q, literal=True).item() == pytest.approx(float(literal), rel=1e-4)
    causal = torch.eye(3)[None]
    assert attention_loss(causal, causal.roll(1, -1)).isfinite()


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "opt", "gpt-neox", "gemma2"])
def test_a_watched_block_gives_the_same_and_its_maps(name: str) -> None:
    block = next(iter(walk(tiny(name), text(1))))
    plain = run(block.module, block.inputs[0])
    implementations = [m.config._attn_implementation for m in block.module.modules() if hasattr(m, "config")]
    with torch.no_grad(), watched_attention([block.module]) as maps:
        seen = run(block.module, block.inputs[0])
    torch.testing.assert_close(seen, plain, atol=1e-5, rtol=1e-4)
    assert len(maps) == 1
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(4, 12))
    assert float(maps[0].triu(1).abs().max()) == 0  # nobody looks ahead
    assert implementations == [m.config._attn_implementation for m in block.module.modules() if hasattr(m, "config")]


def test_probabilities_by_hand() -> None:
    query = torch.tensor([[[[1.0], [2.0]]]])
    key = torch.tensor([[[[1.0], [0.0]]]])
    found = probabilities(torch.nn.Module(), query, key, None, scaling=1.0)
    second = torch.tensor([2.0, 0.0]).softmax(0)
    torch.testing.assert_close(found[0, 0], torch.stack([torch.tensor([1.0, 0.0]), second]))
    mask = torch.tensor([[[[True, True], [False, True]]]])
    found = probabilities(torch.nn.Module(), query, key, mask, scaling=1.0)
    torch.testing.assert_close(found[0, 0, 1], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("masked", ["no", "bool", "added"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_of_watched_attention_are_those_of_its_definition(masked: str, softcap: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    query, key, value = (torch.randn(shape, generator=draw).requires_grad_() for shape in shapes)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    seen[1, ..., 0] = False
    seen[1, :, 0, 0] = True
    if masked == "no":
        seen[1] = seen[0]
    lowest = torch.finfo(torch.float32).min
    mask = {"no": None, "bool": seen, "added": torch.zeros(seen.shape).masked_fill(~seen, lowest)}[masked]

    keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = query @ keys.transpose(-1, -2) * 0.3
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = (weights @ values).transpose(1, 2), weights.mean(1)

    attend = torch.nn.Module()
    attend.config = type("Config", (), {"_attn_implementation": "eager"})()
    with watched_attention([attend]) as maps:
        from transformers import AttentionInterface

        chosen = AttentionInterface()[attend.config._attn_implementation]
        found = chosen(attend, query, key, value, mask, scaling=0.3, softcap=softcap)[0], *maps
    factors = [torch.randn(out.shape, generator=draw) for out in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    for parts in ((True, True), (True, False), (False, True)):  # what flows back through one of them alone, too
        grads = [
            torch.autograd.grad(
                sum((o * f).sum() for o, f, p in zip(outs, factors, parts, strict=True) if p),
                (query, key, *([value] if parts[0] else [])), retain_graph=True,
            )
            for outs in (found, wanted)
        ]  # fmt: skip
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


def test_the_correction_is_rounded_with_the_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 32)
    plain = ClippedRange(weight, 3, 2)
    made = CorrectedRange(weight, 3, 2, correction_rate=0.01)
    assert torch.equal(made.pack().dequantize(), plain.pack().dequantize())  # a = 0 at first
    torch.nn.init.normal_(made.column)
    assert made.column.shape == (4, 1)
    assert torch.equal(made.row, torch.ones(1, 32))
    assert torch.equal(made.pack().dequantize(), made().detach())
    assert made.pack().stored_bytes == plain.pack().stored_bytes  # and free


def test_the_last_layer_of_outer_blocks_is_corrected() -> None:
    solver = ArbitraryBit(Uniform(3, GROUP))
    corrected = []
    for block in walk(tiny(num_hidden_layers=9), text(1)):
        opened = solver.open(block, Known(9))
        corrected += [(block.index, n) for n, layer in opened.layers.items() if isinstance(layer.soft, CorrectedRange)]
        opened.close()
    assert corrected == [(i, "mlp.down_proj") for i in (0, 1, 2, 5, 6, 7, 8)]


def test_with_the_squared_error_alone_it_is_omniquant() -> None:
    """Without balance, correction, direction and attention what is left is the augmented loss of OmniQuant."""

    class Squared(ArbitraryBit):
        def loss(self, seen, wanted):  # type: ignore[no-untyped-def]
            return super().loss(seen, wanted) - sum(direction_loss(seen.hidden, w.hidden) for w in wanted.values())

    grid = Uniform(3, GROUP)
    found = weights(compressed(tiny(), Squared(grid, 2, balance=False, correction=0.0, attention=0.0)))
    wanted = weights(compressed(tiny(), LearnedClipping(grid, 2, targets=("float", "prefix"))))
    for name, weight in wanted.items():
        assert float((found[name] - weight).norm() / weight.norm()) < 0.02


def test_a_block_without_maps_is_told() -> None:
    from posttrain.compress.solvers.reconstruct import Seen
    from posttrain.trajectory import PosttrainError

    seen = Seen(torch.randn(1, 2, 4))
    with pytest.raises(PosttrainError, match="attention=0"):
        ArbitraryBit().loss(seen, {"float": seen, "prefix": seen})
    assert ArbitraryBit(attention=0.0).loss(seen, {"float": seen, "prefix": seen}).item() == pytest.approx(0, abs=1e-5)
