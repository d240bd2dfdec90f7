"""Quantization behind transforms: weights (and activations) are changed so that they are easier to round, and nothing
else changes. Notation as in quantization.py; X are activations, `s` a scale of channels where it has an index j.
"""

from __future__ import annotations

from typing import Literal

from posttrain.compress.activations.crossquant import CrossQuant
from posttrain.compress.activations.dynamic import Dynamic, Per
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.activations.static import Static
from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.solvers.clipped import ClippedRounding
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.transforms.awq import AWQ
from posttrain.compress.transforms.cross_fold import CrossFold
from posttrain.compress.transforms.online import OnlineHadamard
from posttrain.compress.transforms.rotation import Kind, ResidualRotation
from posttrain.compress.transforms.shift import OutlierSuppression
from posttrain.compress.transforms.smooth import SmoothQuant
from posttrain.methods.registry import method

Ranges = Literal["token", "tensor", "static"]


@method(family="quantization", card="000")
def smoothquant(
    bits: int = 8, group: int = 0, activation_bits: int = 8, alpha: float = 0.5, ranges: Ranges = "token"
) -> Compression:
    r"""SmoothQuant: activations are made even and weights uneven, by a scale of channels folded into the norms.

    .. math:: \hat Y = Q(X\,\mathrm{diag}(s)^{-1})\;Q(\mathrm{diag}(s)\,W^\top),\qquad
              s_j = \frac{\max|X_j|^{\alpha}}{\max_i|W_{ij}|^{1-\alpha}}

    A few channels of a norm's output are many times larger than the others and decide on the step of all; dividing
    them by s and multiplying the weights' columns costs nothing when the model runs. Only layers behind norms are
    smoothed; all of the blocks' layers are rounded, weights with a scale a row, symmetrically. Calibration: 64 windows
    of 512 tokens (the paper's are 512).

    Args:
        bits: of weights. group: g, columns of a row that share a scale; 0 for the whole row.
        activation_bits: of activations. alpha: α, how much of the unevenness goes into the weights; 0.85 for most
            Llamas.
        ranges: of activations: of each `token` (O1 in the paper), of the `tensor` of all tokens that run together (O2),
            or `static`, a layer's largest input of the calibration (O3).

    Reference: SmoothQuant: accurate and efficient post-training quantization for large language models, 2022, arXiv
    2211.10438 (card 000).
    """
    activations = Static(activation_bits) if ranges == "static" else Dynamic(activation_bits, per=ranges)
    return Compression(
        "smoothquant", RoundToNearest(Restricted(bits, group)), (SmoothQuant(alpha),), activations=activations
    )


@method(family="quantization", card="000")
def awq(bits: int = 4, group: int = 128, points: int = 20, clip: bool = True) -> Compression:
    r"""AWQ: weights that meet large activations are rounded more finely, by a scale of channels that is searched.

    .. math:: s_j = \bar x_j^{\,\rho},\qquad \rho^\star = \arg\min_\rho
              \big\|F(X; W) - F(X;\ Q(W\,\mathrm{diag}(s))\,\mathrm{diag}(s)^{-1})\big\|^2

    x̄ is the mean size of a channel, F what the layers that share an input do together: attention for queries, keys and
    values, the gated part for gate and up. The inverse of s goes into the norm or the layer before. Then each group's
    weights are cut off where that changes its part of the output least (queries and keys are not). Calibration: 64
    windows of 512 tokens (the paper's are 128).

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row.
        points: of ρ that are tried, 0, 1/points, ... below 1; 1 is no scale at all.
        clip: whether to search the cutting.

    Reference: AWQ: activation-aware weight quantization for LLM compression and acceleration, 2023, arXiv 2306.00978
    (card 000).
    """
    grid = Uniform(bits, group, "integer")
    return Compression("awq", ClippedRounding(grid) if clip else RoundToNearest(grid), (AWQ(grid, points),))


@method(family="quantization", card="000")
def quarot(
    bits: int = 4,
    group: int = 0,
    activation_bits: int = 4,
    clip: float = 0.9,
    damping: float = 0.01,
    rotation: Kind = "hadamard",
    heads: bool = True,
    seed: int = 0,
) -> Compression:
    r"""QuaRot: the hidden states are rotated by random Hadamard matrices, so that no channel stands out.

    .. math:: x \to x\,Q,\quad W_{\mathrm{read}} \to W\,\mathrm{diag}(\gamma)\,Q,\quad W_{\mathrm{write}} \to Q^\top W,
              \qquad Q = \tfrac{1}{\sqrt n}\,H\,\mathrm{diag}(\pm 1)

    Q is folded into embeddings, vocabulary projection and all layers that read or write the residual stream, the norms'
    gains γ before it. Inputs of down projections are multiplied by a Hadamard matrix when the model runs, those of
    output projections across the heads (within a head it is folded into values and outputs). Then weights are rounded
    by GPTQ with a searched range, and activations symmetrically by the token. The paper's Hadamard products on queries
    and keys serve its 4-bit cache, which is not part of this.

    Args:
        bits: of weights. group: g, columns of a row that share a scale; 0 for the whole row.
        activation_bits: of activations. clip: share of a token's range that is kept (the paper's; its code has 1).
        damping: λ of GPTQ.
        rotation: `orthogonal` draws any rotation of the residual stream, for widths without a Hadamard matrix.
        heads: whether to rotate behind attention. seed: of Q.

    Reference: QuaRot: outlier-free 4-bit inference in rotated LLMs, 2024, arXiv 2404.00456 (card 000).
    """
    return Compression(
        "quarot",
        GPTQ(Restricted(bits, group, clip="mse"), damping=damping),
        (ResidualRotation(rotation, seed), OnlineHadamard(heads)),
        activations=Dynamic(activation_bits, clip=clip),
    )


@method(family="quantization", card="145", name="os+")
def os_plus(
    bits: int = 8,
    group: int = 0,
    activation_bits: int = 8,
    symmetric: bool = True,
    per: Per = "tensor",
    shift: bool | None = None,
    lower: float = 0.1,
) -> Compression:
    r"""Outlier Suppression+: channels are shifted to their middle, and scaled down to a threshold that is searched.

    .. math:: X \to \frac{X - z}{s},\quad z_j = \frac{\max X_j + \min X_j}{2},\quad s_j = \max\Big(1,
              \frac{\max|X_j - z_j|}{t}\Big),\qquad b \to b + W z,\quad W \to W\,\mathrm{diag}(s)

    Channels that lie to one side of zero lose most of their range to the shift; of the rest only those beyond t are
    scaled. t is the threshold with which attention (or the gated product, or the layer) changes least when weights and
    activations are rounded. Shift and scale go into the norms, whose biases take the shift; an RMS norm has none, and
    is scaled alone. Weights have a scale a row (the paper's 8 bits have one a matrix, which is coarser).

    Args:
        bits: of weights. group: g, columns of a row that share a scale; 0 for the whole row.
        activation_bits: of activations. symmetric: weights and activations around 0, else with zero points (the paper's
            6 bits).
        per: ranges of activations: `tensor` is one a layer, fixed by the calibration, `token` one a token (the paper's
            4 bits).
        shift: None where the norm can take it, True to insist on it, False for none.
        lower: the smallest t that is tried; the paper has 1.0 for OPT and BERT.

    Reference: Outlier Suppression+: accurate quantization of large language models by equivalent and optimal shifting
    and scaling, 2023, arXiv 2304.09145 (card 145).
    """
    grid: Grid = Restricted(bits, group) if symmetric else Uniform(bits, group, "integer")
    activations: Activations = (
        Static(activation_bits, symmetric) if per == "tensor" else Dynamic(activation_bits, symmetric)
    )
    suppression = OutlierSuppression(grid, activation_bits, symmetric, per, shift, lower=lower)
    return Compression("os+", RoundToNearest(grid), (suppression,), activations=activations)


@method(family="quantization", card="140")
def crossquant(
    bits: int = 8, group: int = 0, activation_bits: int = 8, alpha: float = 0.15, folded: bool = False
) -> Compression:
    r"""CrossQuant: an activation's step is a mean of its token's and its channel's, so that fewer are rounded to zero.

    .. math:: \Delta_{ij} = \frac{t_i^{\alpha}\,c_j^{1-\alpha}}{2^{b-1} - 1},\qquad t_i = \max_j|X_{ij}|,\quad
              c_j = \max_i|X_{ij}|

    One large channel makes the step of a token so large that most of its other inputs become 0; with the channels'
    largest in the step this is so for a few columns only. t is taken when the model runs, c from the calibration.
    Weights are rounded symmetrically, with a scale a row or group (4 bits of groups of 128 in the paper).

    Args:
        bits: of weights. group: g, columns of a row that share a scale; 0 for the whole row.
        activation_bits: of activations. alpha: α; 1 is a step per token, 0 one per channel.
        folded: fold c into the weights before they are rounded, as an integer product needs it; otherwise the steps
            are the activations' alone, as in the paper's experiments.

    Reference: CrossQuant: a post-training quantization method with smaller quantization kernel for precise large
    language model compression, 2024, arXiv 2410.07505 (card 140).
    """
    return Compression(
        "crossquant",
        RoundToNearest(Restricted(bits, group)),
        (CrossFold(alpha),) if folded else (),
        activations=CrossQuant(activation_bits, alpha),
    )
