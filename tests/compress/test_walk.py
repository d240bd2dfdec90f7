"""The walk computes what the model's own forward pass does, and its statistics are those of the layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from walkable import WALKABLE, text, walkable

from posttrain.compress.calls import Batch
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.solvers.rtn import rounded
from posttrain.compress.stacks import linears, stacks
from posttrain.compress.walk import Block, Walk
from posttrain.trajectory import PosttrainError

Seen = dict[str, list[Tensor]]


def seen(model: nn.Module, names: Sequence[str], batches: Sequence[Batch], *, given: bool) -> Seen:
    """What modules are given (or give) in the model's own forward pass, batch by batch."""
    found: Seen = {name: [] for name in names}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if given else out
            found[name].append(value[0] if isinstance(value, tuple) else value)

        return hook

    hooks = [model.get_submodule(n).register_forward_hook(watch(n), with_kwargs=True) for n in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


def llama(**options: Any) -> tuple[nn.Module, list[Batch], Walk]:
    model, batches = walkable("llama")
    return model, batches, Walk(model, stacks(model)[0], batches, **options)


def pack_all(block: Block, bits: int) -> None:
    for name, layer in block.linears.items():
        block.install(name, rounded(layer.weight.detach(), Uniform(bits, 0), name))


@pytest.mark.parametrize("name", WALKABLE)
def test_blocks_that_are_left_alone_give_what_the_model_gives(name: str) -> None:
    model, batches = walkable(name)
    (stack,) = stacks(model)
    names = [f"{stack.name}.{i}" for i in range(len(stack.blocks))]
    given, gave = (seen(model, names, batches, given=which) for which in (True, False))
    walk = Walk(model, stack, batches)
    assert len(walk) == len(names)
    blocks = 0
    for block in walk:
        assert alike([call.hidden for call in block.inputs], given[block.name])
        assert alike(block.outputs(), gave[block.name])
        blocks += 1
    assert blocks == len(names)


def test_later_blocks_are_given_what_the_compressed_ones_give() -> None:
    model, batches, walk = llama(keeps_float=True)
    names = ["model.layers.0", "model.layers.1"]
    given, gave = (seen(model, names, batches, given=which) for which in (True, False))
    for block in walk:
        assert block.float_inputs is not None
        assert alike([call.hidden for call in block.float_inputs], given[block.name])
        assert alike(block.targets(), gave[block.name])
        pack_all(block, 2)
        assert not alike(block.outputs(), gave[block.name])
        now = seen(model, names[:2], batches, given=True)
        assert alike([call.hidden for call in block.inputs], now[block.name])
    assert all(isinstance(m, PackedLinear) for m in model.get_submodule("model.layers.1.mlp").children() if
               hasattr(m, "in_features"))  # fmt: skip


def test_without_the_float_model_there_are_no_targets() -> None:
    _, _, walk = llama()
    with pytest.raises(ValueError, match="keeps_float"):
        next(iter(walk)).targets()


def test_blocks_are_kept_without_the_float_models_hidden_states() -> None:
    _, _, walk = llama(keeps_float=True, float_inputs=False)
    for block in walk:
        assert block.before is not None
        assert block.float_inputs is None
        with pytest.raises(ValueError, match="float_inputs"):
            block.targets()


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("llama", [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]),
        ("opt", [["q", "k", "v"], ["out"], ["fc1"], ["fc2"]]),
        ("gpt-neox", [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]),
        ("mamba", [["in"], ["x"], ["out"], ["dt"]]),  # whose weight is used without a call of the layer
    ],
)
def test_stages_are_the_layers_that_share_an_input_in_the_order_they_run(name: str, stages: list[list[str]]) -> None:
    model, batches = walkable(name)
    for block in Walk(model, stacks(model)[0], batches):
        found = [[n.rpartition(".")[2].removesuffix("_proj") for n in stage] for stage in block.stages]
        assert [sorted(stage) for stage in found] == [sorted(stage) for stage in stages]
        assert list(block.linears) == [n for stage in block.stages for n in stage]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox", "bert", "vit", "mamba"])
def test_moments_are_those_of_the_inputs_in_the_models_own_pass(name: str) -> None:
    model, batches = walkable(name)
    (stack,) = stacks(model)
    names = [f"{stack.name}.{i}.{n}" for i, block in enumerate(stack.blocks) for n in linears(block)]
    given = seen(model, names, batches, given=True)
    for block in Walk(model, stack, batches):
        found = block.moments(list(block.linears), keep=5)
        for layer, moments in found.items():
            if layer == "mixer.dt_proj":
                assert moments.count == 0
                continue
            x = torch.cat([t.reshape(-1, t.shape[-1]) for t in given[f"{block.name}.{layer}"]])
            assert moments.count == len(x)
            assert moments.gram is not None
            assert torch.allclose(moments.gram, x.T @ x, rtol=1e-4, atol=1e-3)
            for figure, expected in (("absmax", x.abs().amax(0)), ("minimum", x.amin(0)), ("maximum", x.amax(0)),
                                     ("mean", x.mean(0)), ("mean_abs", x.abs().mean(0))):  # fmt: skip
                assert torch.allclose(getattr(moments, figure), expected, atol=1e-5), figure
            assert moments.kept.shape == (5, x.shape[1])
            assert all((x - kept).abs().amax(1).min() < 1e-5 for kept in moments.kept)
        for stage in block.stages:
            assert len({id(found[n]) for n in stage}) == 1


def test_moments_of_a_later_stage_see_the_earlier_ones_compressed() -> None:
    model, batches, walk = llama()
    block = next(iter(walk))
    (out,) = block.stages[1]
    before = block.moments([out])[out].gram
    for name in block.stages[0]:
        block.install(name, rounded(block.linears[name].weight.detach(), Uniform(2, 0), name))
    x = torch.cat([t.reshape(-1, t.shape[-1]) for t in seen(model, [f"{block.name}.{out}"], batches, given=True)
                   [f"{block.name}.{out}"]])  # fmt: skip
    now = block.moments([out])[out].gram
    assert before is not None
    assert now is not None
    assert torch.allclose(now, x.T @ x, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(now, before, rtol=1e-2)


def test_tokens_weighed_call_by_call() -> None:
    _, batches, walk = llama()
    block = next(iter(walk))
    (name, *_) = block.stages[0]
    only = {i: torch.zeros(batch["input_ids"].numel()) for i, batch in enumerate(batches)}
    only[1][:] = 1.0
    weighed = block.moments([name], weights=only.__getitem__)[name]
    alone = block.moments([name], calls=[block.inputs[1]])[name]
    assert torch.allclose(weighed.hessian, alone.hessian, rtol=1e-5, atol=1e-6)


def test_a_block_keeps_biases_and_bits_of_its_own() -> None:
    model, batches = walkable("opt")
    bits = {"model.decoder.layers.1.fc1": 2.0}
    blocks = list(Walk(model, stacks(model)[0], batches, bits=bits))
    assert [block.bits for block in blocks] == [{}, {"fc1": 2.0}]
    bias = blocks[0].linears["fc1"].bias.clone()
    made = blocks[0].install("fc1", rounded(blocks[0].linears["fc1"].weight.detach(), Uniform(8, 0), "fc1"))
    assert made.bias is not None
    assert torch.equal(made.bias, bias)


def test_an_empty_calibration() -> None:
    model, _ = walkable("llama")
    with pytest.raises(PosttrainError, match=r"^calibration is empty; expected at least one sequence of text$"):
        Walk(model, stacks(model)[0], [])


def test_a_model_in_training_mode_is_walked_without_dropout_and_left_in_it() -> None:
    model, batches = walkable("bert")
    (stack,) = stacks(model)
    expected = seen(model, [f"{stack.name}.1"], batches, given=True)[f"{stack.name}.1"]
    model.train()
    Walk(model, stack, batches)
    assert model.training
    model.eval()
    *_, last = Walk(model, stack, batches)
    assert alike([call.hidden for call in last.inputs], expected)


def test_a_model_that_skips_a_block_cannot_be_walked() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.layers[2](self.layers[0](hidden_states))

    model = Skipping()
    with pytest.raises(PosttrainError, match="not every block of layers was called once a batch"):
        Walk(model, stacks(model)[0], [{"hidden_states": torch.ones(1, 2)}])


def test_batches_of_different_lengths_keep_their_own_masks() -> None:
    model, _ = walkable("opt")
    batches = text(3, padded=True)
    together = [block.outputs() for block in Walk(model, stacks(model)[0], batches)]
    for i, batch in enumerate(batches):
        alone = [block.outputs() for block in Walk(model, stacks(model)[0], [batch])]
        assert all(alike([a[i]], b) for a, b in zip(together, alone, strict=True))
