"""Two bits a weight: vectors by index, and codes and floats found in turns."""

from __future__ import annotations

from posttrain import methods
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.vptq import VPTQ
from posttrain.studies.compression import compressed
from posttrain.studies.registry import study
from posttrain.studies.study import Study
from posttrain.studies.verdict import Lower, Within

MODEL = "lab model mixed (layers of 128 and 256 columns), 128 pages of calibration; 3 models."


@study(method="vptq", card="139")
def vptq() -> Study:
    """At two bits, vectors by index should lose less than single weights on even levels, for each of its three reasons.

    The tables count: in layers of 128 x 128 they allow vectors of two weights within a tenth of a bit, three in the
    larger ones, so this asks much less of vectors than the paper's six weights do. The baseline, GPTQ with two bits a
    row and searched ranges, stores 2.1 bits too. Ablations: no compensation (weighted k-means and the nearest
    centroid), vectors of one weight (the same loop on a table of four values), and indices without the tables' last
    fit. A table shared by all rows has no scale a row, as GPTQ has; that the codes of one row cannot be narrow is part
    of what is compared.

    Rule, fixed before the run: by the divergence from the float model, VPTQ below GPTQ, below itself without
    compensation and with vectors of one weight; not above itself without the last fit; equal bits within 0.1.
    """
    alone = Compression("weighted k-means", VPTQ(2, damping=1e6, refit=0))
    return Study(
        claim="At two bits VPTQ loses less than GPTQ, and its vectors and its compensation are both needed for that.",
        setting=MODEL,
        arms={
            "gptq": compressed(methods.gptq(2, 0, clip="mse", act_order=True)),
            "k-means alone": compressed(alone),
            "single weights": compressed(methods.vptq(2, vector=1)),
            "without the last fit": compressed(methods.vptq(2, refit=0)),
            "vptq": compressed(methods.vptq(2)),
        },
        expectations=(
            Lower("vptq", than="gptq", metric="kl", why="vectors fill space better, and follow the weights"),
            Lower("vptq", than="k-means alone", metric="kl", why="later columns make up for errors"),
            Lower("vptq", than="single weights", metric="kl", why="a vector's index says more at equal bits"),
            Lower("vptq", than="without the last fit", metric="kl", why="centroids fit what is left to fit"),
            Within("vptq", of="gptq", metric="bits", tolerance=0.1, why="equal bits"),
            Within("vptq", of="single weights", metric="bits", tolerance=0.15, why="equal bits"),
        ),
    )


@study(method="decoupleq", card="022")
def decoupleq() -> Study:
    """Codes and floats found in turns should lose less than GPTQ's one pass, most at two bits.

    All arms have two (or four) bits with a float zero in groups of 64, and so equal bits. GPTQ is run with whole and
    with searched ranges, both by falling diagonal. The paper trains a block's floats in 512 steps of 1e-5; there are
    128 here, so the rate is ten times that.

    Rule, fixed before the run: by the divergence from the float model, decoupleQ below both kinds of GPTQ and these
    below rounding at two bits; its blocks' training lowers it further; below GPTQ with whole ranges at four bits too.
    """
    rate = 1e-4

    def gptq(bits: int, clip: str) -> Compression:
        grid = Uniform(bits, 64, "float", clip)  # type: ignore[arg-type]
        return Compression(f"gptq, {clip}", GPTQ(grid, act_order=True))

    return Study(
        claim="At two bits decoupleQ loses less than GPTQ, and training a block's floats lowers that again.",
        setting=MODEL,
        arms={
            "rtn": compressed(methods.rtn(2, 64, zero="float")),
            "gptq": compressed(gptq(2, "none")),
            "gptq, searched": compressed(gptq(2, "mse")),
            "decoupleq, one pass": compressed(methods.decoupleq(2, 64, rounds=1, epochs=0)),
            "decoupleq, untrained": compressed(methods.decoupleq(2, 64, epochs=0)),
            "decoupleq": compressed(methods.decoupleq(2, 64, rate=rate)),
            "gptq, 4 bits": compressed(gptq(4, "none")),
            "decoupleq, 4 bits": compressed(methods.decoupleq(4, 64, rate=rate)),
        },
        expectations=(
            Lower("decoupleq", than="gptq", metric="kl", why="floats follow the codes, codes the floats"),
            Lower("decoupleq", than="gptq, searched", metric="kl", why="more than a search of the range gives"),
            Lower("gptq", than="rtn", metric="kl", why="errors are made up for"),
            Lower("decoupleq, untrained", than="decoupleq, one pass", metric="kl", why="a round only lowers errors"),
            Lower("decoupleq", than="decoupleq, untrained", metric="kl", why="the block's outputs are what counts"),
            Lower("decoupleq, 4 bits", than="gptq, 4 bits", metric="kl", why="less is left to gain, but some"),
            Within("decoupleq", of="gptq", metric="bits", tolerance=0.01, why="equal bits"),
        ),
    )
