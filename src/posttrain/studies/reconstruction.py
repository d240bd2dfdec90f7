"""Learned ranges, roundings and steps: does training on a block's outputs do what the papers say, at the same bits.

All arms of a study see the same calibration text as often and store as many bits, but where it says otherwise. The
settings are those at which the methods were tried on a model that is none of the lab's (four blocks of 64, characters
of plays), so that no study was tuned on what it is judged by.
"""

from __future__ import annotations

from posttrain import methods
from posttrain.studies.compression import compressed
from posttrain.studies.registry import study
from posttrain.studies.study import Study
from posttrain.studies.verdict import Lower, Within

BITS, GROUP = 2, 64  # few enough that rounding to nearest loses much
SETTING = "lab model mixed (layers of 128 and 256 columns), 128 pages of calibration; 2 bits, groups of 64; 3 models."


@study(method="omniquant", card="000")
def omniquant() -> Study:
    """Ranges that a block's outputs choose should lose less than those that the weights alone choose.

    With two bits the range of a group decides almost everything. Min-max ranges waste levels on single weights; GPTQ's
    search takes the range that loses least of the weights themselves (errors to the power 2.4); learned clipping sees
    what the block makes of it, and the errors of the blocks before. The paper's baseline at two bits is GPTQ on min-max
    ranges, which keeps those ranges but carries its errors on. All store the same bits.

    Rule, fixed before the run: the divergence from the float model is below that of rounding to nearest with either
    range, and below GPTQ's with min-max ranges.
    """
    return Study(
        claim="At 2 bits learned clipping loses less than min-max ranges, ranges searched on the weights, and GPTQ.",
        setting=SETTING,
        arms={
            "rtn": compressed(methods.rtn(BITS, GROUP)),
            "rtn, searched ranges": compressed(methods.rtn(BITS, GROUP, clip="mse")),
            "gptq": compressed(methods.gptq(BITS, GROUP)),
            "gptq, searched ranges": compressed(methods.gptq(BITS, GROUP, clip="mse")),
            "omniquant": compressed(methods.omniquant(BITS, GROUP)),
            "omniquant, augmented": compressed(methods.omniquant(BITS, GROUP, augmented=True)),
        },
        expectations=(
            Lower("omniquant", than="rtn", metric="kl", why="levels are not wasted on single weights"),
            Lower("omniquant", than="rtn, searched ranges", metric="kl", why="outputs choose better than weights"),
            Lower("omniquant", than="gptq", metric="kl", why="the paper's table at 2 bits"),
        ),
    )


@study(method=("adaround", "brecq"), card="000")
def learned_rounding() -> Study:
    """Roundings learned from a layer's outputs should lose less than the nearest, and from a block's still less.

    AdaRound's claim is the first, BRECQ's the second: errors of layers of one block can make up for each other, and a
    block's output is closer to the loss than a layer's. Ranges are the same in all arms (searched on the weights), so
    only up or down differs. BRECQ with squared gradients as weights is run for comparison.

    Rule, fixed before the run: the divergence from the float model is lower for AdaRound than for rounding to nearest,
    and lower for BRECQ than for AdaRound.
    """
    return Study(
        claim="On the same levels AdaRound loses less than rounding to nearest, and BRECQ less than AdaRound.",
        setting=SETTING,
        arms={
            "rtn": compressed(methods.rtn(BITS, GROUP, clip="mse")),
            "gptq": compressed(methods.gptq(BITS, GROUP, clip="mse")),
            "adaround": compressed(methods.adaround(BITS, GROUP)),
            "brecq": compressed(methods.brecq(BITS, GROUP)),
            "brecq, gradients as weights": compressed(methods.brecq(BITS, GROUP, fisher=True)),
        },
        expectations=(
            Lower("adaround", than="rtn", metric="kl", why="errors of a layer's weights cancel"),
            Lower("brecq", than="adaround", metric="kl", why="errors of a block's layers cancel, too"),
        ),
    )


@study(method="lsq", card="000")
def lsq() -> Study:
    """Steps learned with the weights should lose less than steps alone, and those less than steps that are searched.

    LSQ trains a network's weights and steps on its task; here each block is trained on its own float outputs. Symmetric
    levels in all arms. `steps alone` leaves the weights as they are: what is gained beyond it is the training of
    weights.

    Rule, fixed before the run: the divergence from the float model is lower for LSQ than for its steps alone, and lower
    for the steps alone than for rounding to nearest with searched ranges.
    """
    return Study(
        claim="Steps learned together with the weights lose less than learned steps alone, and these less than "
        "searched ones.",
        setting=SETTING,
        arms={
            "rtn, searched ranges": compressed(methods.rtn(BITS, GROUP, zero="none", clip="mse")),
            "steps alone": compressed(methods.lsq(BITS, GROUP, rate=0.0)),
            "lsq": compressed(methods.lsq(BITS, GROUP)),
        },
        expectations=(
            Lower("lsq", than="steps alone", metric="kl", why="weights move to where rounding does no harm"),
            Lower("steps alone", than="rtn, searched ranges", metric="kl", why="steps follow the block's outputs"),
        ),
    )


@study(method="cbq", card="147")
def cbq() -> Study:
    """Windows of two blocks that overlap by one should lose less than single blocks, and than windows side by side.

    The paper's claim is that blocks trained alone cannot make up for each other's errors. Every block is trained for
    four epochs in all: four alone, four in the one window that holds it, or two in each of the two that overlap in it.
    `full rank` learns every rounding's logit by itself, of which rank 5 should be about as good with far fewer numbers
    (rank 5 is a twenty-fifth of these layers' width; of the paper's layers it is a thousandth).

    Rule, fixed before the run: the divergence from the float model of overlapping windows is below that of single
    blocks, of windows side by side, and of rounding to nearest on the same levels.
    """
    return Study(
        claim="At 2 bits overlapping windows of two blocks lose less than single blocks and than windows side by side.",
        setting=SETTING,
        arms={
            "rtn": compressed(methods.rtn(BITS, GROUP, clip="mse")),
            "single blocks": compressed(methods.cbq(BITS, GROUP, window=1, overlap=0, epochs=4)),
            "single blocks, full rank": compressed(methods.cbq(BITS, GROUP, window=1, overlap=0, epochs=4, rank=0)),
            "side by side": compressed(methods.cbq(BITS, GROUP, overlap=0, epochs=4)),
            "cbq": compressed(methods.cbq(BITS, GROUP, epochs=2)),
            "cbq, full rank": compressed(methods.cbq(BITS, GROUP, epochs=2, rank=0)),
            "all blocks at once": compressed(methods.cbq(BITS, GROUP, window=3, overlap=0, epochs=4)),
        },
        expectations=(
            Lower("cbq", than="single blocks", metric="kl", why="blocks make up for each other's errors"),
            Lower("cbq", than="side by side", metric="kl", why="every border between blocks is inside a window"),
            Lower("cbq", than="rtn", metric="kl", why="it starts there"),
        ),
    )


@study(method="abq-llm", card="151")
def abq_llm() -> Study:
    """Five levels should lose less than four where bits are equal, and the added losses help where inputs are rounded.

    Four levels around 0 have one more on one side. Five take 2.33 bits instead of 2, so the fair comparison gives those
    bits to four levels as smaller groups (32 instead of 64); eight levels show what 3 bits would do. The second claim
    is about 4-bit weights and inputs, where attention and directions suffer: the paper's losses against the squared
    error alone (OmniQuant's, augmented), all else equal.

    Rule, fixed before the run: by the divergence from the float model, five levels below four of the same groups and
    below four in groups of 32; with 4-bit inputs, the paper's losses below the squared error.
    """
    return Study(
        claim="Five balanced levels lose less than four at about equal bits, and losses of direction and attention "
        "less than the squared error at W4A4.",
        setting="lab model mixed, 128 pages of calibration; 2 bits or five levels in groups of 64; W4A4; 3 models.",
        arms={
            "four levels": compressed(methods.abq_llm(2, GROUP, balance=False)),
            "four levels, groups of 32": compressed(methods.abq_llm(2, 32, balance=False)),
            "five levels": compressed(methods.abq_llm(2, GROUP)),
            "eight levels": compressed(methods.abq_llm(3, GROUP)),
            "w4a4, squared error": compressed(methods.omniquant(4, GROUP, augmented=True, activation_bits=4, epochs=3)),
            "w4a4": compressed(methods.abq_llm(4, GROUP, activation_bits=4)),
        },
        expectations=(
            Lower("five levels", than="four levels", metric="kl", why="as many levels on either side of 0"),
            Lower(
                "five levels", than="four levels, groups of 32", metric="kl", why="levels are worth more than scales"
            ),
            Within(
                "five levels", of="four levels, groups of 32", metric="bits", tolerance=0.15, why="about equal bits"
            ),
            Lower("w4a4", than="w4a4, squared error", metric="kl", why="direction and attention are restored"),
        ),
    )


@study(method="sapr", card="150")
def sapr() -> Study:
    """With little text, holding salient weights should lose less than training without, and than holding all alike.

    The penalty is there against fitting the calibration text too well, so there are 32 pages of it instead of 128, and
    what counts is held-out text. Adapters of rank 4 are stored in every arm (about a bit a weight in layers this
    small). `apiq` is the same without the penalty; `all alike` has the penalty with F = 1; `stronger` a tenfold one.

    Rule, fixed before the run: the divergence from the float model is below that of ApiQ, and below that of the penalty
    with F = 1.
    """
    return Study(
        claim="At 2 bits a penalty weighted by the Fisher information loses less than ApiQ and than an unweighted one.",
        setting="lab model mixed, 32 pages of calibration; 2 bits, groups of 64, adapters of rank 4; 3 models.",
        arms={
            "apiq": compressed(methods.sapr(BITS, GROUP, 4, 4.0, penalty=0.0), samples=32),
            "sapr": compressed(methods.sapr(BITS, GROUP, 4, 4.0), samples=32),
            "stronger": compressed(methods.sapr(BITS, GROUP, 4, 4.0, penalty=0.1), samples=32),
            "all alike": compressed(methods.sapr(BITS, GROUP, 4, 4.0, saliency="none"), samples=32),
        },
        expectations=(
            Lower("sapr", than="apiq", metric="kl", why="weights that matter do not follow the little text"),
            Lower("sapr", than="all alike", metric="kl", why="which weights matter is what the gradients know"),
        ),
    )


@study(method="l4q", card="126")
def l4q() -> Study:
    """Adapters merged before rounding should lose less than learned steps alone, and both less than no training.

    The paper fine-tunes to instructions; here the text is the model's own, so that what is measured is how well
    fine-tuning undoes the rounding, against figures of the float model. All arms store a half-precision scale and
    offset a group of 64. `steps alone` trains s and b as long as `l4q` trains them with the adapters. The paper's
    comparison with adapters that are trained first and rounded later is not made.

    Rule, fixed before the run: the divergence from the float model is lower for L4Q than for the steps alone, and lower
    for the steps alone than for rounding to nearest in the same format.
    """
    return Study(
        claim="At 3 bits, fine-tuning with merged adapters loses less than learning steps alone, and that less than "
        "rounding to nearest.",
        setting="lab model mixed, 128 pages of calibration; 3 bits with float offsets, groups of 64; 3 models.",
        arms={
            "rtn": compressed(methods.rtn(3, GROUP, zero="float")),
            "rtn, searched ranges": compressed(methods.rtn(3, GROUP, zero="float", clip="mse")),
            "steps alone": compressed(methods.l4q(3, GROUP, rank=0)),
            "l4q": compressed(methods.l4q(3, GROUP)),
        },
        expectations=(
            Lower("l4q", than="steps alone", metric="kl", why="weights move as well as steps"),
            Lower("steps alone", than="rtn", metric="kl", why="ranges follow the loss"),
        ),
    )
