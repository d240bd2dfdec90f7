"""Products of fewer bits: when a model runs, and while it is trained. Notation as in `quantization`."""

from __future__ import annotations

from posttrain.compress.activations.outliers import OutlierColumns
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.method import Compression
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.methods.registry import method
from posttrain.methods.supervised import sft
from posttrain.models.float_format import FloatFormat, Rounding
from posttrain.models.simulated import Passes, SimulatedPrecision
from posttrain.training.method import Method


@method(family="quantization", card="136", name="llm-int8")
def llm_int8(threshold: float = 6.0) -> Compression:
    r"""LLM.int8(): weights and inputs in 8 bits, but for the input channels that hold an outlier.

    .. math:: y = s_x s_w \sum_{j \notin O} q^x_j\,q^w_j + \sum_{j \in O} x_j\,\hat w_j,\qquad
              O = \{j : \max_t |x_{tj}| > \theta\},\qquad s_x = \max_{j \notin O}|x_j| / 127

    Uses no data: a scale a row of weights, one a token, and outliers are seen when the model runs. It is the 8-bit side
    of the study of how quantized models take to decoding (card 136): with `nf4` and `fp4`, single and `double`, it
    makes up the study's quantizers, and `posttrain evaluate --decoding` measures what the study does. Stored in 8 bits
    a weight and 16 a row.

    Args:
        threshold: θ, an input's size; 0 rounds no input, inf every one.

    Settled here: weights of outlier channels are those of the 8-bit codes, as in the authors' library when a model
    runs; the paper's keep 16 bits. Which channels are outliers depends on the tokens that run together, so that the
    embedded engine, which decodes them in other company than a forward pass has, leaves such a model to the plain one.

    Reference: LLM.int8(): 8-bit matrix multiplication for transformers at scale, 2022, arXiv 2208.07339; measured in
    Understanding the impact of post-training quantization on large language models, 2023, arXiv 2309.05210 (card 136).
    """
    return Compression("llm-int8", RoundToNearest(Restricted(8, 0)), activations=OutlierColumns(8, threshold))


@method(family="quantization", card="157")
def reduced_precision(
    exponent: int = 8,
    mantissa: int = 3,
    rounding: Rounding = "truncate",
    subnormals: bool = True,
    passes: Passes = "all",
) -> Method:
    r"""SFT whose linear layers multiply numbers of fewer bits than bf16: how much precision does training need.

    .. math:: Y = R(X)\,R(W)^\top,\qquad dX = R(dY)\,R(W),\qquad dW = R(dY)^\top R(X)

    R rounds to bf16 and then drops the bits that a format of e exponent and m mantissa bits has no room for, without a
    scale. Sums, norms, softmax, embeddings, the vocabulary projection and the optimizer stay as they are, and nothing
    becomes faster: it is a measurement. Any other method trains so by
    `.replace(precision=SimulatedPrecision(FloatFormat(...)))`. `training.stability` trains over a grid of precisions,
    learning rates and seeds, counts spikes and divergences, and follows the sharpness of the loss in the logits
    (`evaluation.sharpness`), which is to rise before.

    Args:
        exponent: e; 8 is bf16's. Numbers beyond the format's largest become that.
        mantissa: m, up to 7; with both 8 and 7 it is training in bf16.
        rounding: `truncate` towards 0, as a mask of bits does (it makes numbers smaller by up to a last digit), or to
            the `nearest`.
        subnormals: whether numbers below the smallest normal one lose digits one by one; else they become 0.
        passes: which products take rounded numbers: `all`, or those of the `forward` or `backward` pass alone.

    Settled here: the vocabulary projection is left out, as in training in 8 bits; the paper's treatment of numbers
    outside a narrower exponent's range is not known.

    Reference: To FP8 and back again: quantifying the effects of reducing precision on LLM training stability, 2024,
    arXiv 2405.18710 (card 157).
    """
    held = FloatFormat(exponent, mantissa, rounding, subnormals, beyond="largest")
    return sft().replace(precision=SimulatedPrecision(held, passes=passes))
