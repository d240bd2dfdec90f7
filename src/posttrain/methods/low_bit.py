"""Few bits on uneven levels: tables and small floating-point numbers, ternary and binary planes, outliers, powers.

Notation as in `quantization`: W `[out, in]`, X `[tokens, in]` the inputs, b bits, g a group of columns of a row, s its
scale, Ŵ what is stored. Sizes count everything that is stored: codes, scales, tables, indices.
"""

from __future__ import annotations

from typing import Literal

from posttrain.compress.grids.bilevel import Bilevel
from posttrain.compress.grids.float8 import Float8, Kind
from posttrain.compress.grids.power import Power
from posttrain.compress.grids.table import Table
from posttrain.compress.grids.ternary import TernaryPlanes
from posttrain.compress.grids.uniform import Uniform, Zero
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.solvers.billm import BiLLM, Searched
from posttrain.compress.solvers.dmmv import LeastLargestError, Weighting
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.min_max import Search
from posttrain.compress.solvers.nupes import LearnedPower
from posttrain.compress.solvers.ptq161 import SalientAndBinary, share_of
from posttrain.compress.solvers.restorative import Restoration
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.solvers.spqr import SpQR
from posttrain.methods.registry import method
from posttrain.trajectory import PosttrainError

TRAINED = Calibrated(
    32, 256
)  # for what trains block by block: the papers' 128 x 2,048 tokens are a matter of hours here


@method(family="quantization", card="000")
def nf4(group: int = 64, double: bool = True) -> Compression:
    r"""NormalFloat: sixteen levels at the quantiles of a normal distribution, scaled to each group's largest weight.

    .. math:: \hat w = s\,v_q,\qquad s = \max_g|w|,\qquad q = \arg\min_q |w/s - v_q|

    Stored in 4.13 bits a weight, or 4.5 without double quantization. The second scales are of 256 rows of a group here,
    of 256 groups in a row's order in QLoRA; codes are computed with the scales as they are stored.

    Args:
        group: g, columns of a row that share s; 0 for the whole row.
        double: store s in 8 bits of the dynamic type, as its distance from the mean, with an fp32 scale for 256 of
        them;
            otherwise in fp32.

    Reference: QLoRA: efficient finetuning of quantized LLMs, 2023, arXiv 2305.14314 (card 000).
    """
    return Compression("nf4", RoundToNearest(Table(4, group, "nf4", "double" if double else "float")))


@method(family="quantization", card="000")
def fp4(group: int = 64, double: bool = False) -> Compression:
    r"""Four-bit floating point as bitsandbytes has it, scaled to each group's largest weight.

    .. math:: \hat w = \pm s\,v_q,\qquad v \in \{0, \tfrac1{192}, \tfrac16, \tfrac14, \tfrac13, \tfrac12, \tfrac23, 1\},
              \qquad s = \max_g|w|

    Stored in 4.5 bits a weight, 4.13 with double quantization.

    Args:
        group: g, columns of a row that share s; 0 for the whole row. double: see `nf4`.

    Reference: QLoRA: efficient finetuning of quantized LLMs, 2023, arXiv 2305.14314 (card 000).
    """
    return Compression("fp4", RoundToNearest(Table(4, group, "fp4", "double" if double else "float")))


@method(family="quantization", card="000")
def fp8(group: int = 0, kind: Kind = "e4m3") -> Compression:
    r"""Eight-bit floating point: numbers that hardware multiplies, with a scale a row.

    .. math:: \hat w = s\,\mathrm{fp8}(w/s),\qquad s = \max_g|w| / 448

    Weights alone; rounds to nearest, ties to even. Stored in 8 bits a weight and 32 a scale.

    Args:
        group: g, columns of a row that share s; 0 for the whole row.
        kind: `e4m3` (3 bits of mantissa, up to 448) or `e5m2` (2, up to 57,344).

    Reference: FP8 formats for deep learning, 2022, arXiv 2209.05433 (card 000).
    """
    return Compression("fp8", RoundToNearest(Float8(8, group, kind)))


@method(family="quantization", card="000")
def mxfp4(group: int = 32) -> Compression:
    r"""Microscaling: four-bit floating point with a power of two for every 32 weights.

    .. math:: \hat w = \pm 2^{e}\,v_q,\qquad v \in \{0, \tfrac12, 1, \tfrac32, 2, 3, 4, 6\},\qquad
              e = \lfloor\log_2 \max_g|w|\rfloor - 2

    What is above 6 is clamped. Stored in 4.25 bits a weight.

    Args:
        group: g, columns of a row that share e; the format's is 32.

    Reference: Microscaling data formats for deep learning, 2023, arXiv 2310.10537 (card 000).
    """
    return Compression("mxfp4", RoundToNearest(Table(4, group, "e2m1", "power")))


@method(family="quantization", card="000")
def nvfp4(group: int = 16) -> Compression:
    r"""Four-bit floating point with an eight-bit floating-point scale for every 16 weights and a number for the matrix.

    .. math:: \hat w = \pm S\,\mathrm{fp8}(s/S)\,v_q,\qquad s = \max_g|w| / 6,\qquad S = \max s / 448

    v as in `mxfp4`. Stored in 4.5 bits a weight.

    Args:
        group: g, columns of a row that share s; the format's is 16.

    Reference: NVIDIA, Pretraining large language models with NVFP4, 2025, arXiv 2509.25149 (card 000).
    """
    return Compression("nvfp4", RoundToNearest(Table(4, group, "e2m1", "float8")))


@method(family="quantization", card="000")
def spqr(bits: int = 3, group: int = 16, threshold: float = 0.2, damping: float = 1.0) -> Compression:
    r"""SpQR: GPTQ in small groups whose scales are quantized too, with the most sensitive weights kept as they are.

    .. math:: w_{ij}\ \text{is kept if}\ \Big(\frac{w_{ij}-\hat w_{ij}}{U_{jj}}\Big)^2 >
              \tau\,\mathrm{mean}_j\frac{\mathrm{var}(w_{:,j})}{U_{jj}^2}

    U as in `gptq`; columns are taken by falling activation. Likely outliers take no part in fitting a group's scale and
    zero, which are stored in 3 bits each with a range for every 16 rows. Stored in b + 10/g bits a weight (3.63) and 32
    an outlier, which are about one in a hundred.

    Args:
        bits: b. group: g, columns of a row that share a scale. threshold: τ; inf keeps none. damping: λ of GPTQ.

    Reference: SpQR: a sparse-quantized representation for near-lossless LLM weight compression, 2023, arXiv 2306.03078
    (card 000).
    """
    return Compression("spqr", SpQR(Bilevel(bits, group), threshold, damping))


@method(family="quantization", card="000")
def billm(block: int = 128, salient: int = 49, searched: Searched = "weights", damping: float = 0.01) -> Compression:
    r"""BiLLM: binary weights, with the salient columns binarised twice and the others split by size into two parts.

    .. math:: \hat w = \mu + \alpha\,\mathrm{sign}(w-\mu)\ \ (\text{again of the residual, if salient}),\qquad
              \mathrm{salience}_j = \sum_i w_{ij}^2 / U_{jj}^2

    Block after block of columns inside GPTQ; the number of salient columns and the size at which the others are split
    are those that lose least. Stored in 2 + 112/block bits a weight (2.88), which the paper counts as 1.08: the split
    takes a bit a weight, and each row of a block has seven numbers.

    Args:
        block: columns of a block, which have means and scales of their own. salient: at most so many of them.
        searched: what the searches measure loss on: `weights`, or `saliency` as the authors' code does.
        damping: λ of GPTQ.

    Reference: BiLLM: pushing the limit of post-training quantization for LLMs, 2024, arXiv 2402.04291 (card 000).
    """
    return Compression("billm", BiLLM(block, salient, damping, searched))


@method(family="quantization", card="133")
def ptqtp(
    bits: int = 2, group: int = 64, iterations: int = 50, tolerance: float = 1e-4, ridge: float = 1e-6
) -> Compression:
    r"""PTQTP: a weight is a sum of two trits with a scale each, fitted to every group by alternating least squares.

    .. math:: \min_{\alpha, t}\ \|w - \alpha_1 t_1 - \alpha_2 t_2\|^2,\qquad t_k \in \{-1, 0, 1\}^g,\qquad
              \alpha \leftarrow (S^\top S + \lambda I)^{-1} S^\top w,\quad S = [t_1\ t_2]

    Uses no data. Every weight's trits are the best of nine choices, of equally good ones that with the fewest that are
    not 0. Stored in 3.2 bits a weight (trits five a byte) and 32/g for the scales: 3.7, which the paper calls 1.58
    bits; compare it with methods of 3 and 4 bits.

    Args:
        bits: ternary planes, of 1.6 bits a weight each; the paper's are 2.
        group: g, columns of a row that share the scales (the paper's is 128; 64 divides the widths of more models).
        iterations: at most. tolerance: change of the scales, as a share of them, at which a group is done.
        ridge: λ at the start; it grows where the condition number exceeds 1e12.

    Reference: PTQTP: post-training quantization to trit-planes for large language models, 2025, arXiv 2509.16989
    (card 133).
    """
    return Compression("ptqtp", RoundToNearest(TernaryPlanes(bits, group, iterations, tolerance, ridge)))


@method(family="quantization", card="032", name="ptq1.61")
def ptq1_61(
    bits: float = 1.6,
    salient: int = 4,
    epochs: int = 4,
    rate: float = 5e-4,
    vector_rate: float = 1e-3,
    centred: bool = False,
    restore: int = 0,
) -> Compression:
    r"""PTQ1.61: the input columns with the largest activations in 4 bits, the others binary, with learned scales.

    .. math:: \hat W = m \odot Q_4(W) + (1-m) \odot (\rho\kappa^\top) \odot (\alpha B + \mu),\qquad
              L = \sum_{y}\ \mathrm{MSE}(y, \hat y) - \ln|\cos(y, \hat y)|

    α, ρ and κ are trained block after block, on the outputs of the float block for the float model's inputs and for
    those of the compressed blocks before it. Stored in 1.6 bits a weight, and three numbers a row and one a column.
    Calibration: 32 windows of 256 tokens and 4 epochs (the paper's: 128 of 2,048, 20 epochs).

    Args:
        bits: of a code on average, (salient - 1) times the share of salient columns + 1; the paper's 1.6 is a fifth of
            the columns.
        salient: bits of a salient column's codes. epochs: over the calibration text; 0 trains nothing.
        rate: learning rate of α. vector_rate: of ρ and κ. centred: α starts at mean|w - μ| in the place of mean|w|.
        restore: steps of low-rank training (2 sequences each, rank 64, 1e-4) on what a first compression gave, which is
            merged and compressed anew; 0 leaves it out. The paper does 10,000 on other text than it calibrates on; here
            they are on the calibration text.

    Reference: PTQ1.61: push the real limit of extremely low-bit post-training quantization methods for large language
    models, 2025, arXiv 2502.13179 (card 032).
    """
    if not 2 <= salient <= 8:
        raise PosttrainError(f"salient is {salient}; salient columns have 2 to 8 bits")
    solver = SalientAndBinary(
        Uniform(salient, 0, "integer"), epochs, share=share_of(bits, salient), rate=rate, vector_rate=vector_rate,
        centred=centred, restoration=Restoration(restore) if restore else None,
    )  # fmt: skip
    return Compression("ptq1.61", solver, calibration=TRAINED)


@method(family="quantization", card="131")
def dmmv(
    bits: int = 4,
    group: int = 128,
    zero: Zero = "integer",
    start: Literal["gptq", "rtn"] = "gptq",
    tokens: int = 2048,
    moves: int = 128,
    kicks: int = 0,
    weighting: Weighting = "norm",
) -> Compression:
    r"""DMMV: from GPTQ's codes on, those are changed that make the layer's largest output error smaller.

    .. math:: \min_{q}\ \max_{n}\ \omega_n\,|x_n^\top(w - \hat w(q))|,\qquad q \in \{0, \dots, 2^b-1\}^{in}

    Row by row, a local search of single steps of a code, and of pairs of them where none alone helps; among equally
    large errors the norm of order 32 decides. Scales and size are as of `gptq`.

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row. zero: the grid, as of `rtn`.
        start: `gptq` (in order of activation) or `rtn` gives the first codes. tokens: n, of the calibration text.
        moves: of a row, at most. kicks: how often a row that is stuck is disturbed and searched again.
        weighting: `norm` is ω = 1/|x|, `none` is 1, with which a few tokens of large activations decide everything.

    Reference: Discrete optimization of min-max violation and its applications across computational sciences, 2025,
    arXiv 2508.13437 (card 131).
    """
    if start not in ("gptq", "rtn"):
        raise PosttrainError(f"start is {start!r}; expected gptq or rtn")
    grid = Uniform(bits, group, zero)
    first = GPTQ(grid, act_order=True) if start == "gptq" else RoundToNearest(grid)
    return Compression("dmmv", LeastLargestError(first, tokens, weighting, Search(moves=moves, kicks=kicks)))


@method(family="quantization", card="024")
def nupes(
    bits: int = 4,
    group: int = 0,
    exponent: float | None = None,
    epochs: int = 4,
    rate: float = 0.1,
    exponent_rate: float = 0.001,
) -> Compression:
    r"""NUPES: levels spread by a power function, whose exponent is learned for each layer along with the codes.

    .. math:: q = \mathrm{round}\big(L\,\mathrm{sign}(w)(|w|/m)^{a}\big),\qquad
              \hat w = \mathrm{sign}(q)\,m\,(|q|/L)^{1/a},\qquad L = 2^{b-1}-1

    The exponent starts where it loses least of the weights. Then codes and exponents are trained until a block's
    outputs are the float block's, with roundings that harden; a code may travel over all of its range, though few leave
    the two next to where they start. Without epochs
    it uses no data, which is PowerQuant with an exponent a layer. Stored in b bits, 16 a scale and a table of 2^b
    numbers a layer. Calibration: 32 windows of 256 tokens and 4 epochs.

    Args:
        bits: b. group: g, columns of a row that share m; 0 for the whole row.
        exponent: where a starts, 0.2 to 1.2; None searches it. epochs: over the calibration text.
        rate: learning rate of the codes, in steps of a code. exponent_rate: of a.

    Settled here: the rate. At 0.01, which suits 10,000 steps, codes are half way between two levels after as few steps
    as there are here, and hardening undoes what was learned.

    Reference: NUPES: non-uniform post-training quantization via power exponent search, 2023, arXiv 2308.05600
    (card 024).
    """
    if not epochs:
        return Compression("nupes", RoundToNearest(Power(bits, group, exponent)))
    solver = LearnedPower(
        Uniform(bits, group), epochs, exponent=exponent, rate=rate, exponent_rate=exponent_rate
    )  # fmt: skip
    return Compression("nupes", solver, calibration=TRAINED)
