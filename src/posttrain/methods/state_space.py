"""Quantization of state-space models. Notation: x `[tokens, channels]` what a Mamba layer's scan is given, y what it
gives, z the gate, W_out the layer's output projection.
"""

from __future__ import annotations

from typing import Literal

from posttrain.compress.activations.scan import ScanRounding
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.grids.whole import WholeMatrix
from posttrain.compress.method import Compression
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.transforms.gains import FoldedGains
from posttrain.compress.transforms.mixers import MixersApart
from posttrain.compress.transforms.online import OnlineHadamard
from posttrain.methods.registry import method
from posttrain.trajectory import PosttrainError


@method(family="quantization", card="142")
def quamba(
    bits: int = 8,
    group: int = 0,
    activation_bits: int = 8,
    percentile: float | None = 0.99999,
    rotate: bool = True,
    state_bits: int = 0,
    solver: Literal["nearest", "gptq"] = "nearest",
) -> Compression:
    r"""Quamba: static 8 bits for all of a Mamba layer, with its scan's input cut off and its output rotated.

    .. math:: W_{\mathrm{out}}\,(y \odot \mathrm{SiLU}(z)) = (W_{\mathrm{out}} H^\top)\,
              Q\big(H\,(y \odot \mathrm{SiLU}(z))\big),\qquad v_x \leftarrow v_x + 0.01\,\big(q_p(|x|) - v_x\big)

    The recurrence carries the rounding error of x on, so x is given a finer step by cutting it off at its p-quantile (a
    running mean over the calibration's sequences). The gated output has a few large channels; a Hadamard matrix H
    spreads them over all. Everything has one static symmetric step a tensor: what the norm gives, the halves that the
    input projection gives, x, the step sizes and B, C, what the output projection is given. The norm's gain is folded
    into the input projection. The scan itself is computed in floats. Convolution, A (its logarithm), D and the bias of
    the step sizes are rounded too, and stored as floats. Calibration: 64 windows of 512 tokens (the paper's are 512).

    Args:
        bits: of weights (what is no matrix has 8 always). group: g, columns of a row that share a scale; 0 for one
            scale a matrix, as in the paper.
        activation_bits: of everything that is handed on.
        percentile: p; 1 is the sequences' largest, None the largest of all. The released code has 0.9995, and 0.99999
            for small models.
        rotate: whether to multiply by H.
        state_bits: of the scan's state after each token; 0 leaves it in floats.
        solver: of the weights: `nearest`, or `gptq` for fewer bits.

    Reference: Quamba: a post-training quantization recipe for selective state space models, 2024, arXiv 2410.13229
    (card 142).
    """
    grid = Restricted(bits, group) if group else WholeMatrix(bits)
    if solver not in ("nearest", "gptq"):
        raise PosttrainError(f"solver is {solver!r}; expected nearest or gptq")
    rotation = (OnlineHadamard(heads=False),) if rotate else ()
    return Compression(
        "quamba",
        GPTQ(grid) if solver == "gptq" else RoundToNearest(grid),
        (MixersApart(), FoldedGains(), *rotation),
        activations=ScanRounding(activation_bits, quantile=percentile, state_bits=state_bits),
    )
