"""Quantization that decides where the bits go: to groups of columns, to blocks, to ranges of activations, to experts.

Notation: W `[out, in]` the weight of a linear layer, X `[tokens, in]` its inputs, U the upper Cholesky factor of the
damped inverse of 2/n X^T X, b bits, g a group of columns of a row that share a scale. Calibration: 64 windows of 512
tokens (the papers' are 128 of 512 to 2,048).
"""

from __future__ import annotations

from typing import Literal

from posttrain.compress.activations.ranges import ChannelRanges
from posttrain.compress.allocate.cptquant import BySensitivity, Rule
from posttrain.compress.allocate.sensitivity import Correlation, Form, Pruning, Score, Target, Taylor, Unit
from posttrain.compress.balanced import SelfBalanced
from posttrain.compress.grids.table import Table
from posttrain.compress.grids.uniform import Uniform, Zero
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.solvers.affinity import AffinityGPTQ
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.q_vlm import JointClipping, Mode
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.solvers.slim import OneBit, SliM
from posttrain.compress.solvers.slim_plus import MixedClipping
from posttrain.methods.registry import method


@method(family="quantization", card="148")
def slim_llm(
    bits: int = 2,
    group: int = 128,
    salience: float = 1.0,
    moved: int | None = None,
    reach: float = 0.1,
    steps: int = 50,
    one_bit: OneBit = "abs",
    damping: float = 0.01,
) -> Compression:
    r"""SliM-LLM: the most salient groups of columns get one bit more, as many others one less, and GPTQ rounds.

    .. math:: D_g = \sum_{i,\,j \in g} \frac{w_{ij}^2}{U_{jj}^2},\qquad
              m^* = \arg\min_m \mathrm{KL}\big(\mathrm{softmax}(X \hat W_m^\top)\ \|\ \mathrm{softmax}(X W^\top)\big)

    The m groups of the largest D_g have b + 1 bits, the m of the smallest b - 1, so the mean stays b; one bit is the
    sign around the mean. The range of a group is searched around its whole one, with errors of salient weights counted
    more. A layer of fewer than four groups has none to move.

    Args:
        bits: b, the mean. group: g, columns that share bits and a scale.
        salience: λ, how often errors of salient weights count in the search of a range.
        moved: m; None searches it in each layer.
        reach: how far ranges are searched around the whole one, as a share of it. steps: of that search, a side.
        one_bit: the scale of groups of one bit, `abs` for the mean of abs(w), `centred` for that around the mean.
        damping: of GPTQ's Hessian.

    Reference: SliM-LLM: salience-driven mixed-precision quantization for large language models, 2024, arXiv 2405.14917
    (card 148).
    """
    solver = SliM(bits, group, damping, moved=moved, salience=salience, reach=reach, steps=steps, one_bit=one_bit)
    return Compression("slim-llm", solver)


@method(family="quantization", card="148")
def slim_llm_plus(
    bits: int = 2, group: int = 128, moved: int | None = None, epochs: int = 20, rate: float = 0.01
) -> Compression:
    r"""SliM-LLM+: SliM-LLM's bits for groups of columns, with their ranges learned block by block.

    .. math:: \min_{\gamma, \beta}\ \big\|F(X; \hat W) - F(X; W)\big\|^2,\qquad
              w_{max}' = \sigma(\gamma)\,w_{max},\quad w_{min}' = \sigma(\beta)\,w_{min}

    F is a block, its float outputs on the float model's inputs and, as OmniQuant's auxiliary loss, on those that the
    compressed blocks before it give.

    Args:
        bits: b, the mean. group: g, columns that share bits and a scale.
        moved: groups moved up and down; None searches it in each layer.
        epochs: passes over the calibration text, a block (the paper: 50). rate: learning rate of γ and β.

    Reference: SliM-LLM: salience-driven mixed-precision quantization for large language models, 2024, arXiv 2405.14917
    (card 148).
    """
    solver = MixedClipping(
        Uniform(bits, group), epochs=epochs, targets=("float", "prefix"), plan=SliM(bits, group, moved=moved), rate=rate
    )
    return Compression("slim-llm-plus", solver)


def _cptquant(score: Score, bits: float, group: int, rule: Rule) -> Compression:
    grid = Uniform(4, group)
    allocation = BySensitivity(score, bits, rule, grid=grid)
    return Compression("cptquant", RoundToNearest(grid), allocation=allocation)


@method(family="quantization", card="137")
def cptquant_cca(bits: float = 4.0, group: int = 128, target: Target = "input", rule: Rule = "budget") -> Compression:
    r"""CPTQuant's CMPQ: more bits to blocks whose addition to the residual stream is no linear function of their input.

    .. math:: \sigma_l = 1 - \overline{\rho}_l,\qquad
              \rho_l = \mathrm{sv}\big(C_{xx}^{-1/2}\,C_{xy}\,C_{yy}^{-1/2}\big),\qquad
              \min_b \sum_l \sigma_l\,\frac{\|W_l - \mathrm{RTN}_{b_l}(W_l)\|^2}{\|W_l\|^2}\ \ \mathrm{s.t.}\ \
              \overline{b} \le B

    x is a block's input, y what it adds, ρ their canonical correlations. Weights are then rounded to nearest.

    Args:
        bits: B, the mean; each block has 2, 3, 4, 6 or 8. group: g, columns that share a scale.
        target: what is correlated: a block's `input` with what it adds, what it adds with what the `next` block adds,
            or with the `final` output (the paper does not say).
        rule: `budget` is the rule above; `tiers` gives thirds of the blocks 8, 6 and 4 bits, whatever B.

    Reference: CPTQuant: a novel mixed precision post-training quantization techniques for large language models, 2024,
    arXiv 2412.03599 (card 137).
    """
    return _cptquant(Correlation(target=target), bits, group, rule)


@method(family="quantization", card="137")
def cptquant_pruning(
    bits: float = 4.0,
    group: int = 128,
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5),
    by: Unit = "block",
    rule: Rule = "budget",
) -> Compression:
    r"""CPTQuant's PMPQ: more bits to layers whose smallest weights the model misses most.

    .. math:: \sigma_l = \max\Big(0,\ \mathrm{mean}_p\ \frac{A(M) - A(M_{l,p})}{|A(M)|}\Big)

    A is the negative perplexity of the calibration text, M_{l,p} the model without the share p of the smallest weights
    of layer l. Bits follow from σ as in `cptquant_cca`.

    Args:
        bits: the mean; each layer has 2, 3, 4, 6 or 8. group: g, columns that share a scale.
        shares: p. by: what is pruned and gets bits together: a `block`, or a `linear` layer.
        rule: as of `cptquant_cca`.

    Reference: CPTQuant: a novel mixed precision post-training quantization techniques for large language models, 2024,
    arXiv 2412.03599 (card 137).
    """
    return _cptquant(Pruning(shares=shares, by=by), bits, group, rule)


@method(family="quantization", card="137")
def cptquant_taylor(
    bits: float = 4.0,
    group: int = 128,
    form: Form = "difference",
    epsilon: float = 1e-2,
    directions: int = 4,
    by: Unit = "block",
    rule: Rule = "budget",
) -> Compression:
    r"""CPTQuant's TDMPQ: more bits to layers whose input moves the loss most.

    .. math:: \sigma_l = \mathbb{E}\,\frac{|\ell(h_l + \delta) - \ell(h_l - \delta)|}{2\|\delta\|}
              \ \to\ \Big\|\frac{\partial \ell}{\partial h_l}\Big\|

    h_l is a layer's input; the limit is that of δ along the gradient. Bits follow from σ as in `cptquant_cca`.

    Args:
        bits: the mean; each layer has 2, 3, 4, 6 or 8. group: g, columns that share a scale.
        form: `difference` takes random δ, `gradient` the limit, in one backward pass.
        epsilon: the length of δ in units of h's. directions: random δ, a batch.
        by: what is perturbed and gets bits together: a `block`, or a `linear` layer.
        rule: as of `cptquant_cca`.

    Reference: CPTQuant: a novel mixed precision post-training quantization techniques for large language models, 2024,
    arXiv 2412.03599 (card 137).
    """
    return _cptquant(Taylor(form=form, epsilon=epsilon, directions=directions, by=by), bits, group, rule)


@method(family="quantization", card="138")
def q_vlm(
    bits: int = 4,
    group: int = 64,
    book: Literal["nf4", "fp4"] = "nf4",
    longest: int = 3,
    ratios: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    mode: Mode = "joint",
) -> Compression:
    r"""Q-VLM: 4-bit weights and activations, whose ranges are searched together for layers that depend on each other.

    .. math:: \min_{c_i, \ldots, c_j} \big\|F_{i..j}(\hat X) - F_{i..j}(X)\big\|,\qquad
              D(k, k+1) = -\sum_t p(\hat x^k_t, \hat x^{k+1}_t)\,\ln p(\hat x^{k+1}_t \mid \hat x^k_t)

    Activations have a static range for each channel, whose ends c narrows. A layer joins the one before it where D, an
    entropy of their inputs over tokens, is at least the mean so far. In models that see, blocks of the vision tower
    have ranges by place of the image, searched among 1, 0.999 and 0.998. All ranges are static: the authors' code takes
    some from the present sequence, in which a token would see later ones. The training of the vision encoder is not
    part of this, since neither the paper's summary nor its code says what is trained. Ranges by channel stand inside
    the sum of a matrix product, so they save memory traffic only where a kernel is made for them.

    Args:
        bits: of activations. group: g, weights that share a scale.
        book: values of the 4-bit weights.
        longest: layers that are searched together, at most; 1 is the plain search layer by layer.
        ratios: c.
        mode: `released` does as the authors' code does: no joint search; entropy says which ranges are narrowed at all.

    Reference: Q-VLM: post-training quantization for large vision-language models, 2024, arXiv 2410.08119 (card 138).
    """
    solver = JointClipping(Table(4, group, book), ratios, longest=longest, mode=mode)
    return Compression("q-vlm", solver, activations=ChannelRanges(bits))


@method(family="quantization", card="149")
def moequant(
    bits: int = 4,
    group: int = 0,
    zero: Zero = "none",
    clip: Literal["none", "mse"] = "mse",
    affinity: bool = True,
    balanced: bool = True,
    temperature: float = 1.2,
    beams: int = 4,
    damping: float = 0.01,
) -> Compression:
    r"""MoEQuant: calibration text that uses all experts alike, on which tokens count as much as the router says.

    .. math:: H_e \propto \sum_t c_e(x_t)\,a_t a_t^\top,\qquad
              \min_{y}\ -\frac{\log P(y)}{|y|} + \frac{\sigma(y)}{\tau}

    The model writes its own calibration text by a beam search that weighs likelihood against the imbalance σ of expert
    usage (σ² is E/(E-1) times the squared deviations of the E experts' shares), as much of it as the text that is
    given; its first tokens are drawn evenly. GPTQ then rounds each expert with tokens weighted by their gate c_e.
    Routers stay float. An expert that no token reaches is calibrated on all tokens of its layer, and a warning names
    it. In a dense model this is GPTQ on the given text. The paper's best figures are of models rotated before (its
    "++"), which is left out here.

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row.
        zero, clip: the grid, as of `rtn`.
        affinity: weigh tokens by c_e (AGQ). balanced: write the calibration text (EBSS); False takes the given one.
        temperature: τ; large is a likelihood beam, small is balance alone. The paper's 1.2 weighs little beside
            likelihoods in a mixture of eight experts, where 0.03 was better (study moequant-more-balance).
        beams: prefixes that a sequence keeps.
        damping: of GPTQ's Hessian.

    Reference: MoEQuant: enhancing quantization for mixture-of-experts large language models via expert-balanced
    sampling and affinity guidance, 2025, arXiv 2505.03804 (card 149).
    """
    grid = Uniform(bits, group, zero, clip)
    solver = (AffinityGPTQ if affinity else GPTQ)(grid, damping=damping)
    written = SelfBalanced(temperature=temperature, beams=beams) if balanced else Calibrated()
    return Compression("moequant", solver, calibration=written)
