"""The shared loop of block reconstruction: windows, targets, rows, what is restored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.calls import Call, run
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.adaround import BlockRounding
from posttrain.compress.solvers.lsq import LearnedSteps
from posttrain.compress.solvers.omniquant import ClippedRange, LearnedClipping
from posttrain.compress.solvers.reconstruct import Known, Opened, Reconstruction, Seen, cut, pieces_of
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.solvers.sapr import PartialRetraining
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError
from tiny_blocks import GROUP, compressed, floats, packed, text, tiny, walk, weights


@dataclass(frozen=True)
class Watched(Reconstruction):
    """Clipping at the full range, which notes what is trained."""

    trained: list[tuple[int, ...]] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> ClippedRange:
        return ClippedRange(weight, grid.bits, weight.shape[1] // grid.width(weight.shape[1], name), start=30.0)

    def train(self, opened: Any, known: Known) -> None:
        self.trained.append(tuple(each.block.index for each in opened))
        self.inputs.append([call.hidden for call in opened[0].block.inputs])
        super().train(opened, known)


@pytest.mark.parametrize(
    ("window", "overlap", "wanted"),
    [
        (1, 0, [(0,), (1,), (2,), (3,), (4,)]),
        (2, 0, [(0, 1), (2, 3), (4,)]),
        (2, 1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (3, 1, [(0, 1, 2), (2, 3, 4)]),
        (3, 2, [(0, 1, 2), (1, 2, 3), (2, 3, 4)]),
        (4, 1, [(0, 1, 2, 3), (3, 4)]),
        (5, 0, [(0, 1, 2, 3, 4)]),
        (7, 5, [(0, 1, 2, 3, 4)]),
    ],
)
def test_windows(window: int, overlap: int, wanted: list[tuple[int, ...]]) -> None:
    model, batches = tiny(num_hidden_layers=5), text(1)
    solver = Watched(Uniform(3, GROUP), 0, window=window, overlap=overlap)
    compressed(model, solver, batches)
    assert solver.trained == wanted
    # every window starts from what the packed blocks before it give
    hidden, expected = model.model.embed_tokens(batches[0]["input_ids"]), {}  # type: ignore[operator, union-attr]
    rope = model.model.rotary_emb(hidden, torch.arange(12)[None])  # type: ignore[operator, union-attr]
    for index, layer in enumerate(model.model.layers):  # type: ignore[arg-type, union-attr]
        expected[index] = hidden
        hidden = run(layer, Call(hidden, (), {"position_embeddings": rope}))
    for (first, *_), seen in zip(wanted, solver.inputs, strict=True):
        torch.testing.assert_close(seen[0], expected[first])


def test_without_training_every_window_gives_rounding_to_nearest() -> None:
    wanted = weights(compressed(tiny(), RoundToNearest(Uniform(3, GROUP))))
    for window, overlap in ((1, 0), (2, 1)):
        found = weights(compressed(tiny(), Watched(Uniform(3, GROUP), 0, window=window, overlap=overlap)))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_blocks_in_two_windows_go_on_from_where_they_are() -> None:
    """Opened once: their soft weights are the same objects in both windows."""
    seen: list[list[int]] = []

    @dataclass(frozen=True)
    class Noting(Watched):
        def train(self, opened: Any, known: Known) -> None:
            seen.append([id(each) for each in opened])

    compressed(tiny(num_hidden_layers=3), Noting(Uniform(3, GROUP), window=2, overlap=1))
    assert seen[0][1] == seen[1][0]


def test_targets_are_the_float_blocks_outputs() -> None:
    batches = text(1)

    @dataclass(frozen=True)
    class Checked(Watched):
        def loss(self, seen: Seen, wanted: dict[Any, Seen]) -> Tensor:
            self.weights.append(wanted["float"].hidden)
            self.inputs.append([wanted["prefix"].hidden])
            return super().loss(seen, wanted)

    solver = Checked(Uniform(2, GROUP), 1, rows=4, targets=("float", "prefix"))
    compressed(tiny(), solver, batches)
    blocks = list(walk(tiny(), batches))
    for i, block in enumerate(blocks):
        torch.testing.assert_close(solver.weights[2 * i], block.targets()[0])  # once for the unit, once in training
    prefix = [seen[0] for seen in solver.inputs if len(seen) == 1]
    torch.testing.assert_close(solver.weights[0], blocks[0].targets()[0])
    assert len(prefix) >= 4


def test_rows_of_a_call_give_the_rows_of_its_output() -> None:
    for name in ("llama", "opt", "gpt-neox", "qwen2-window"):
        block = next(iter(walk(tiny(name), text(1))))
        whole = run(block.module, block.inputs[0])
        parts = pieces_of(block.inputs, 3)
        assert [p.rows for p in parts] == [slice(0, 3), slice(3, 4)]
        found = torch.cat([run(block.module, cut(block.inputs[p.call], p.rows)) for p in parts])
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_a_call_whose_masks_have_no_rows_stays_whole() -> None:
    call = Call(torch.zeros(4, 3, 8), (), {"bias": torch.zeros(16, 3, 3)})  # four heads in each of four rows
    assert pieces_of([call], 1)[0].rows == slice(0, 4)


def test_only_what_is_learned_gets_gradients_and_flags_come_back() -> None:
    model = tiny().requires_grad_(True)
    compressed(model, LearnedClipping(Uniform(3, GROUP), 1))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_block_alone_can_be_solved() -> None:
    block = next(iter(walk(tiny())))
    LearnedClipping(Uniform(3, GROUP), 1).solve_block(block)
    assert len(packed(block.module)) == len(block.linears)


def test_layers_get_the_bits_that_an_allocation_gives() -> None:
    block = next(iter(walk(tiny(), bits={"model.layers.0.self_attn.q_proj": 5})))
    LearnedSteps(Uniform(3, GROUP, "none"), 1).solve_block(block)
    bits = {name: layer.weight.bits for name, layer in packed(block.module).items()}
    assert bits["self_attn.q_proj"] == 5
    assert bits["self_attn.k_proj"] == 3


def test_quantized_inputs_are_trained_with() -> None:
    plain = compressed(tiny(), LearnedClipping(Uniform(3, GROUP), 2))
    rounded = compressed(tiny(), LearnedClipping(Uniform(3, GROUP), 2), activations=Dynamic(4))
    assert all(layer.inputs is not None for layer in packed(rounded).values())
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(rounded).values(), strict=True))


@pytest.mark.parametrize("name", ["opt", "gpt-neox", "qwen3", "mixtral"])
def test_other_architectures(name: str) -> None:
    model = tiny(name)
    count = len(floats(model))
    assert len(packed(compressed(model, LearnedClipping(Uniform(3, GROUP), 1)))) >= count


def test_blocks_that_are_skipped_stay_and_those_beside_them_are_trained() -> None:
    for options in ({}, {"window": 2, "overlap": 1}):
        model = tiny(num_hidden_layers=3)
        method = Compression("method", Watched(Uniform(3, GROUP), 1, **options))
        compress_model(model, method, text(1), skip=["model.layers.1.*"])
        assert {name.split(".")[2] for name in packed(model)} == {"0", "2"}


@pytest.mark.parametrize("solver", [BlockRounding, PartialRetraining])
def test_experts_that_a_step_does_not_reach(solver: type[Reconstruction]) -> None:
    model = tiny("mixtral", num_hidden_layers=1, num_local_experts=8)
    compressed(model, solver(Uniform(3, GROUP), 2, rows=1), text(1, rows=3, length=3))
    assert len(packed(model)) == 4 + 8 * 3


def test_refuses_windows_that_cannot_be() -> None:
    for options in ({"window": 2, "overlap": 2}, {"window": 0}, {"epochs": -1}, {"rows": 0}):
        with pytest.raises(PosttrainError, match="expected"):
            Watched(Uniform(3, GROUP), **options)


def test_a_loss_that_is_not_finite_is_told() -> None:
    @dataclass(frozen=True)
    class Broken(Watched):
        def loss(self, seen: Seen, wanted: dict[Any, Seen]) -> Tensor:
            return seen.hidden.float().sum() * torch.nan

    with pytest.raises(PosttrainError, match=r"layers\.0.*nan"):
        compressed(tiny(), Broken(Uniform(3, GROUP), 1))


def test_opening_and_closing_keeps_the_bias() -> None:
    block = next(iter(walk(tiny("opt"))))
    bias = {n: layer.bias.clone() for n, layer in block.linears.items()}
    opened: Opened = Watched(Uniform(8, GROUP)).open(block, Known())
    before = run(block.module, block.inputs[0])
    opened.close()
    for name, layer in packed(block.module).items():
        assert torch.equal(layer.bias, bias[name])  # type: ignore[arg-type]
    torch.testing.assert_close(run(block.module, block.inputs[0]), before)
