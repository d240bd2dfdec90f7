"""Quantization that folds ranges of channels into norms, and rounds attention probabilities: made for vision models.

Notation: X `[tokens, channels]` what a layer norm gives, with gain γ and bias β; W and b of a layer behind it; A
attention probabilities. Embeddings of patches and the head stay as they are, as everything outside the blocks does.
"""

from __future__ import annotations

from typing import Literal

from posttrain.compress.activations.percentile import Percentile
from posttrain.compress.activations.probabilities import Logarithm, Tangent
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.rounded_attention import RoundedAttention
from posttrain.compress.solvers.adaround import BlockRounding
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.solvers.solver import Solver
from posttrain.compress.transforms.reparameterize import Centre, Ends, Reparameterization
from posttrain.methods.registry import method
from posttrain.trajectory import PosttrainError

Softmax = Literal["tangent", "log_sqrt2", "log2", "uniform", "none"]
IMAGES = 32  # that the papers calibrate on


@method(family="quantization", card="028")
def dopq_vit(
    bits: int = 4,
    group: int = 0,
    activation_bits: int = 4,
    softmax: Softmax = "tangent",
    centre: Centre = "median",
    tanq_center: float | None = None,
    tanq_beta: float | None = None,
) -> Compression:
    r"""DopQ-ViT: attention probabilities on levels that a tangent spreads, and the median as the channels' one scale.

    .. math:: q = \mathrm{round}\Big((2^b - 1)\,\frac{\tan\beta(u - c) + \tan\beta c}{\tan\beta(1 - c) + \tan\beta c}
              \Big),\quad u = \min\Big(\frac{A}{A_{\max}}, 1\Big),\qquad \tilde s = \mathrm{median}_d\ s_d

    Most probabilities are small and the few large ones carry what attention says: the tangent is steep at both ends. c,
    β and A_max are those of a grid that lose least of each layer's calibration probabilities. Ranges of the channels of
    a norm's output are folded into the norm and the layers behind it, as in `repquant`, towards their median, which a
    few outlying channels do not move. Weights are rounded to nearest in ranges that are searched, the other
    activations evenly between quantiles that are. Calibration: 32 sequences (of images: what is given).

    Args:
        bits: of weights. group: g, columns of a row that share a scale; 0 for the whole row.
        activation_bits: of activations, probabilities included.
        softmax: levels of the probabilities: `tangent`; `log_sqrt2` and `log2` are RepQ-ViT's and its baseline,
            `uniform` even steps, `none` leaves all of attention as it is.
        centre: of s and z over channels: `median`, or RepQ-ViT's `mean`.
        tanq_center: c, tanq_beta: β as a share of its limit π / (2 max(c, 1 - c)); None searches them.

    Settled here: the paper's parameters of the tangent are not known; this family of two holds the one-sided and the
    symmetric one. With whole zero points the choice of s̃ cancels, so that the median matters by the zero point alone.

    Reference: DopQ-ViT: towards distribution-friendly and outlier-aware post-training quantization for vision
    transformers, 2024, arXiv 2408.03291 (card 028).
    """
    return Compression(
        "dopq-vit",
        RoundToNearest(Uniform(bits, group, "integer", clip="mse")),
        (Reparameterization(activation_bits, centre),),
        activations=Percentile(activation_bits),
        attention=_attention(activation_bits, softmax, tanq_center, tanq_beta),
        calibration=Calibrated(IMAGES),
    )


@method(family="quantization", card="029")
def repquant(
    bits: int = 4,
    group: int = 0,
    activation_bits: int = 4,
    softmax: Softmax = "log_sqrt2",
    clip: Ends = "learned",
    reconstruction: Literal["block", "gptq", "none"] = "block",
    epochs: int = 5,
) -> Compression:
    r"""RepQuant: calibrated with a range for every channel, run with one for all, since norms and layers take the rest.

    .. math:: \gamma' = \frac{\gamma}{r_1},\quad \beta' = \frac{\beta + s \odot r_2}{r_1},\quad W' = W\,
              \mathrm{diag}(r_1),\quad b' = b - W(s \odot r_2),\qquad r_1 = \frac{s}{\tilde s},\quad r_2 = z - \tilde z

    s and z are scales and zero points of the channels of a norm's output, s̃ and z̃ their means, the latter rounded: then
    every activation has the same integer before and after. The two ends of each channel's range are learned by the
    outputs of the layers behind (dual clipping). Probabilities are rounded to powers of √2, which a kernel of powers of
    two computes with two scales; those below the last are left out. Then the rounding of the weights is learned, block
    by block. A norm without a bias (RMS norms of language models) has symmetric ranges and is scaled alone, which is
    SmoothQuant with α = 1. Calibration: 32 sequences (of images: what is given).

    Args:
        bits: of weights. group: g, columns of a row that share a scale; 0 for the whole row.
        activation_bits: of activations, probabilities included.
        softmax: levels of the probabilities, as of `dopq_vit`; `none` leaves all of attention as it is.
        clip: how the ranges of channels end: `learned`; `percentile` is RepQ-ViT's search; `whole` is none.
        reconstruction: of the weights: `block` learns their rounding (BRECQ), `gptq` for models too large for that,
            `none` takes the nearest.
        epochs: passes over the calibration in the reconstruction of a block.

    Settled here: where the learned ends are measured from (the channel's mean), their loss and steps, and the solver of
    the reconstruction, none of which is known of the paper. Attention is rounded once all blocks are solved, so that
    the reconstruction does not make up for it.

    Reference: RepQuant: towards accurate post-training quantization of large transformer models via scale
    reparameterization, 2024, arXiv 2402.05628 (card 029).
    """
    grid = Uniform(bits, group, "integer", clip="mse")
    solvers: dict[str, Solver] = {
        "block": BlockRounding(grid, epochs=epochs), "gptq": GPTQ(grid), "none": RoundToNearest(grid)
    }  # fmt: skip
    if reconstruction not in solvers:
        raise PosttrainError(f"reconstruction is {reconstruction!r}; expected one of {', '.join(solvers)}")
    return Compression(
        "repquant",
        solvers[reconstruction],
        (Reparameterization(activation_bits, ends=clip),),
        activations=Percentile(activation_bits),
        attention=_attention(activation_bits, softmax),
        calibration=Calibrated(IMAGES),
    )


def _attention(
    bits: int, softmax: Softmax, centre: float | None = None, slope: float | None = None
) -> RoundedAttention | None:
    """Queries, keys and values rounded evenly, probabilities as said."""
    levels: dict[str, Activations | None] = {
        "tangent": Tangent(bits, centre, slope), "log_sqrt2": Logarithm(bits), "log2": Logarithm(bits, root=False),
        "uniform": Percentile(bits), "none": None,
    }  # fmt: skip
    if softmax not in levels:
        raise PosttrainError(f"softmax is {softmax!r}; expected one of {', '.join(levels)}")
    return None if softmax == "none" else RoundedAttention(Percentile(bits), levels[softmax])
