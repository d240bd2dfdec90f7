"""Everything of a state-space mixer rounded: the inputs of its layers, and what it hands on between them (Quamba)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.compress.activations.dynamic import check_bits, symmetric
from posttrain.compress.activations.percentile import quantile
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.activations.static import Static, StaticStep, symmetric_scale
from posttrain.compress.moments import InputMoments
from posttrain.compress.walk import Block
from posttrain.models.mixers import PLACES, Mixer
from posttrain.trajectory import PosttrainError

AVERAGED = ("scanned", "state")  # the tensors whose largest values are few and far: a quantile takes their place
SMALLEST = 1e-6  # of a scale


@dataclass(frozen=True)
class ScanRounding(Activations):
    r"""One static symmetric step a tensor. What the scan is given (and its state) is cut off at a high quantile.

    The recurrence carries the error of its input on and on, so that a finer step is worth more there than the few
    largest inputs. Ranges are the largest of the calibration; those of x and of the state are running means over the
    calibration's sequences i of their own quantiles, `v ← v + r (q_p(|x_i|) - v)`, the first being where v starts.

    bits: of activations. weight_bits: of what is no matrix: convolution, logarithm of A, D and the bias of the step
    sizes, rounded in place with one step each, and stored as the floats that they then are; 0 leaves them. quantile: p;
    None takes the largest of all, as of other tensors. rate: r. state_bits: of the state after each token; 0 leaves it.

    Reference: Quamba, 2024, arXiv 2410.13229 (card 142).
    """

    weight_bits: int = 8
    quantile: float | None = 0.99999
    rate: float = 0.01
    state_bits: int = 0

    def __post_init__(self) -> None:
        for bits in (self.bits, self.weight_bits or 8, self.state_bits or 8):
            check_bits(bits)
        if self.quantile is not None and not 0.5 < self.quantile <= 1:
            raise PosttrainError(f"quantile is {self.quantile}; expected a share above a half and up to 1, or None")
        if not 0 < self.rate <= 1:
            raise PosttrainError(f"rate is {self.rate}; expected the weight of a new value, above 0 and up to 1")

    @property
    def uses_data(self) -> bool:
        return True

    def fit(self, moments: InputMoments | None, width: int, name: str) -> StaticStep:
        return Static(self.bits).fit(moments, width, name)

    def fit_block(self, block: Block) -> None:
        for name, mixer in block.module.named_modules():
            if isinstance(mixer, Mixer):
                for place, most in self.observed(block, mixer).items():
                    bits = self.state_bits if place == "state" else self.bits
                    scale = symmetric_scale(most, bits).clamp(min=SMALLEST)
                    mixer.rounding[place] = nn.Sequential(StaticStep.of(_width(mixer, place), bits, scale))
                # what these two are given is rounded as the mixer hands it on
                block.quantizers |= {f"{name}.{layer}": None for layer in ("x_proj", "dt_proj")}
                self._round_parameters(mixer)
        super().fit_block(block)

    @torch.no_grad()
    def observed(self, block: Block, mixer: Mixer) -> dict[str, Tensor]:
        """By place, the largest value that has a code."""
        places = PLACES if self.state_bits else PLACES[:-1]
        seen: dict[str, list[Tensor]] = {}
        found: dict[str, Tensor] = {}

        def note(place: str, tensor: Tensor) -> None:
            if place in places:
                seen.setdefault(place, []).append(tensor.float().abs())

        mixer.watch = note
        try:
            for i in range(len(block.inputs)):
                seen.clear()
                block.outputs(block.inputs[i : i + 1])
                for place, parts in seen.items():
                    found[place] = self._updated(found.get(place), parts, place)
        finally:
            mixer.watch = None
        return found

    def _updated(self, before: Tensor | None, parts: Sequence[Tensor], place: str) -> Tensor:
        """The range with one more call; of states a tensor a token, of others one, `[rows, ...]`."""
        if self.quantile is None or place not in AVERAGED:
            most = torch.stack([part.max() for part in parts]).max()
            return most if before is None else torch.maximum(before, most)
        rows = torch.cat([part.flatten(1) for part in parts], 1).sort(-1).values
        for value in quantile(rows, self.quantile):
            before = value if before is None else before + self.rate * (value - before)
        assert before is not None
        return before

    @torch.no_grad()
    def _round_parameters(self, mixer: Mixer) -> None:
        held = (mixer.conv1d.weight, mixer.conv1d.bias, mixer.A_log, mixer.D, mixer.dt_bias)
        for value in held if self.weight_bits else ():
            if value is not None:
                value.copy_(symmetric(value.float(), value.float().abs().max(), self.weight_bits))


def _width(mixer: Mixer, place: str) -> int:
    """Channels of what is at a place."""
    widths = {
        "projected": mixer.in_proj.out_features, "scanned": mixer.x_proj.in_features,
        "selected": mixer.x_proj.out_features, "steps": mixer.dt_proj.out_features, "state": mixer.A_log.shape[1],
    }  # fmt: skip
    return int(widths[place])
