"""Quantized state-space models: which of their tensors need more than a static range."""

from __future__ import annotations

from posttrain import methods
from posttrain.compress.method import Compression
from posttrain.studies.compression import compressed
from posttrain.studies.planted import large_scan_outputs
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Study
from posttrain.studies.verdict import AtMost, Lower

PERCENTILE = 0.9995  # the released code's, which this model's few calibration tokens can tell from the largest


@study(method="quamba", card="142")
def quamba() -> Study:
    """Static ranges should do for a Mamba whose scan outputs are rotated and whose scan inputs are cut off.

    Two channels of what each layer's output projection is given, drawn by seed, are fifty times as large (planted: the
    gated output is multiplied when the model runs and the projection's columns are divided; small models do not grow
    such channels). Everything of a layer has one static symmetric step a tensor, weights one a matrix. The arms are
    without anything, with x cut off at its quantile, with the outputs rotated, and with both, at 8 and at 6 bits of
    activations; and both on the model as it is, where the rotation has nothing to spread.

    A step that must hold a channel fifty times as large leaves the others two or three levels; rotated, such a channel
    adds 50/√192 to each. Cutting off at 0.9995 makes the step of x finer by as much as its largest inputs stick out,
    which is worth something where steps are coarse: at 6 bits.

    Rule, fixed before the run: by the divergence from the float model, rotation is below nothing at 8 and 6 bits; both
    are below rotation alone at 6 bits; both are at most 0.02 nats at 8 bits.
    """
    both = methods.quamba(percentile=PERCENTILE)
    six = methods.quamba(activation_bits=6, percentile=PERCENTILE)
    return Study(
        claim="With its scan's output rotated and its input cut off at a high quantile, a Mamba keeps what it knows "
        "under static 8-bit ranges, and rotation does most of it.",
        setting="lab model mixed-mamba (2 layers, 192 channels of 8 states), trained here on pages of text, with two "
        "large channels in each scan's output; 64 pages of calibration; 3 models.",
        arms={
            "static": _planted(methods.quamba(percentile=None, rotate=False)),
            "cut off": _planted(methods.quamba(percentile=PERCENTILE, rotate=False)),
            "rotated": _planted(methods.quamba(percentile=None)),
            "quamba": _planted(both),
            "static, 6 bits": _planted(methods.quamba(activation_bits=6, percentile=None, rotate=False)),
            "rotated, 6 bits": _planted(methods.quamba(activation_bits=6, percentile=None)),
            "quamba, 6 bits": _planted(six),
            "quamba, 8-bit state": _planted(methods.quamba(percentile=PERCENTILE, state_bits=8)),
            "static, nothing planted": _arm(methods.quamba(percentile=None, rotate=False)),
            "quamba, nothing planted": _arm(both),
        },
        expectations=(
            Lower("rotated", than="static", metric="kl", why="a large channel is spread over all"),
            Lower("rotated, 6 bits", than="static, 6 bits", metric="kl", why="as with 8 bits"),
            Lower("quamba, 6 bits", than="rotated, 6 bits", metric="kl", why="the recurrence carries errors of x on"),
            AtMost("quamba", metric="kl", value=0.02, why="the paper's W8A8 is almost without loss"),
        ),
    )


def _arm(method: Compression) -> Arm:
    return compressed(method, model="mixed-mamba", samples=64, problems=40)


def _planted(method: Compression) -> Arm:
    return compressed(method, model="mixed-mamba", samples=64, problems=40, prepare=large_scan_outputs)
