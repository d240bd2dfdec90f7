"""Second looks at claims about rounded activations, and about how quantized models decode (see
`second_look_compression`, whose rules hold here).
"""

from __future__ import annotations

from posttrain import methods
from posttrain.compress.transforms.reparameterize import Reparameterization
from posttrain.studies.allocation import q_vlm
from posttrain.studies.decoding import PROBLEMS, decoded
from posttrain.studies.reconstruction import abq_llm
from posttrain.studies.registry import study
from posttrain.studies.second_look_compression import again_for
from posttrain.studies.state_space import quamba
from posttrain.studies.study import Study
from posttrain.studies.transforms import os_plus, quarot
from posttrain.studies.verdict import AtMost, Better, Less, Within
from posttrain.studies.vision import dopq_vit, large_norm_channels, quantized

IMAGES = 170  # of 37 tokens: as many tokens as 32 images of 197 have
SAMPLES = 20  # of each problem at each temperature


@study(method="os+", card="145")
def os_plus_again() -> Study:
    """In the study `os-plus` a shift beside the searched scale gained in each of three models, within the noise.

    Ranges that scales follow from were of the first 4,096 tokens then, and are of all tokens now, as those in use are.

    Rule, fixed before the run: by the share of the divergence, both together lose less than the scale alone, and than
    SmoothQuant.
    """
    return again_for(
        os_plus().arms,
        "Shifting and scaling channels loses less than scaling alone, where large channels lie to one side.",
        "As in `os-plus`: one-sided large channels, W8A6, static ranges",
        Less("os+", than="scale alone", metric="kl", why="the shift takes range that a scale cannot"),
        Less("os+", than="smoothquant", metric="kl", why="the paper's comparison"),
    )


@study(method="quarot", card="000")
def quarot_again() -> Study:
    """In the study `quarot` every rotation gained in each of three models, by amounts that differ threefold.

    Rule, fixed before the run: by the share of the divergence, QuaRot and a random rotation lose less than none, and
    QuaRot less than rotating the stream alone.
    """
    return again_for(
        quarot().arms,
        "Rotated, a model with channels that stand out loses less at W4A4.",
        "As in `quarot`: the basis of principal directions, W4A4",
        Less("quarot", than="no rotation", metric="kl", why="no channel stands out any more"),
        Less("random rotation", than="no rotation", metric="kl", why="any rotation spreads large channels"),
        Less("quarot", than="stream alone", metric="kl", why="inputs of down projections stand out too"),
    )


@study(method="q-vlm", card="138")
def q_vlm_again() -> Study:
    """In the study `q-vlm` searched ranges, joined or not, gained little that three models could tell.

    The card was read again: blocks, entropies, ratios and the score are as it says; the paper's models have a vision
    encoder whose part of the method has no place here.

    Rule, fixed before the run: by the share of the divergence, the search layer by layer loses less than whole ranges,
    and Q-VLM less than the search layer by layer and than layers joined at random.
    """
    return again_for(
        q_vlm().arms,
        "Searching the ranges of layers together where entropy is high loses less than layer by layer.",
        "As in `q-vlm`: 4-bit weights and activations",
        Less("layer by layer", than="whole ranges", metric="kl", why="few tokens stretch a channel's range"),
        Less("q-vlm", than="layer by layer", metric="kl", why="errors of one layer reach the next"),
        Less("q-vlm", than="joined at random", metric="kl", why="entropy says where they do"),
    )


@study(method="abq-llm", card="151")
def abq_llm_again() -> Study:
    """In the study `abq-llm` losses of direction and attention could not be told from the squared error at W4A4.

    Rule, fixed before the run: by the share of the divergence, five levels lose less than four of the same groups and
    than four in groups of 32; at W4A4 the paper's losses lose less than the squared error.
    """
    return again_for(
        abq_llm().arms,
        "Five balanced levels lose less than four at about equal bits, and losses of direction and attention "
        "less than the squared error at W4A4.",
        "As in `abq-llm`",
        Less("five levels", than="four levels", metric="kl", why="as many levels on either side of 0"),
        Less("five levels", than="four levels, groups of 32", metric="kl", why="levels are worth more than scales"),
        Less("w4a4", than="w4a4, squared error", metric="kl", why="direction and attention are restored"),
    )


@study(method="quamba", card="142")
def quamba_again() -> Study:
    """In the study `quamba` rotation gained fiftyfold in each of three models, hardly within their noise.

    Rule, fixed before the run: by the share of the divergence, rotation loses less than nothing at 8 and 6 bits, and
    both parts less than rotation alone at 6 bits; both are at most 0.02 nats at 8 bits.
    """
    return again_for(
        quamba().arms,
        "With its scan's output rotated and its input cut off at a high quantile, a Mamba keeps what it knows "
        "under static 8-bit ranges.",
        "As in `quamba`: two large channels in each scan's output",
        Less("rotated", than="static", metric="kl", why="a large channel is spread over all"),
        Less("rotated, 6 bits", than="static, 6 bits", metric="kl", why="as with 8 bits"),
        Less("quamba, 6 bits", than="rotated, 6 bits", metric="kl", why="the recurrence carries errors of x on"),
        AtMost("quamba", metric="kl", value=0.02, why="the paper's W8A8 is almost without loss"),
    )


@study(method="dopq-vit", card="028")
def dopq_vit_again() -> Study:
    """In the study `dopq-vit` the tangent at 4 bits could not be told from powers of √2, nor the median from the mean.

    Rule, fixed before the run: by the share of the divergence, the tangent loses less than powers of √2 at 4 and at 3
    bits, and than even steps at 4; the median loses less than the mean as released.
    """
    return again_for(
        dopq_vit().arms,
        "Levels that a tangent spreads lose less of attention than powers of √2 and even steps; the median of "
        "the channels' scales is better than the mean as released.",
        "As in `dopq-vit`: vision models of the lab",
        Less("tangent, 4 bits", than="log√2, 4 bits", metric="kl", why="large probabilities carry what it says"),
        Less("tangent, 4 bits", than="even, 4 bits", metric="kl", why="most probabilities are small"),
        Less("tangent, 3 bits", than="log√2, 3 bits", metric="kl", why="as with 4 bits"),
        Less("median", than="mean as released", metric="kl", why="the paper's second part, by the zero point"),
    )


@study(method="repquant", card="029")
def repquant_more_images() -> Study:
    """Learned ends and learned rounding with as many tokens of calibration as the paper's 32 images have.

    In the study `repquant` ends that were learned lost more than searched ones. The card was read again: folding and
    ranges are as it says, and how ends are learned is not known of the paper. But 32 images of 37 tokens are a sixth of
    the tokens of 32 images of 197, to which 64 channels of two ends each are fitted, once for each norm. Here there are
    170 images, all of whose tokens the ends are learned from; rounding is learned for as many steps as before.

    Rule, fixed before the run: by the share of the divergence, learned ends lose less than searched ones at W8A4, and
    than whole ranges; learned rounding loses less than the nearest at W4A4.
    """

    def folded(ends: str) -> Reparameterization:
        return Reparameterization(4, ends=ends, tokens=IMAGES * 37)  # type: ignore[arg-type]

    plain = methods.repquant(8, softmax="none", reconstruction="none")
    four = methods.repquant(softmax="none", reconstruction="none").replace(transforms=(folded("learned"),))
    learned = methods.repquant(softmax="none", epochs=8).replace(transforms=(folded("learned"),))
    arms = {
        **{f"{ends} ends": plain.replace(transforms=(folded(ends),)) for ends in ("whole", "percentile", "learned")},
        "W4A4, nearest": four,
        "W4A4, learned": learned,
    }
    return again_for(
        {name: quantized(m, large_norm_channels, calibration=IMAGES) for name, m in arms.items()},
        "With enough calibration, ends learned by the layers behind lose less than searched and whole ones, and "
        "learned rounding less than the nearest.",
        f"As in `repquant`, on {IMAGES} images of calibration",
        Less("learned ends", than="percentile ends", metric="kl", why="ends by what the layers behind lose"),
        Less("learned ends", than="whole ends", metric="kl", why="few values stretch a channel's range"),
        Less("W4A4, learned", than="W4A4, nearest", metric="kl", why="rounding by the block's outputs"),
    )


@study(method=("llm-int8", "nf4", "fp4"), card="136")
def decoding_sensitivity_more_samples() -> Study:
    """Does temperature cost four-bit models more than the float one: with four times the samples, and six models.

    In the study `decoding-sensitivity-of-quantizers` all that was said of distances held, and this could not be told.

    Rule, fixed before the run: the drop of nf4 and fp4 is larger than that of the float model, and that of three bits
    larger too; quality of nf4 and fp4 is within 5 points.
    """
    arms = {
        "float": decoded(None, samples=SAMPLES),
        "nf4": decoded(methods.nf4(double=False), samples=SAMPLES),
        "fp4": decoded(methods.fp4(), samples=SAMPLES),
        "three bits": decoded(methods.rtn(3, 64, zero="none"), samples=SAMPLES),
    }
    return again_for(
        arms,
        "Temperature costs four-bit models more than the float one.",
        f"As in `decoding-sensitivity-of-quantizers`, {PROBLEMS} problems with {SAMPLES} samples at each temperature",
        *(Better(n, than="float", metric="drop", why="the paper's 0.5 to 0.8") for n in ("nf4", "fp4")),
        Better("three bits", than="float", metric="drop", why="what is nearly broken breaks first"),
        Within("nf4", of="fp4", metric="quality", tolerance=0.05, why="the paper's nf4 ≈ fp4"),
    )
