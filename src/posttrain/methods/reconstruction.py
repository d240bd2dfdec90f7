"""Quantization by training: rounding, ranges and steps are learned until a block, or the model, is what it was.

Notation: W `[out, in]` the weight of a linear layer, Ŵ what is stored for it, b bits, g a group of columns of a row
that share a scale s and a zero point z; X the inputs that the float model gives a block, X' those that the compressed
blocks before it give; f the float block and f' the quantized one; σ the logistic function.

The papers train on 128 sequences of 2,048 tokens, 20 epochs and more, on a GPU. The defaults here are what two
processor cores do with a model of 135 million parameters in less than 20 minutes: 64 sequences of 512 tokens, fewer
epochs, higher rates. `epochs`, and the samples and length that a calibration is given, go back to the papers' numbers.
Groups are of 64 columns by default, which also divide matrices that 128 does not.
"""

from __future__ import annotations

from typing import Literal

from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.grids.uniform import Uniform, Zero
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.solvers.abq import ArbitraryBit
from posttrain.compress.solvers.adaround import AdaRound, BlockRounding, Commitment
from posttrain.compress.solvers.cbq import CrossBlock
from posttrain.compress.solvers.l4q import MergedFineTuning, Start
from posttrain.compress.solvers.lsq import LearnedSteps
from posttrain.compress.solvers.omniquant import LearnedClipping
from posttrain.compress.solvers.reconstruct import Target
from posttrain.compress.solvers.sapr import PartialRetraining, Stage
from posttrain.compress.solvers.solver import Solver
from posttrain.compress.transforms.outliers import OutlierScaling
from posttrain.methods.registry import method

Clip = Literal["none", "mse"]


@method(family="quantization", card="000")
def omniquant(
    bits: int = 4,
    group: int = 64,
    symmetric: bool = False,
    augmented: bool = False,
    epochs: int = 5,
    rate: float = 0.05,
    activation_bits: int = 16,
) -> Compression:
    r"""OmniQuant: the ends of each group's range are learned, block after block, so that the outputs stay.

    .. math:: s = \frac{\sigma(\gamma)\max w - \sigma(\beta)\min w}{2^b - 1},\qquad
              z = \mathrm{round}\Big(\frac{-\sigma(\beta)\min w}{s}\Big),\qquad
              \min_{\gamma,\beta}\ \|f(X) - f'(X')\|^2

    This is the paper's learnable weight clipping (LWC). γ and β start at 4 (98 % of the range); the range is not
    extended to hold 0. Where inputs are rounded too, scales of the norms' channels are learned with them: they start as
    SmoothQuant's with α = 0.5. That is a part of the paper's equivalent transformation (LET): shifts, and scales of
    values, queries and keys, are not learned. The paper's rate is 0.01 for 2,560 steps of one sequence; here it is 0.05
    for 80 steps of four.

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row.
        symmetric: levels evenly on both sides of 0.
        augmented: also compare with f(X'), the paper's `aug_loss`, which its 2-bit runs use.
        epochs: passes over the calibration text, each block.
        rate: learning rate of γ and β.
        activation_bits: of each token's inputs, asymmetric; 16 leaves them as they are.

    Reference: OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models, 2023, arXiv 2308.13137
    (card 000).
    """
    targets: tuple[Target, ...] = ("float", "prefix") if augmented else ("float",)
    solver = LearnedClipping(
        Uniform(bits, group), epochs, targets=targets, rate=rate, symmetric=symmetric, scales=activation_bits < 16
    )
    return _compression("omniquant", solver, activation_bits)


@method(family="quantization", card="000")
def adaround(
    bits: int = 4,
    group: int = 64,
    zero: Zero = "integer",
    clip: Clip = "mse",
    steps: int = 200,
    rate: float = 0.1,
    commitment: float = 30.0,
) -> Compression:
    r"""AdaRound: whether each weight is rounded up or down is learned, layer by layer, from the layer's squared error.

    .. math:: \min_V\ \|(W - \hat W(V))X'\|^2 + \lambda\sum\big(1 - |2h(V) - 1|^\beta\big),\qquad
              \hat W = s\big(\mathrm{clip}(\lfloor W/s\rfloor + h(V) + z,\ 0,\ 2^b-1) - z\big)

    with :math:`h(V) = \mathrm{clip}(1.2\,\sigma(V) - 0.1,\ 0,\ 1)`, which starts at the fraction that the floor leaves,
    and β falling from 20 to 2 after a fifth of the steps without the penalty. In the end V ≥ 0 rounds up. The error is
    taken on the inputs as the compressed layers before give them; it is a quadratic form in the weights, so every step
    sees all tokens at once. The paper takes 10,000 steps of 32 images at a rate of 0.001.

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row. zero, clip: the grid, as of `rtn`.
        steps: of Adam, each layer.
        rate: learning rate of V.
        commitment: λ, in units of the error of rounding to nearest, of a mean over the weights.

    Reference: Up or Down? Adaptive Rounding for Post-Training Quantization, 2020, arXiv 2004.10568 (card 000).
    """
    solver = AdaRound(grid=Uniform(bits, group, zero, clip), steps=steps, rate=rate, commitment=Commitment(commitment))
    return _compression("adaround", solver)


@method(family="quantization", card="000")
def brecq(
    bits: int = 4,
    group: int = 64,
    zero: Zero = "integer",
    clip: Clip = "mse",
    fisher: bool = False,
    epochs: int = 5,
    rate: float = 0.1,
    commitment: float = 30.0,
) -> Compression:
    r"""BRECQ: AdaRound's learned rounding, of all layers of a block together, on the block's outputs.

    .. math:: \min_V\ \mathbb E\Big[\sum_i F_i\,\big(f(X) - f'(X')\big)_i^2\Big] + \lambda\sum(1 - |2h(V) - 1|^\beta)

    F is 1, as in the authors' code, or the squared gradient of the language model's loss by each output, as in the
    paper. The paper takes 20,000 steps of 32 images at a rate of 0.001.

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row. zero, clip: the grid, as of `rtn`.
        fisher: weigh outputs by their squared gradients.
        epochs: passes over the calibration text, each block.
        rate: learning rate of V.
        commitment: λ, as of `adaround`.

    Reference: BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction, 2021, arXiv 2102.05426
    (card 000).
    """
    grid = Uniform(bits, group, zero, clip)
    solver = BlockRounding(grid, epochs, rate=rate, commitment=Commitment(commitment), fisher=fisher)
    return _compression("brecq", solver)


@method(family="quantization", card="000")
def lsq(
    bits: int = 4,
    group: int = 64,
    epochs: int = 5,
    step_rate: float = 0.01,
    rate: float = 0.03,
) -> Compression:
    r"""LSQ: the step size of each group is trained with the weights; gradients pass straight through the rounding.

    .. math:: \hat w = s\,\mathrm{round}(\mathrm{clip}(w/s, Q_n, Q_p)),\qquad
              \frac{\partial\hat w}{\partial s} = \begin{cases}\mathrm{round}(w/s) - w/s & \text{inside}\\
              Q_n\text{ or }Q_p & \text{outside}\end{cases}

    The paper trains on the labels of the task; here a block is trained to give the float block's outputs, so that text
    alone is needed. s starts at :math:`2\,\overline{|w|}/\sqrt{Q_p}` and its gradient is divided by
    :math:`\sqrt{n Q_p}`; it is trained as a factor of its first value.

    Args:
        bits: b, at least 2. group: g, columns of a row that share a step; 0 for the whole row.
        epochs: passes over the calibration text, each block.
        step_rate: learning rate of the steps, as shares of their first values.
        rate: of the weights, times their mean size; 0 trains the steps alone.

    Reference: Learned Step Size Quantization, 2019, arXiv 1902.08153 (card 000).
    """
    solver = LearnedSteps(Uniform(bits, group, "none"), epochs, schedule="cosine", step_rate=step_rate, rate=rate)
    return _compression("lsq", solver)


@method(family="quantization", card="147")
def cbq(
    bits: int = 4,
    group: int = 64,
    window: int = 2,
    overlap: int = 1,
    rank: int = 5,
    float_stream: bool = False,
    truncate: bool = True,
    scale: bool = True,
    epochs: int = 2,
    rate: float = 0.05,
    step_rate: float = 0.005,
    commitment: float = 0.0,
    activation_bits: int = 16,
) -> Compression:
    r"""CBQ: overlapping windows of blocks are trained together, their step sizes and a low-rank learned rounding.

    .. math:: \min_{s, A_1, A_2}\ \|h - h'\|^2 + \mathrm{KL}(\mathrm{softmax}\,h\,\|\,\mathrm{softmax}\,h')
              + \gamma\sum\big(1 - |2\Delta - 1|^\beta\big),\qquad
              \hat W = s\big(\mathrm{clip}(\lfloor W/s\rfloor + \Delta + z,\ 0,\ 2^b-1) - z\big)

    h and h' are what a window of float and of quantized blocks gives on the same inputs, those of the compressed model.
    The roundings are :math:`\Delta = h(V_0 + A_1A_2)`, h as of `adaround`, with :math:`V_0` such that they start at the
    fraction of W/s; blocks in two windows go on from where they are. Outliers are found by a coarse split at the
    quartiles and a fine one at the widest gap. Before training, those among the weights are cut off (the float blocks
    keep theirs), and channels of inputs that stick out are scaled down, in the norm or the layer before.

    What the paper leaves open is decided so: the fraction is part of V, and follows the step as it is learned; a
    low-rank V cannot commit each rounding, so training rounds as what will be stored does, with the soft rounding's
    gradient. The paper has 3 epochs, each of 128 sequences of 2,048 tokens; sequences are half as long as those of most
    other methods here, since every block is trained twice.

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row (the paper's).
        window: blocks trained together. overlap: how many of them are trained on in the next window.
        rank: of what is added to the roundings' logits; 0 learns each of them (AdaRound).
        float_stream: also compare with the float model's own outputs.
        truncate: cut outlying weights off. scale: scale outlying channels down.
        epochs: passes over the calibration text, each window.
        rate: learning rate of the roundings. step_rate: of the steps, as shares of their first values.
        commitment: γ, in units of the error of rounding to nearest, of a mean over the weights.
        activation_bits: of each token's inputs, asymmetric; 16 leaves them as they are.

    Reference: CBQ: Cross-Block Quantization for Large Language Models, 2023, arXiv 2312.07950 (card 147).
    """
    solver = CrossBlock(
        Uniform(bits, group, "integer", "mse"),
        epochs,
        targets=("prefix", "float") if float_stream else ("prefix",),
        window=window,
        overlap=overlap,
        rank=rank,
        rate=rate,
        step_rate=step_rate,
        commitment=Commitment(commitment),
        truncate=truncate,
    )
    made = _compression("cbq", solver, activation_bits)
    return made.replace(transforms=(OutlierScaling(),) if scale else (), calibration=Calibrated(length=256))


@method(family="quantization", card="151", name="abq-llm")
def abq_llm(
    bits: int = 2,
    group: int = 64,
    activation_bits: int = 16,
    balance: bool = True,
    epochs: int = 3,
    rate: float = 0.05,
    correction: float = 0.01,
    mse: float = 1.0,
    attention: float = 1.0,
    literal: bool = False,
) -> Compression:
    r"""ABQ-LLM: learned clipping that restores a block's outputs and its attention; five levels at 2 bits.

    .. math:: -\log|\cos(d', d)| - \log|\cos(d', d^*)| + \mathrm{KL}(A'\|A) + \mathrm{KL}(A\|A')
              + \mathrm{mse}(d', d) + \mathrm{mse}(d', d^*)

    d' are the outputs of the quantized block on X', d and d* those of the float block on X and X', A the maps of
    attention, averaged over heads. The ranges are learned as in `omniquant`. At 1 and 2 bits there are :math:`2^b + 1`
    levels, so that weights around 0 have as many on either side: 2.33 bits of storage a weight at 2 bits, three codes
    of five levels in seven bits. In the first three and last four blocks the last layer is rounded as :math:`W +
    ab^\top` with learned a and b.

    Where inputs are rounded too, scales of the norms' channels are learned with the ranges, from SmoothQuant's with α =
    0.5 on.

    Args:
        bits: of a weight, 1 to 8. group: g, columns of a row that share a scale; 0 for the whole row.
        activation_bits: of each token's inputs, asymmetric, 2 to 8; 16 leaves them as they are.
        balance: 2^b + 1 levels at 1 and 2 bits.
        epochs: passes over the calibration text, each block.
        rate: learning rate of the clipping. correction: of a and b; 0 for no correction.
        mse, attention: weights of those terms.
        literal: the attention term as in the authors' code (see `attention_loss`).

    Reference: ABQ-LLM: Arbitrary-Bit Quantized Inference Acceleration for Large Language Models, 2024, arXiv 2408.08554
    (card 151).
    """
    solver = ArbitraryBit(
        Uniform(bits, group),
        epochs,
        rate=rate,
        balance=balance,
        correction=correction,
        mse=mse,
        attention=attention,
        literal=literal,
        scales=activation_bits < 16,
    )
    return _compression("abq-llm", solver, activation_bits)


@method(family="quantization", card="150")
def sapr(
    bits: int = 2,
    group: int = 64,
    rank: int = 16,
    alpha: float = 16.0,
    penalty: float = 0.01,
    saliency: Literal["fisher", "none"] = "fisher",
    stage: Stage = "mixed",
    after: bool = False,
    normalize: bool = True,
    epochs: int = 4,
    rate: float = 1e-2,
    clip_rate: float = 0.05,
) -> Compression:
    r"""SAPR: learned clipping and adapters, block after block, held to the weights where the loss is sensitive to them.

    .. math:: \mathrm{mse}\big(f(X), f'(X')\big) + \mathrm{mse}\big(f(X'), f'(X')\big)
              + \lambda\sum_{ij} F_{ij}\,(Q(W) - W)_{ij}^2,\qquad y = Q(W)x + \tfrac{\alpha}{r}BAx

    F is the sum over the calibration sequences of the squared gradient of the language model's loss, on the float
    model. Without the penalty this is ApiQ. The adapters stay, in half precision, and count: r (in + out) 16 bits a
    matrix. The paper's rank of 64 is half a bit a weight where layers are 4,096 wide; a model 576 wide has the same for
    a rank of 9.

    Args:
        bits: b. group: g, columns of a row that share a scale; 0 for the whole row.
        rank: r. alpha: α. penalty: λ.
        saliency: `fisher`, or `none` for F = 1.
        stage: `mixed`; `weights` trains on the penalty alone, `outputs` without it.
        after: the adapter is part of what the penalty holds to W (the authors' `after_lora`).
        normalize: squared errors and penalty relative to their values at the start, so that λ means the same in every
            block; else as they are, where the authors' λ is 0.001 and F is of order 1e-8.
        epochs: passes over the calibration text, each block.
        rate: learning rate of the adapters. clip_rate: of the clipping. Those of the authors, for 2,560 steps, are
            0.0005 and 0.005.

    Reference: Enhancing Ultra-Low-Bit Quantization of Large Language Models Through Saliency-Aware Partial Retraining,
    2025, arXiv 2504.13932 (card 150).
    """
    solver = PartialRetraining(
        Uniform(bits, group),
        epochs,
        rank=rank,
        alpha=alpha,
        rate=rate,
        clip_rate=clip_rate,
        penalty=penalty,
        saliency=saliency,
        stage=stage,
        after=after,
        normalize=normalize,
    )
    return _compression("sapr", solver)


@method(family="quantization", card="126")
def l4q(
    bits: int = 4,
    group: int = 64,
    rank: int = 4,
    alpha: float = 8.0,
    offset: bool = True,
    start: Start | None = None,
    epochs: int = 3,
    rate: float = 1e-3,
    step_rate: float = 5e-3,
) -> Compression:
    r"""L4Q: fine-tuning with adapters that are merged into the weights before rounding, so that integers remain.

    .. math:: \hat W = s\,q + b,\qquad q = \mathrm{round}\big(\mathrm{clip}\big((W_0 + \tfrac{\alpha}{r}BA - b)/s,\
              Q_n, Q_p\big)\big)

    A, B, s and b are trained together on the loss of the next token of the calibration text, which is therefore what
    the model is fine-tuned to: give `--calibration` the task. The gradient of the adapters passes through the clipping;
    only one layer's gradient of W exists at a time. s is trained as a factor of its first value. With no epochs it is
    RTN on the first levels.

    Args:
        bits: b of a weight, at least 2. group: g, columns of a row that share s and b; 0 for the whole row.
        rank: r; 0 trains s and b alone. alpha: α.
        offset: learn b (a half-precision number a group); else b = 0.
        start: of s and b: `range` from the smallest to the largest weight (where the offset is learned, by default),
            `cover` holds both ends symmetrically (else), `lsq+` three standard deviations. Clipped by nothing, b has no
            gradient, so that an offset which starts at 0 would stay there.
        epochs: passes over the calibration text.
        rate: learning rate of A and B. step_rate: of s and b, as shares of the first s.

    Reference: L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models, 2024, arXiv 2402.04902
    (card 126).
    """
    solver = MergedFineTuning(
        Uniform(bits, group, "float" if offset else "none"),
        rank,
        alpha,
        epochs,
        rate,
        step_rate,
        offset,
        start or ("range" if offset else "cover"),
    )
    return _compression("l4q", solver)


def _compression(name: str, solver: Solver, activation_bits: int = 16) -> Compression:
    """With the inputs of every layer rounded token by token, where that is asked for."""
    activations = None if activation_bits >= 16 else Dynamic(activation_bits, symmetric=False)
    return Compression(name, solver, activations=activations)
