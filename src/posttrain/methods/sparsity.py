"""Weights left out: by their size, by their inputs, with error feedback; and tokens that attention leaves out.

Notation: W `[out, in]` the weight of a linear layer, X `[tokens, in]` its inputs, s the share of the weights that go.
What stays is stored in 16 bits with a bit for every place (1 + 16 (1 - s) bits a weight), or with its place among the
M columns of a pattern N:M (N/M (16 + log2 M) bits). Multiplying by what is stored makes nothing faster here: that takes
hardware for the pattern.
"""

from __future__ import annotations

from functools import partial

from posttrain.compress.method import Compression
from posttrain.compress.solvers.magnitude import Magnitude
from posttrain.compress.solvers.sparsegpt import SparseGPT
from posttrain.compress.solvers.sparsity import Across, agreeing
from posttrain.compress.solvers.unchanged import Unchanged
from posttrain.compress.solvers.wanda import Wanda
from posttrain.compress.sparse_attention import SparseAttention, Statistic
from posttrain.data.recovery import Recovery
from posttrain.methods.distillation import Teacher
from posttrain.methods.registry import method
from posttrain.methods.supervised import sft
from posttrain.training.method import Method
from posttrain.training.weights import CubicSparsity, KeepZeros, PruneAndRegrow


@method(family="sparsity", card="000")
def magnitude(sparsity: float = 0.5, pattern: str = "", across: Across = "layer") -> Compression:
    r"""Magnitude pruning: the smallest weights of each layer go.

    .. math:: \hat w_{ij} = w_{ij}\,\mathbb 1[\,|w_{ij}| > \tau\,],\qquad
              \tau:\ \text{a share } s \text{ is at most }\tau

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


@method(family="sparsity", card="146")
def double_sparsity(
    tokens: int = 128,
    factor: int = 4,
    label_bits: int = 4,
    statistic: Statistic = "qk",
    dense: int = 2,
    recent: int = 0,
) -> Compression:
    r"""Double Sparsity: a decode step attends to the k tokens that a few channels of their keys say matter most.

    .. math:: I = \mathrm{top}_k\ q_S \cdot K_{t,S},\qquad
              o = \mathrm{softmax}\Big(\frac{q K_I^\top}{\sqrt d}\Big) V_I,\qquad
              S = \mathrm{top}_{d/g}\ \mathrm{mean}_t |q_{t,c}\,k_{t,c}|

    Weights stay as they are, and so does the cache: what is sparse is what is read of it, `S r n/16 + 2 k d` numbers a
    head instead of `2 S d`, for S tokens and r = d/g labels of n bits. The channels of each head are chosen once, on 64
    windows of 512 tokens. Prompts are read whole. Log-probabilities of a text (perplexity, say) are computed with every
    token read as if it were decoded, which is harsher than decoding behind a prompt.

    Args:
        tokens: k, a decode step attends to; no more tokens than that, and attention is exact.
        factor: g. label_bits: n; 16 leaves labels as they are. They are rounded, but kept in the model's precision.
        statistic: what a channel is chosen by: `qk` as above, `q` or `k` alone, or at `random`, for comparison.
        dense: layers from the first on whose attention stays dense. recent: of the k tokens, the newest that are always
            among them (the paper has none).

    Settled here: `q` and `k` are taken after positions have turned them, as the labels are; the authors' before.

    Reference: Post-training sparse attention with Double Sparsity, 2024, arXiv 2408.07092 (card 146).
    """
    attention = SparseAttention(tokens, factor, label_bits, statistic, dense, recent)
    return Compression("double-sparsity", Unchanged(), attention=attention)


@method(family="sparsity", card="088")
def granet(
    sparsity: float = 0.8,
    initial: float = 0.0,
    every: int = 10,
    regrow: float = 0.5,
    start: float = 0.0,
    end: float = 0.5,
) -> Method:
    r"""GraNet: weights are pruned little by little as they are trained, and at each pruning some come back elsewhere.

    .. math:: s_t = s_f + (s_i - s_f)\Big(1 - \frac{t - t_0}{n\,\Delta t}\Big)^3,\qquad
              M \leftarrow M \setminus \mathrm{smallest}_{r_t}|\theta| \cup
              \mathrm{largest}_{r_t}|\nabla_\theta L|

    Every Δt updates of SFT the smallest weights of all layers together go until a share s_t is gone; then each layer
    drops a share r_t of what it has left and grows as many where the gradient of that update is largest, from 0. r_t
    falls from r_0 to 0.005 as a cosine over the stage. After pruning is over, dropping and growing goes on. Linear
    layers in blocks are pruned; what is saved is an ordinary model with zeros (`magnitude` at the same sparsity stores
    them). A best model is looked for once the final sparsity is reached.

    Args:
        sparsity: s_f. initial: s_i; above 0, layers start from random masks (ERK).
        every: Δt, updates. regrow: r_0; 0 is gradual magnitude pruning.
        start: t_0, end: where pruning ends, as shares of the stage's steps (the paper's half, of 160 epochs).

    Settled here: numbers of weights are exact, and the last event prunes to s_f (the authors' code stops one event
    earlier); initial masks have exactly their density.

    Reference: Sparse training via boosting pruning plasticity with neuroregeneration, 2021, arXiv 2106.10404
    (card 088).
    """
    return sft().replace(weight_rule=PruneAndRegrow(CubicSparsity(sparsity, initial, every, start, end), regrow))


@method(family="sparsity", card="141")
def paser(
    teacher: Teacher | None = None,
    share: float = 0.4,
    clusters: int = 10,
    concepts: bool = True,
    keep_zeros: bool = True,
) -> Method:
    r"""PASER: a pruned model recovers by SFT on the rows on which it departed most from the model that it was.

    .. math:: n_k = \Big\lfloor B\,\frac{\bar J_k}{\sum_j \bar J_j} \Big\rfloor,\qquad
              J(x) = \mathrm{mean}_t\,\mathrm{JSD}(\pi_0, \pi)_t,\qquad \mathrm{IES}(x) = \frac{J(x)}{\log |x|^2}

    Rows are clustered by the teacher's states (diffusion embedding, then NMF), each cluster k gets a part of the budget
    B that goes with its mean divergence, and in it the rows of largest IES are taken, but for those whose concepts
    (key phrases) were seen in rows before and never together. Selection takes one pass of both models over the rows.

    Args:
        teacher: the model as it was before it was pruned: a model id, a folder or a loaded policy.
        share: B, of the rows (the paper's 20,000 of 52,000). clusters: K.
        concepts: whether rows whose concepts clash are left out.
        keep_zeros: whether weights of linear layers that are 0 stay 0; False trains all of them.

    Settled here: J is the mean over the answer's tokens, embeddings are the teacher's mean states of the answer, and
    all weights are trained (the paper's LoRA would fill the zeros of a model that was not pruned by whole structures).

    Reference: PASER: post-training data selection for efficient pruned large language model recovery, 2025, arXiv
    2502.12594 (card 141).
    """
    sampler = partial(Recovery, share=share, clusters=clusters, concepts=concepts)
    return sft().replace(sampler=sampler, teacher=teacher, weight_rule=KeepZeros() if keep_zeros else None)
