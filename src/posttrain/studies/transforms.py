"""Transforms before rounding: do they do what they are for, on a model with the large channels that they are about."""

from __future__ import annotations

from posttrain import methods
from posttrain.compress.activations.crossquant import KernelOnly
from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.activations.static import Static
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.method import Compression
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.transforms.shift import OutlierSuppression
from posttrain.studies.compression import compressed
from posttrain.studies.planted import large_channels, one_sided_channels, principal_channels
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Study
from posttrain.studies.verdict import AtMost, Lower, Within

BITS, GROUP = 3, 32  # of weights alone; 32 divides the lab model's 128 and 256 columns


@study(method="smoothquant", card="000")
def smoothquant() -> Study:
    """Where a few channels of the activations are large, plain 8 bits are not enough, and SmoothQuant's are.

    The lab model `mixed` has no such channels, so they are planted: four channels of each norm's output, drawn by seed,
    are thirty times as large, and the norm's readers undo it. Weights have 8 bits, a scale a row, in all arms.
    Activations have 8 bits of one static range a layer (O3, the hardest of the paper's settings), or one a token.

    A static step is about 30 x 4 / 127, as large as a usual activation, so plain rounding must lose much; with α = 0.5
    the large channels stand out by the square root of 30 and the step is a fifth of that.

    Rule, fixed before the run: with static ranges the divergence from the float model is below plain rounding's, and at
    most 0.02 nats a token; by the token it is below plain rounding's as well.
    """
    arms = {
        "plain": _outliers(_plain(Static(8))),
        "smoothquant": _outliers(methods.smoothquant(ranges="static")),
        "plain by token": _outliers(_plain(Dynamic(8))),
        "smoothquant by token": _outliers(methods.smoothquant()),
    }
    return Study(
        claim="With 8-bit weights and activations SmoothQuant keeps a model with large channels as it is, where plain "
        "rounding does not.",
        setting="lab model mixed with four channels of each norm thirty times as large; W8A8, static ranges and by the "
        "token; 3 models.",
        arms=arms,
        expectations=(
            Lower("smoothquant", than="plain", metric="kl", why="the step is set by the large channels no more"),
            AtMost("smoothquant", metric="kl", value=0.02, why="the paper's W8A8 is almost without loss"),
            Lower("smoothquant by token", than="plain by token", metric="kl", why="a token's step has the same cause"),
        ),
        notes="The outliers are planted; small models do not grow them. Planted channels meet weights that are as much "
        "smaller, so that a scale of the weights alone (α = 0) would undo them too, which it does not in large models: "
        "this study says nothing about the best α. A pilot with a seed that is not among the study's lowered the bound "
        "from 0.05 to 0.02 nats, and took out an arm with α = 0 for that reason.",
    )


@study(method="awq", card="000")
def awq() -> Study:
    """At 3 bits a weight, AWQ should lose less than rounding to nearest at the same stored bits.

    AWQ is about weights that meet large activations and share a group's step with larger weights. In the lab model
    `mixed` activations hardly differ in size (a pilot on another lab model found the search to gain a tenth of a
    layer's error, too little to see at the end), so four channels of each norm's output are thirty times as large
    (planted, see `smoothquant`). Groups of 32, asymmetric. Arms: round to nearest; the same with GPTQ's search of
    ranges, which looks at weights alone; AWQ's scale without its clipping; AWQ; and the first and last on the model as
    it is, for comparison. Scales are folded away and clipping is in the groups' ranges, so all arms have the same bits.

    Rule, fixed before the run: the divergence from the float model is lower than that of rounding to nearest, for AWQ
    and for its scale alone; and AWQ's is lower than that of the search which looks at weights alone.
    """
    return Study(
        claim="Searched scales of channels and searched clipping lose less than rounding to nearest at equal bits.",
        setting="lab model mixed with four channels of each norm thirty times as large; 3 bits in groups of 32; 3 "
        "models.",
        arms={
            "rtn": _outliers(methods.rtn(BITS, GROUP)),
            "rtn, searched ranges": _outliers(methods.rtn(BITS, GROUP, clip="mse")),
            "scale alone": _outliers(methods.awq(BITS, GROUP, clip=False)),
            "awq": _outliers(methods.awq(BITS, GROUP)),
            "rtn, nothing planted": compressed(methods.rtn(BITS, GROUP)),
            "awq, nothing planted": compressed(methods.awq(BITS, GROUP)),
        },
        expectations=(
            Lower("awq", than="rtn", metric="kl", why="the paper's main result"),
            Lower("scale alone", than="rtn", metric="kl", why="channels matter unequally"),
            Lower("awq", than="rtn, searched ranges", metric="kl", why="activations say which errors matter"),
            Within("awq", of="rtn", metric="bits", tolerance=1e-6, why="nothing is stored beside"),
        ),
        notes="The outliers are planted; small models do not grow them. The setting was chosen after a pilot with a "
        "seed that is not among the study's, on lab model formats without planted outliers, where AWQ's divergence was "
        "0.041 and that of rounding to nearest 0.031: the last two arms are that comparison.",
    )


@study(method="quarot", card="000")
def quarot() -> Study:
    """With 4 bits for weights and activations, a rotated model should lose less than the same without rotation.

    The residual stream of the lab model `mixed` is seen in the basis of its principal directions, in which some
    channels are several times larger than most, and the norms' gains are folded, in all arms (`principal_channels`, the
    same function). Planted gains would be undone by the folding that comes with a rotation, not by the rotation. All
    arms have GPTQ with searched ranges, 4 bits, a scale a row, and activations of 4 bits by the token, clipped at 0.9.

    The ablations are a random rotation in the place of the Hadamard one, which should do about as well in such a small
    model, and rotation of the residual stream alone, whose down projections meet the gated product as it is.

    Rule, fixed before the run: the divergence from the float model is lower than without rotation, and lower than with
    rotation of the stream alone; with a random rotation it lies below that without rotation as well.
    """
    whole = methods.quarot()
    return Study(
        claim="Rotating hidden states makes 4-bit weights and activations lose less, at equal bits.",
        setting="lab model mixed in the basis of its principal directions; W4A4, GPTQ, by row and token; 3 models.",
        arms={
            "no rotation": _principal(whole.replace(transforms=())),
            "stream alone": _principal(whole.replace(transforms=whole.transforms[:1])),
            "random rotation": _principal(methods.quarot(rotation="orthogonal")),
            "quarot": _principal(whole),
        },
        expectations=(
            Lower("quarot", than="no rotation", metric="kl", why="no channel stands out any more"),
            Lower("random rotation", than="no rotation", metric="kl", why="any rotation spreads large channels"),
            Lower("quarot", than="stream alone", metric="kl", why="inputs of down projections stand out too"),
            Within("quarot", of="no rotation", metric="bits", tolerance=1e-6, why="rotations are not stored"),
        ),
        notes="The basis was chosen after a pilot with a seed that is not among the study's.",
    )


@study(method="os+", card="145")
def os_plus() -> Study:
    """One-sided large channels should be handled by a shift and a searched scale better than by SmoothQuant's scale.

    The norms of the lab model `mixed` get a bias, as a layer norm has one, and three channels of each, drawn by seed,
    are made eight times as large and moved twenty away from 0, which the norm's readers undo. Weights have 8 bits and
    activations 6, with one static range a layer, all symmetric.

    A shift alone takes the range from about 20 + 8 x 4 down to 8 x 4; a scale alone must divide those channels by as
    much as they stick out, which makes the weights uneven. Both together leave the least.

    Rule, fixed before the run: the divergence from the float model is lower for both together than for SmoothQuant and
    than for the scale alone; and lower for the shift alone than for plain rounding.
    """
    grid = Restricted(8, 0)
    shift = OutlierSuppression(grid, 6, shift=True, scale=False)
    whole = methods.os_plus(activation_bits=6)
    return Study(
        claim="Shifting channels to their middle and scaling those beyond a searched threshold loses less than scaling "
        "alone, where large channels lie to one side.",
        setting="lab model mixed with norms that have a bias and three one-sided channels each; W8A6, static ranges; 3 "
        "models.",
        arms={
            "plain": _one_sided(_plain(Static(6))),
            "smoothquant": _one_sided(methods.smoothquant(activation_bits=6, ranges="static")),
            "shift alone": _one_sided(whole.replace(transforms=(shift,))),
            "scale alone": _one_sided(methods.os_plus(activation_bits=6, shift=False)),
            "os+": _one_sided(whole),
        },
        expectations=(
            Lower("os+", than="smoothquant", metric="kl", why="the paper's comparison"),
            Lower("os+", than="scale alone", metric="kl", why="the shift takes range that a scale cannot"),
            Lower("shift alone", than="plain", metric="kl", why="half of the range was the distance from 0"),
        ),
        notes="The outliers are planted; small models do not grow them.",
    )


@study(method="crossquant", card="140")
def crossquant() -> Study:
    """Where a few channels are large, steps per token round most of the rest to zero, and CrossQuant's do not.

    Four channels of each norm's output of the lab model `mixed` are thirty times as large (planted, see `smoothquant`).
    Weights have 8 bits, activations 6. Steps: per token; CrossQuant with α = 0.15 and 0.5; and, to see what the zeros
    alone do, activations left as they are but for those that a step per token would make 0.

    c is calibrated, as it must be for single tokens; unseen inputs beyond it are cut off.

    Rule, fixed before the run: CrossQuant's divergence from the float model is below that per token, for both α; and
    zeroing alone loses more than CrossQuant does in all (the paper's argument that the zeros are what hurts).
    """
    return Study(
        claim="Steps from the largest of token and channel together lose less than steps per token, because fewer "
        "activations become zero.",
        setting="lab model mixed with four channels of each norm thirty times as large; W8A6; 3 models.",
        arms={
            "per token": _outliers(_plain(Dynamic(6))),
            "crossquant": _outliers(methods.crossquant(activation_bits=6)),
            "alpha 0.5": _outliers(methods.crossquant(activation_bits=6, alpha=0.5)),
            "folded": _outliers(methods.crossquant(activation_bits=6, folded=True)),
            "zeros alone": _outliers(_plain(KernelOnly(6))),
        },
        expectations=(
            Lower("crossquant", than="per token", metric="kl", why="the paper's main result"),
            Lower("alpha 0.5", than="per token", metric="kl", why="half of the channel's part helps already"),
            Lower("crossquant", than="zeros alone", metric="kl", why="the zeros are most of the loss"),
        ),
        notes="The outliers are planted; small models do not grow them. `folded` is what an integer product would "
        "compute: the channels' part goes into the weights before they are rounded.",
    )


def _outliers(method: Compression) -> Arm:
    return compressed(method, prepare=large_channels)


def _principal(method: Compression) -> Arm:
    return compressed(method, prepare=principal_channels)


def _one_sided(method: Compression) -> Arm:
    return compressed(method, prepare=one_sided_channels)


def _plain(activations: Static | Dynamic | KernelOnly) -> Compression:
    """Round to nearest: 8-bit weights with a scale a row, and activations as given."""
    return Compression("rtn", RoundToNearest(Restricted(8, 0)), activations=activations)
