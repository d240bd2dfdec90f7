"""The baselines of quantization after training: round to nearest, and GPTQ.

Notation: W `[out, in]` the weight of a linear layer, X `[tokens, in]` its inputs, b bits, g a group of columns of a row
that share a scale s and a zero point z, Ŵ what the codes q stand for. Bits per weight are b + (16 + b_zero)/g.
"""

from __future__ import annotations

from typing import Literal

from posttrain.compress.grids.uniform import Uniform, Zero
from posttrain.compress.method import Compression
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.methods.registry import method

Clip = Literal["none", "mse"]


@method(family="quantization", card="000")
def rtn(bits: int = 4, group: int = 128, zero: Zero = "integer", clip: Clip = "none") -> Compression:
    r"""Round to nearest: each weight takes the nearest of the evenly spaced values of its group.

    .. math:: \hat w = s\,(q - z),\qquad q = \mathrm{clamp}(\mathrm{round}(w/s) + z,\ 0,\ 2^b-1),\qquad
              s = \frac{\max(w, 0) - \min(w, 0)}{2^b - 1}

    It looks at no data, and is what every other method has to beat at the same bits.

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row.
        zero: `integer` has a code for the value 0, `none` is symmetric around it, `float` starts at the smallest weight
            (a half-precision number in the place of z).
        clip: `mse` searches each group's range, with errors to the power 2.4; `none` takes all of it.

    Reference: Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only
    inference, 2017, arXiv 1712.05877; as the papers' baseline (card 000).
    """
    return Compression("rtn", RoundToNearest(Uniform(bits, group, zero, clip)))


@method(family="quantization", card="000")
def gptq(
    bits: int = 4,
    group: int = 128,
    zero: Zero = "integer",
    clip: Clip = "none",
    damping: float = 0.01,
    act_order: bool = False,
) -> Compression:
    r"""GPTQ: columns are rounded one by one, and those still to come make up for the error of those that were.

    .. math:: w_{:,j} \mathrel{-}= \frac{w_{:,i} - \hat w_{:,i}}{U_{ii}}\,U_{ij}\ \ (j > i),\qquad
              U^\top U = \Big(\tfrac2n X^\top X + \lambda\,\overline{\mathrm{diag}}\,I\Big)^{-1}

    X are the inputs that the layers before it give once they are compressed, stage by stage inside a block. A group's
    scales are fitted to the weights as corrected when the group begins. Calibration: 64 windows of 512 tokens (the
    paper's are 128 of 2,048).

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row.
        zero, clip: the grid, as of `rtn`.
        damping: λ, times the mean of the Hessian's diagonal.
        act_order: columns in the order of falling diagonal, with each group's scales fitted to the original weights.

    Reference: GPTQ: accurate post-training quantization for generative pre-trained transformers, 2022, arXiv 2210.17323
    (card 000).
    """
    return Compression("gptq", GPTQ(Uniform(bits, group, zero, clip), damping=damping, act_order=act_order))
