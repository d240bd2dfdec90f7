"""Weights left out: by their size, by their inputs, with error feedback.

Notation: W `[out, in]` the weight of a linear layer, X `[tokens, in]` its inputs, s the share of the weights that go.
What stays is stored in 16 bits with a bit for every place (1 + 16 (1 - s) bits a weight), or with its place among the
M columns of a pattern N:M (N/M (16 + log2 M) bits). Multiplying by what is stored makes nothing faster here: that takes
hardware for the pattern.
"""

from __future__ import annotations

from posttrain.compress.method import Compression
from posttrain.compress.solvers.magnitude import Magnitude
from posttrain.compress.solvers.sparsegpt import SparseGPT
from posttrain.compress.solvers.sparsity import Across, agreeing
from posttrain.compress.solvers.wanda import Wanda
from posttrain.methods.registry import method


@method(family="sparsity", card="000")
def magnitude(sparsity: float = 0.5, pattern: str = "", across: Across = "layer") -> Compression:
    r"""Magnitude pruning: the smallest weights of each layer go.

    .. math:: \hat w_{ij} = w_{ij}\,\mathbb 1[\,|w_{ij}| > \tau\,],\qquad \tau:\ \text{a share } s \text{ is at most }\tau

    It looks at no data, and is what every other way of pruning has to beat at the same sparsity. Stored in
    1 + 16 (1 - s) bits a weight.

    Args:
        sparsity: s. pattern: `N:M` keeps N of every M columns of a row (`2:4`), and its sparsity is 1 - N/M.
        across: whether τ is of the whole `layer` or of each `row`.

    Reference: Han et al., Learning both weights and connections for efficient neural networks, 2015, arXiv 1506.02626;
    as the papers' baseline (card 000).
    """
    return Compression("magnitude", Magnitude(agreeing(sparsity, pattern), across))


@method(family="sparsity", card="000")
def wanda(sparsity: float = 0.5, pattern: str = "", across: Across = "row") -> Compression:
    r"""Wanda: the weights go that, times the size of their input, are the smallest of their row.

    .. math:: S_{ij} = |w_{ij}|\cdot\lVert X_{:,j}\rVert_2

    What stays is left as it is. The inputs are those that the blocks before give once they are pruned, and those of a
    whole block are looked at before any of it is. Calibration: 64 windows of 512 tokens (the paper's are 128 of 2,048).

    Args:
        sparsity: s. pattern: `N:M` keeps N of every M columns of a row (`2:4`), and its sparsity is 1 - N/M.
        across: whether weights are compared with those of their `row` or of the whole `layer`.

    Reference: A simple and effective pruning approach for large language models, 2023, arXiv 2306.11695 (card 000).
    """
    return Compression("wanda", Wanda(agreeing(sparsity, pattern), across))


@method(family="sparsity", card="000")
def sparsegpt(sparsity: float = 0.5, pattern: str = "", damping: float = 0.01, block: int = 128) -> Compression:
    r"""SparseGPT: weights go whose absence costs least after later columns have made up for it, which they do.

    .. math:: S_{ij} = \frac{w_{ij}^2}{U_{jj}^2},\qquad w_{:,k} \mathrel{-}= \frac{w_{:,j} - \hat w_{:,j}}{U_{jj}}\,
              U_{jk}\ \ (k > j)

    U as in `gptq`. The mask is chosen for a block of columns at a time, by the weights as corrected by then, over all
    rows. Inputs, and calibration, as of `gptq`.

    Args:
        sparsity: s. pattern: `N:M` keeps N of every M columns of a row (`2:4`), and its sparsity is 1 - N/M.
        damping: λ, times the mean of the Hessian's diagonal. block: columns whose weights are compared.

    Reference: SparseGPT: massive language models can be accurately pruned in one-shot, 2023, arXiv 2301.00774
    (card 000).
    """
    return Compression("sparsegpt", SparseGPT(agreeing(sparsity, pattern), damping, block))
