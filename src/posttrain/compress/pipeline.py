"""The pipeline: transform* -> bit allocation -> solver(grid) -> packing, over the blocks of any transformers model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from posttrain.compress.calls import Batch, uncalled
from posttrain.compress.experts import unfuse
from posttrain.compress.method import Compression
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.stacks import check_patterns, linears, skipped, stacks, whole_names
from posttrain.compress.walk import Block, Walk
from posttrain.models.load import few
from posttrain.trajectory import PosttrainError

Progress = Callable[[int, int], None]
CHUNK = 1 << 24  # values looked at together
LOST = 0.95  # the relative error of a layer from which on it is warned of


@dataclass(slots=True)
class LayerSummary:
    """One packed layer. error: relative Frobenius error of the weights it took the place of (as transformed); of those
    that were all zero, 0 where they stay so, and else 1.
    """

    name: str
    bits: float
    error: float


@dataclass(slots=True)
class Summary:
    """What a compression did. seconds: of the whole; layers: in the order in which they were packed; arguments: of the
    method; left: layers that stay as they are although none was to be skipped (see `calls.uncalled`).
    """

    method: str
    seconds: float = 0.0
    layers: list[LayerSummary] = field(default_factory=list)
    bits: float = 0.0
    packed_bytes: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def compress_model(
    model: nn.Module,
    method: Compression,
    batches: Sequence[Batch],
    *,
    skip: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Summary:
    """Compress a model in place: its blocks' linear layers become `PackedLinear`, its attention what the method says.

    batches: calibration, the keyword arguments of a forward pass each (`{"input_ids": ...}`, `{"pixel_values": ...}`).
    skip: patterns of layers to leave as they are, beside the method's. progress: of blocks.
    Fused experts of a mixture are taken apart first (`experts.unfuse`), so that they are linear layers as any others.
    The vocabulary projection, embeddings and norms stay as they are: they stand in no block. So do layers that their
    block does not call (Mamba's dt_proj); a warning names them.
    """
    begun = time.perf_counter()
    unfuse(model)
    check(model, method, (*skip, *uncalled(model, batches)))
    patterns = (*method.skip, *skip)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            summary = _compress(model, method, batches, patterns, seed, progress)
    finally:
        model.train(was_training)
    summary.seconds, summary.arguments = time.perf_counter() - begun, dict(method.arguments)
    return summary


def check(model: nn.Module, method: Compression, skip: Sequence[str] = ()) -> None:
    """PosttrainError where a method cannot compress this model, told before anything is calibrated or changed."""
    _check_finite(model)
    check_patterns(model, skip)
    layers = _layers(model, (*method.skip, *skip))
    if not layers:
        raise PosttrainError(f"{method.name}: every linear layer is skipped; nothing is left to compress")
    for name, layer in layers.items():
        method.solver.check((layer.out_features, layer.in_features), name)


def _check_finite(model: nn.Module) -> None:
    """PosttrainError for parameters with values that are not finite, of whatever kind: all that follows meets them."""
    found = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if found:
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        raise PosttrainError(
            f"{name} holds weights that are not finite ({few(found)}); repair or train the model again"
        )


@torch.no_grad()
def _finite(parameter: torch.Tensor) -> bool:
    """A sum that is finite has finite terms, and needs no memory; only where it is not, each value is looked at."""
    parts = parameter.detach().reshape(-1).split(CHUNK) if parameter.is_floating_point() else ()
    return all(
        bool(torch.isfinite(part.sum(dtype=torch.promote_types(part.dtype, torch.float32))))
        or bool(torch.isfinite(part.float()).all())
        for part in parts
    )


def fitting_group(model: nn.Module, group: int, skip: Sequence[str] = ()) -> int:
    """What a method's usual group becomes on a model some of whose layers it does not divide: the largest power of two
    below it that divides the columns of all. Where none of at least 16 does, or all is well, the group as it is.
    """
    columns = [layer.in_features for layer in _layers(model, skip).values()]
    fits = [g for g in (group, *(2**k for k in range(10, 3, -1) if 2**k < group)) if _divides(g, columns)]
    return fits[0] if fits else group


def _divides(group: int, columns: Sequence[int]) -> bool:
    """A group that is wider than a layer is the layer's whole row, and 0 is that of every layer."""
    return group <= 0 or all(group >= count or count % group == 0 for count in columns)


def _layers(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers in the model's blocks by their whole names, but for those to skip."""
    blocks = [block for stack in stacks(model) for block in whole_names(stack)]
    return {f"{b}.{n}": m for b, block in blocks for n, m in linears(block, b, skip).items()}


def _compress(
    model: nn.Module, method: Compression, batches: Sequence[Batch], skip: Sequence[str], seed: int, progress: Progress
) -> Summary:
    batches = method.calibration.chosen(model, batches, seed)
    for transform in method.transforms:
        transform.apply_to_model(model)
    left = _left(model, batches, skip)
    skip, found = (*skip, *left), stacks(model)
    bits = method.allocation.bits(model, found, batches, skip) if method.allocation is not None else {}
    summary, total, count = Summary(method.name, left=left), sum(len(s.blocks) for s in found), 0

    def done(block: Block) -> None:
        nonlocal count
        count += 1
        progress(count, total)

    for stack in found:
        keeps, follows = method.solver.keeps_float, method.solver.float_inputs
        walk = Walk(
            model, stack, batches, keeps_float=keeps, float_inputs=follows, skip=skip, bits=bits, seed=seed
        )  # fmt: skip
        originals: dict[str, torch.Tensor] = {}

        def prepare(block: Block, originals: dict[str, torch.Tensor] = originals) -> None:
            for transform in method.transforms:
                transform.apply_to_block(block)
                block.refresh()
            if method.activations is not None:
                method.activations.fit_block(block)
            originals |= {f"{block.name}.{n}": layer.weight for n, layer in block.linears.items()}

        def finished(block: Block, originals: dict[str, torch.Tensor] = originals) -> None:
            for name in block.linears:
                whole = f"{block.name}.{name}"
                summary.layers.append(_summary(whole, block.module.get_submodule(name), originals.pop(whole)))
            done(block)

        method.solver.solve_model(walk, prepare, finished)
    if method.attention is not None:
        method.attention.apply_to_model(model, batches, seed)
    _warn_of_lost(summary.layers)
    summary.bits, summary.packed_bytes = bits_and_bytes(model)
    return summary


def _left(model: nn.Module, batches: Sequence[Batch], skip: Sequence[str]) -> list[str]:
    """Layers that cannot be compressed because their block does not call them; a warning names them."""
    found = [name for name in uncalled(model, batches) if not skipped(name, skip)]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"{found[0]}{more} stay as they are: their block uses the weight without calling the layer, so that its "
            f"inputs are not seen",
            stacklevel=2,
        )
    return found


def bits_and_bytes(model: nn.Module) -> tuple[float, int]:
    """Bits of a packed weight, everything counted (of a float one where nothing is packed), and bytes of all."""
    packed = [m.weight for m in model.modules() if isinstance(m, PackedLinear)]
    weights = sum(p.shape[0] * p.shape[1] for p in packed)
    if not packed:
        return 8.0 * next(model.parameters()).dtype.itemsize, 0
    return sum(p.counted_bits for p in packed) / weights, sum(p.stored_bytes for p in packed)


def _summary(name: str, module: nn.Module, before: torch.Tensor) -> LayerSummary:
    if not isinstance(module, PackedLinear):
        raise PosttrainError(f"{name} was left unpacked by the solver")
    before, after = before.detach().float(), module.weight.dequantize()
    # in fp64, in which the squares of what fp32 holds neither overflow nor vanish
    gap, size = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (after - before, before))
    error = gap / size if size > 0 else float(gap > 0)  # nothing but error where there were zeros alone
    return LayerSummary(name, module.weight.bits_per_weight, error)


def _warn_of_lost(layers: Sequence[LayerSummary]) -> None:
    """A warning that names the layers whose packed weights say next to nothing of those they took the place of."""
    lost = [layer for layer in layers if not layer.error <= LOST]
    if lost:
        warnings.warn(
            f"{few([layer.name for layer in lost])}: the packed weights keep next to nothing of the float ones "
            f"(relative error {lost[0].error:.3g}); the bits are too few, or the weights have scales that half "
            f"precision does not hold (6e-8 to 65504): skip such layers, or choose another method",
            stacklevel=2,
        )
