"""Quantization to few bits: vectors in the place of single weights, and integers and floats found in turns.

Notation: W `[out, in]` the weight of a linear layer, X `[tokens, in]` its inputs, H = 2/n X^T X, U the upper Cholesky
factor of its damped inverse, b bits, Ŵ what is stored. Calibration: 64 windows of 512 tokens (papers: 128 of 2,048).
"""

from __future__ import annotations

from typing import Literal

from posttrain.compress.method import Compression
from posttrain.compress.solvers.decoupleq import DecoupleQ
from posttrain.compress.solvers.vptq import VPTQ
from posttrain.methods.registry import method


@method(family="quantization", card="139")
def vptq(
    bits: int = 2,
    vector: int = 0,
    residual: int = 0,
    overhead: float = 0.15,
    groups: int = 1,
    outliers: float = 0.0,
    damping: float = 0.01,
    permute: bool = True,
    normalise: bool = False,
    iterations: int = 25,
    refit: int = 20,
) -> Compression:
    r"""VPTQ: several weights share one index into a table of vectors, and columns make up for each other's errors.

    .. math:: \hat w_{s:s+v,\,j} = C_{i} + C^{res}_{k},\qquad
              i = \arg\min_i \|w_{s:s+v,\,j} - C_i\|,\qquad
              w_{:,l} \mathrel{-}= \frac{w_{:,j} - \hat w_{:,j}}{U_{jj}}\,U_{jl}\ \ (l > j)

    Vectors run along the output dimension inside one column, where all have the same weight in the layer's error, so
    the nearest centroid is the best one and the column's error is carried on as by GPTQ. Tables come from k-means in
    which vectors of column j weigh :math:`H_{jj}`. They cost bits too, more than the weights themselves in a small
    layer; the length of vectors follows from that unless it is given. After the indices, the tables are fitted to the
    layer's outputs (least squares, in the place of the paper's short training of centroids and norms by gradient).

    Args:
        bits: b, of an index, a weight.
        vector: v, weights that share an index; 0 takes the paper's (6 at 2 bits, 4 at 3, 6 at 4), or the longest
            shorter one whose tables cost at most `overhead` bits a weight.
        residual: bits of an index that go to a table of what the first one leaves over (0: none, but an index of more
            than 12 bits is split in halves).
        overhead: see vector.
        groups: tables of their own for so many runs of columns.
        outliers: the share of columns, those with the largest :math:`H_{jj}`, with a table of their own and one bit
            more a weight (the paper: none, or 0.01 to 0.02).
        damping: of H, times the mean of its diagonal.
        permute: columns in the order of falling :math:`H_{jj}`.
        normalise: look vectors up in columns scaled to [0, 1], with H scaled likewise.
        iterations: of k-means, at most (the paper: 100). refit: steps of conjugate gradient that fit the tables to the
            outputs.

    Reference: VPTQ: extreme low-bit vector post-training quantization for large language models, 2024, arXiv 2409.17066
    (card 139).
    """
    solver = VPTQ(
        bits, vector, residual, overhead, groups, outliers, damping, permute=permute, normalise=normalise,
        iterations=iterations, refit=refit,
    )  # fmt: skip
    return Compression("vptq", solver)


@method(family="quantization", card="022")
def decoupleq(
    bits: int = 2,
    group: int = 0,
    rounds: int = 4,
    rounding: Literal["gptq", "train"] = "gptq",
    symmetric: bool = False,
    damping: float = 0.01,
    epochs: int = 4,
    rate: float = 1e-5,
    norms: bool = True,
) -> Compression:
    r"""decoupleQ: codes and floats of a uniform grid are two parts of one least-squares problem, solved in turns.

    .. math:: \min_{q, s, z}\ (\hat w - w)^\top H\,(\hat w - w),\qquad \hat w = s\,q + z

    for each row. With q fixed, (s, z) of all its groups have a closed form; with (s, z) fixed, q is rounded column by
    column as by GPTQ. A row takes new values only where its error falls. The zero point is a float. Then the floats of
    a block's layers, not their codes, are trained until the block's outputs are those of the float block on the same
    inputs.

    Args:
        bits: b. group: columns of a row that share s and z; 0 for the whole row.
        rounds: K; 1 is one pass of GPTQ from the whole range.
        rounding: of q: `gptq`, or `train`, which descends by gradient between the columns that it freezes (slow).
        symmetric: no z; the middle code is 0.
        damping: of H, times the mean of its diagonal (and once more in the rounding, as in the authors' code).
        epochs: of the training of a block's floats; 0 leaves it out. rate: its learning rate.
        norms: trains the block's norms with them, in models that are held in fp32.

    Reference: decoupleQ: towards 2-bit post-training uniform quantization via decoupling parameters into integer and
    floating points, 2024, arXiv 2404.12759 (card 022).
    """
    solver = DecoupleQ(bits, group, damping, rounds, rounding, symmetric, epochs=epochs, rate=rate, norms=norms)
    return Compression("decoupleq", solver)
