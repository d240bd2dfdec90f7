"""The whole pipeline on tiny models: what is packed and what stays, and every mistake in one line."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from walkable import text, walkable

from posttrain import methods
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.allocate import Allocation
from posttrain.compress.calls import Batch, uncalled
from posttrain.compress.experts import unfuse
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.pipeline import check, compress_model, fitting_group
from posttrain.compress.solvers.rtn import RoundToNearest, rounded
from posttrain.compress.stacks import linears, stacks, whole_names
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

EIGHT = methods.rtn(bits=8, group=0)


def logits(model: nn.Module, batch: Batch | None = None) -> Tensor:
    with torch.no_grad():
        out = model(**(batch or text()[0]))
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    blocks = [named for stack in stacks(model) for named in whole_names(stack)]
    return {f"{name}.{n}": layer for name, block in blocks for n, layer in linears(block).items()}


@pytest.mark.limit("rtn")
@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox", "mamba", "bert"])
def test_every_layer_stands_for_its_rounded_weight_and_the_model_for_those(name: str) -> None:
    model, batches = walkable(name)
    fake = copy.deepcopy(model)
    # a mixer reads the weight of dt_proj without calling the layer, which stays as it is
    before = {n: layer for n, layer in layers(model).items() if not n.endswith("dt_proj")}
    with torch.no_grad():
        for name_of, layer in layers(fake).items():
            if name_of in before:
                layer.weight.copy_(rounded(layer.weight, Uniform(3, 16), "w").dequantize())
    summary = compress_model(model, methods.rtn(bits=3, group=16), batches)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed.keys() == before.keys() == {layer.name for layer in summary.layers}
    for found, layer in layers(fake).items():
        assert found not in before or torch.equal(packed[found].weight.dequantize(), layer.weight)
    assert torch.allclose(logits(model), logits(fake), atol=1e-5)
    assert summary.bits == pytest.approx(sum(p.weight.counted_bits for p in packed.values())
                                         / sum(layer.weight.numel() for layer in before.values()))  # fmt: skip
    assert summary.packed_bytes == sum(p.weight.stored_bytes for p in packed.values())
    assert all(0.1 < layer.error < 0.3 for layer in summary.layers)
    assert (summary.method, summary.seconds > 0) == ("rtn", True)


@pytest.mark.limit("rtn")
@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox", "mixtral", "mamba", "bert", "vit"])
def test_eight_bits_change_little(name: str) -> None:
    model, batches = walkable(name)
    before = logits(model, batches[0])
    compress_model(model, EIGHT, batches)
    after = logits(model, batches[0])
    assert 0 < float((after - before).norm() / before.norm()) < 0.03


def test_gptq_loses_less_than_rounding_on_what_it_was_calibrated_on() -> None:
    errors = {}
    for made in (methods.rtn(bits=2, group=0), methods.gptq(bits=2, group=0)):
        model, _ = walkable("llama")
        batches = [batch for seed in range(8) for batch in text(seed)]
        before = [logits(model, batch) for batch in batches]
        compress_model(model, made, batches)
        after = [logits(model, batch) for batch in batches]
        errors[made.name] = float(sum((a - b).square().sum() for a, b in zip(after, before, strict=True)))
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_the_same_seed_gives_the_same_model() -> None:
    found = []
    for _ in range(2):
        model, batches = walkable("llama")
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        compress_model(model, methods.gptq(bits=3, group=16), batches, seed=4)
        assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
        found.append(logits(model))
    assert torch.equal(*found)


def test_tied_embeddings_stay_tied_and_as_they_were() -> None:
    model, batches = walkable("llama")
    before = model.model.embed_tokens.weight.clone()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    compress_model(model, methods.gptq(bits=2, group=0), batches)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)
    assert isinstance(model.lm_head, nn.Linear)


def test_layers_that_are_skipped_stay_as_they_are() -> None:
    model, batches = walkable("llama")
    before = {n: m.weight.clone() for n, m in layers(model).items()}
    made = methods.rtn(bits=2, group=0).replace(skip=("*.o_proj", "no.such.layer"))
    summary = compress_model(model, made, batches, skip=["*.down_proj", "model.layers.0.*"])
    left = layers(model)
    assert {n.rpartition(".")[2] for n in left if n.startswith("model.layers.1.")} == {"o_proj", "down_proj"}
    assert len([n for n in left if n.startswith("model.layers.0.")]) == 7
    assert all(torch.equal(layer.weight, before[n]) for n, layer in left.items())
    assert len(summary.layers) == 5


def test_progress_of_blocks() -> None:
    model, batches = walkable("llama")
    seen: list[tuple[int, int]] = []
    compress_model(model, EIGHT, batches, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_layers_that_no_block_calls_stay_as_they_are_and_a_warning_says_why() -> None:
    model, batches = walkable("mamba")
    names = [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    assert uncalled(model, batches) == names
    assert uncalled(model, []) == []
    with pytest.warns(UserWarning, match=r"^backbone\.layers\.0\.mixer\.dt_proj and 1 more stay as they are: their "):
        summary = compress_model(model, methods.gptq(bits=3, group=16), batches)  # which needs inputs of every layer
    assert summary.left == names
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names)
    model, batches = walkable("mamba")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compress_model(model, EIGHT, batches, skip=["*.dt_proj"]).left == []


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "vit"])
def test_every_layer_of_other_models_is_called(name: str) -> None:
    model, batches = walkable(name)
    unfuse(model)
    assert uncalled(model, batches) == []


# -- the parts in their places ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubled(Transform):
    """Twice the weight of the first block's up_proj, half that of down_proj: the same function of a model without a
    nonlinearity between; here only to be seen.
    """

    def apply_to_model(self, model: nn.Module) -> None:
        model.model.layers[0].mlp.up_proj.weight.data.mul_(2.0)  # type: ignore[union-attr, operator]

    def apply_to_block(self, block: Block) -> None:
        if block.index == 0:
            block.linears["mlp.down_proj"].weight.data.div_(2.0)


class Halve(InputStep):
    kind = "halve-in-a-test"

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / 2


@dataclass(frozen=True)
class Halved(Activations):
    uses: bool = True

    @property
    def uses_data(self) -> bool:
        return self.uses

    def fit(self, moments: InputMoments | None, width: int, name: str) -> InputStep:
        assert (moments is not None) == self.uses
        assert moments is None or moments.count > 0
        assert name.startswith("model.layers.")
        return Halve(width)


@dataclass(frozen=True)
class Few(Allocation):
    def bits(self, model, stacks, batches, skip) -> dict[str, float]:  # type: ignore[no-untyped-def]
        return {"model.layers.1.mlp.up_proj": 2.0}


def test_a_transform_goes_before() -> None:
    model, batches = walkable("llama")
    before = logits(model)
    compress_model(model, EIGHT.replace(transforms=(Doubled(),)), batches)
    assert float((logits(model) - before).norm() / before.norm()) < 0.03
    mlp = model.model.layers[0].mlp
    other, _ = walkable("llama")
    compress_model(other, EIGHT, batches)
    ratio = mlp.up_proj.weight.dequantize().norm() / other.model.layers[0].mlp.up_proj.weight.dequantize().norm()
    assert float(ratio) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("uses", [True, False])
def test_inputs_are_quantized_once_a_layer_is_packed(uses: bool) -> None:
    model, batches = walkable("llama")
    compress_model(model, EIGHT.replace(activations=Halved(uses=uses)), batches)
    up = model.model.layers[1].mlp.up_proj
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(up(x), x / 2 @ up.weight.dequantize().T, atol=1e-5)


def test_an_allocation_says_the_bits_of_single_layers() -> None:
    model, batches = walkable("llama")
    summary = compress_model(model, EIGHT.replace(allocation=Few()), batches)
    bits = {layer.name: round(layer.bits) for layer in summary.layers}
    assert [name for name, b in bits.items() if b < 8] == ["model.layers.1.mlp.up_proj"]


def test_whether_the_data_matters() -> None:
    assert not methods.rtn().uses_data
    assert methods.gptq().uses_data
    assert methods.rtn().replace(transforms=(Doubled(),)).uses_data
    assert methods.rtn().replace(allocation=Few()).uses_data
    assert methods.rtn().replace(activations=Halved()).uses_data
    assert not methods.rtn().replace(activations=Halved(uses=False)).uses_data


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_groups_that_do_not_divide_are_refused_before_anything_is_done() -> None:
    model, batches = walkable("llama")
    before = list(layers(model))
    with pytest.raises(PosttrainError, match=r"^group 32 does not divide the 48 input columns of model\.layers\.0\."):
        compress_model(model, methods.gptq(group=32), batches)
    assert list(layers(model)) == before
    check(model, methods.gptq(group=32), ["*.down_proj"])
    with pytest.raises(PosttrainError, match=r"group 5 does not divide the 32 input columns of .*; expected a divisor"):
        check(model, methods.rtn(group=5))


@pytest.mark.parametrize(
    ("group", "skip", "taken"),
    [
        (16, (), 16),  # all is well
        (0, (), 0),
        (64, (), 64),  # wider than every layer: whole rows
        (32, (), 16),  # 48 columns in down_proj
        (32, ("*.down_proj",), 32),
        (40, ("*.down_proj",), 40),  # wider than the others
        (7, (), 7),  # nothing of at least 16 below it
    ],
)
def test_a_usual_group_becomes_one_that_divides_all_layers(group: int, skip: tuple[str, ...], taken: int) -> None:
    assert fitting_group(walkable("llama")[0], group, skip) == taken


def test_an_empty_calibration() -> None:
    with pytest.raises(PosttrainError, match="calibration is empty"):
        compress_model(walkable("llama")[0], EIGHT, [])


def test_a_pattern_that_matches_nothing() -> None:
    model, batches = walkable("llama")
    with pytest.raises(PosttrainError, match=r"skip pattern '\*.downproj' matches no linear layer"):
        compress_model(model, EIGHT, batches, skip=["*.downproj"])


def test_everything_skipped() -> None:
    model, batches = walkable("llama")
    with pytest.raises(PosttrainError, match="rtn: every linear layer is skipped; nothing is left to compress"):
        compress_model(model, EIGHT, batches, skip=["*"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("made", [EIGHT, methods.gptq(group=0), methods.awq(group=0), methods.quarot()])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite_are_told_before_anything_is_done(
    name: str, made: methods.Compression, value: float
) -> None:
    model, batches = walkable("llama")
    model.config._name_or_path = "some/model"
    model.get_parameter(name).data.flatten()[-1] = value
    with pytest.raises(
        PosttrainError, match=r"^some/model holds weights that are not finite \((\S+)\); repair"
    ) as error:
        compress_model(model, made, batches)
    assert f"({name})" in str(error.value)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_many_weights_that_are_not_finite_are_counted() -> None:
    model, _ = walkable("bert")
    for parameter in model.encoder.layer[0].attention.self.parameters():
        parameter.data.fill_(-torch.inf)
    with pytest.raises(PosttrainError, match=r"^BertModel holds .* \((encoder\S+, ){2}encoder\S+ and 3 more\); repair"):
        check(model, EIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_weights_are_no_error_however_large(dtype: torch.dtype) -> None:
    model, _ = walkable("llama")
    model.to(dtype)
    model.model.embed_tokens.weight.data.fill_(torch.finfo(dtype).max)  # whose sum is not finite
    check(model, EIGHT)


def test_a_solver_that_leaves_a_layer_out() -> None:
    @dataclass(frozen=True)
    class Lazy(RoundToNearest):
        def solve_block(self, block: Block) -> None:
            pass

    model, batches = walkable("llama")
    with pytest.raises(PosttrainError, match=r"model\.layers\.0\.self_attn\.\w_proj was left unpacked by the solver"):
        compress_model(model, EIGHT.replace(solver=Lazy(Uniform(4, 0))), batches)


def test_constant_and_empty_rows() -> None:
    model, batches = walkable("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0.0
        model.model.layers[0].mlp.up_proj.weight[1] = 0.25
        model.model.layers[1].mlp.gate_proj.weight.zero_()
    for made in (EIGHT, methods.gptq(bits=4, group=16), methods.gptq(bits=3, group=0, act_order=True)):
        found = copy.deepcopy(model)
        compress_model(found, made, batches)
        up = found.model.layers[0].mlp.up_proj.weight.dequantize()
        assert (up[0] == 0).all()
        assert torch.isfinite(logits(found)).all()


def test_the_error_of_zeros() -> None:
    """None where they stay zeros; where they do not, it is all there is, and a warning says so."""
    model, batches = walkable("llama")
    layer = model.model.layers[1].mlp.gate_proj
    layer.weight.data.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = compress_model(copy.deepcopy(model), EIGHT, batches)
    name = "model.layers.1.mlp.gate_proj"
    assert {found.name: found.error for found in summary.layers}[name] == 0.0

    @dataclass(frozen=True)
    class Moved(RoundToNearest):
        def solve(self, weight: Tensor, *given: object) -> PackedWeight:
            return rounded(weight + 0.01, self.grid, "w")

    with pytest.warns(UserWarning, match=rf"^{name}: the packed weights keep next to nothing"):
        summary = compress_model(model, EIGHT.replace(solver=Moved(Uniform(8, 0))), batches)
    assert {found.name: found.error for found in summary.layers}[name] == 1.0


@pytest.mark.parametrize("factor", [1e20, 1e9, 1e-9, 1e-25])
def test_weights_beyond_the_scales_of_half_precision_are_warned_of_by_name(factor: float) -> None:
    model, batches = walkable("llama")
    for index in range(2):
        for name in ("up_proj", "gate_proj"):
            model.model.layers[index].mlp.get_submodule(name).weight.data.mul_(factor)
    told = r"^model\.layers\.0\.mlp\.\S+, model\.layers\.0\.mlp\.\S+, model\.layers\.1\.mlp\.\S+ and 1 more: the packed"
    with pytest.warns(UserWarning, match=told):
        summary = compress_model(model, EIGHT, batches)
    for layer in summary.layers:
        if "up_proj" in layer.name or "gate_proj" in layer.name:
            assert 0.95 < layer.error <= 1.0
        else:
            assert layer.error < 0.02


def test_a_model_in_training_mode_is_left_in_it() -> None:
    model, batches = walkable("bert")
    model.train()
    compress_model(model, EIGHT, batches)
    assert model.training
