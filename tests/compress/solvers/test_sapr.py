"""Partial retraining: the Fisher information, the penalty and its limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.low_rank import LowRankWeight
from posttrain.compress.solvers.fisher import next_token_losses, output_fisher, weight_fisher
from posttrain.compress.solvers.omniquant import ClippedRange, LearnedClipping
from posttrain.compress.solvers.sapr import AdaptedRange, PartialRetraining
from posttrain.compress.stacks import linears, stacks
from posttrain.trajectory import PosttrainError
from tiny_blocks import GROUP, compressed, packed, text, tiny, walk, weights

GRID = Uniform(2, GROUP)


def test_losses_are_those_of_the_next_token() -> None:
    model, (batch,) = tiny(), text(1)
    logits = model(**batch).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(next_token_losses(model, batch), wanted.view(4, -1).mean(1))
    with pytest.raises(PosttrainError, match="input_ids"):
        next_token_losses(model, {"pixel_values": torch.zeros(1)})


def test_the_fisher_information_squares_each_sequences_gradient() -> None:
    model, batches = tiny(), text(2, rows=2)
    layers = linears(model.model.layers[1])  # type: ignore[union-attr, index, arg-type]
    found = weight_fisher(model, layers, batches)["mlp.up_proj"]
    weight, wanted = layers["mlp.up_proj"].weight, torch.zeros_like(found)
    assert not weight.requires_grad
    weight.requires_grad_(True)
    for ids in torch.cat([b["input_ids"] for b in batches]):
        logits = model(input_ids=ids[None]).logits[0, :-1]
        wanted += torch.autograd.grad(F.cross_entropy(logits, ids[1:]), weight)[0] ** 2
    torch.testing.assert_close(found, wanted)


def test_output_gradients_are_those_of_each_sequence() -> None:
    model, batches = tiny(), text(2, rows=2)
    found = output_fisher(model, stacks(model)[0], batches)
    assert [len(block) for block in found] == [2, 2]
    hidden = model.model(batches[0]["input_ids"], output_hidden_states=True).hidden_states  # type: ignore[operator, union-attr]
    last = model.model.layers[-1]  # type: ignore[union-attr, index]
    inputs = hidden[1].detach()
    rope = model.model.rotary_emb(inputs, torch.arange(12)[None])  # type: ignore[operator, union-attr]
    out = last(inputs, position_embeddings=rope)  # type: ignore[operator]
    out = (out[0] if isinstance(out, tuple) else out).detach().requires_grad_(True)
    logits = model.lm_head(model.model.norm(out))[:, :-1]  # type: ignore[operator, union-attr]
    loss = F.cross_entropy(logits.flatten(0, 1), batches[0]["input_ids"][:, 1:].flatten(), reduction="none")
    wanted = torch.autograd.grad(loss.view(2, -1).mean(1).sum(), out)[0] ** 2
    torch.testing.assert_close(found[1][0].float(), wanted, rtol=0.01, atol=float(wanted.max()) * 1e-2)


def adapted(weight: torch.Tensor, rank: int = 3, **options: object) -> AdaptedRange:
    arguments = {
        "rate": 0.01, "decay": 0.0, "penalty": 1.0, "saliency": None, "after": False, "normalize": False, **options
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    return AdaptedRange(ClippedRange(weight, 2, 2), rank, 6.0, draw=draw, **arguments)  # type: ignore[arg-type]


def test_what_is_packed_is_what_was_trained() -> None:
    torch.manual_seed(0)
    made = adapted(torch.randn(6, 32))
    torch.nn.init.normal_(made.up)
    found = made.pack()
    assert isinstance(found, LowRankWeight)
    torch.testing.assert_close(found.dequantize(), made().detach(), atol=1e-5, rtol=1e-5)
    assert isinstance(adapted(torch.randn(6, 32), rank=0).pack(), type(found.base))


def test_the_penalty_and_its_gradient_reach_the_clipping_not_the_adapter() -> None:
    torch.manual_seed(0)
    weight, saliency = torch.randn(6, 32), torch.rand(6, 32)
    made = adapted(weight, penalty=0.3, saliency=saliency)
    torch.nn.init.normal_(made.up)
    made()
    penalty = made.penalty(0.5)
    assert penalty is not None
    wanted = 0.3 * (saliency * (made.clipped().detach() - weight) ** 2).sum()
    assert penalty.item() == pytest.approx(float(wanted), rel=1e-5)
    penalty.backward()
    assert made.clipped.upper.grad is not None and float(made.clipped.upper.grad.abs().max()) > 0  # noqa: PT018
    assert made.up.grad is None


def test_before_the_adapter_moves_the_penalty_is_the_same_with_it() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    before, after = adapted(weight), adapted(weight, after=True)
    values = []
    for made in (before, after):
        made()
        values.append(made.penalty(0.0).item())  # type: ignore[union-attr]
    assert values[0] == values[1]
    torch.nn.init.normal_(after.up)
    after()
    assert after.penalty(0.0).item() != values[0]  # type: ignore[union-attr]


def test_no_penalty_is_apiq_step_for_step() -> None:
    """λ = 0 and the stage `outputs` train the same; without adapters that is OmniQuant with the augmented loss."""
    options = {"rank": 2, "decay": 0.0}
    one = weights(compressed(tiny(), PartialRetraining(GRID, 2, penalty=0.0, **options)))  # type: ignore[arg-type]
    other = weights(compressed(tiny(), PartialRetraining(GRID, 2, stage="outputs", **options)))  # type: ignore[arg-type]
    assert all(torch.equal(one[n], other[n]) for n in one)
    bare = PartialRetraining(GRID, 2, penalty=0.0, rank=0, decay=0.0, clip_rate=0.05)
    wanted = weights(compressed(tiny(), LearnedClipping(GRID, 2, targets=("float", "prefix"), rate=0.05)))
    found = weights(compressed(tiny(), bare))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_a_saliency_of_one_is_none() -> None:
    class Ones(PartialRetraining):
        def known(self, blocks):  # type: ignore[no-untyped-def]
            known = super().known(blocks)
            known.fisher = {n: torch.ones_like(f) for n, f in known.fisher.items()}
            assert known.fisher
            return known

    found = weights(compressed(tiny(), Ones(GRID, 2, rank=2)))
    wanted = weights(compressed(tiny(), PartialRetraining(GRID, 2, rank=2, saliency="none")))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_training_on_the_penalty_alone_reaches_the_best_clip() -> None:
    """Card 150: with F = 1 the learned clip reaches the weight error of a search over both ends."""
    torch.manual_seed(0)
    weight = torch.randn(1, 64)
    made = ClippedRange(weight, 2, 1, rate=0.02)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        ((made() - weight) ** 2).sum().backward()
        optimizer.step()
    learned = float(((made().detach() - weight) ** 2).sum())
    best = torch.inf
    for high in torch.linspace(0.3, 1, 29):
        for low in torch.linspace(0.3, 1, 29):
            tried = ClippedRange(weight, 2, 1)
            tried.upper.data.fill_(torch.logit(high.clamp(max=1 - 1e-6)))
            tried.lower.data.fill_(torch.logit(low.clamp(max=1 - 1e-6)))
            best = min(best, float(((tried().detach() - weight) ** 2).sum()))
    assert learned < 1.1 * best


def test_the_penalty_keeps_weights_where_the_loss_minds() -> None:
    model, batches = tiny(), text(4)
    layers = {
        f"model.layers.{i}.{n}": layer
        for i, block in enumerate(stacks(model)[0].blocks)
        for n, layer in linears(block).items()
    }
    fisher, plain = weight_fisher(model, layers, batches), {n: layer.weight.clone() for n, layer in layers.items()}

    def lost(penalty: float) -> float:
        solver = PartialRetraining(GRID, 5, rank=2, penalty=penalty, clip_rate=0.05)
        found = {n: m.weight.base.dequantize() for n, m in packed(compressed(tiny(), solver, batches)).items()}
        return sum(float((fisher[n] / fisher[n].mean() * (found[n] - plain[n]) ** 2).mean()) for n in found)

    assert lost(10.0) < lost(0.0)


def test_the_fisher_information_needs_a_model() -> None:
    with pytest.raises(PosttrainError, match="whole model"):
        PartialRetraining(GRID, 1).solve_block(next(iter(walk(tiny()))))
