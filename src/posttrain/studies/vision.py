"""Quantized vision transformers: ranges of channels folded into norms, and levels for attention probabilities."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from posttrain import methods
from posttrain.compress.activations.percentile import Percentile
from posttrain.compress.activations.probabilities import Logarithm, Tangent
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import compress_model
from posttrain.compress.rounded_attention import RoundedAttention
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.transforms.reparameterize import Reparameterization
from posttrain.studies.planted import plant
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import Lower, Within

MODELS = 3  # seeds of the model; training one takes about a minute, once
IMAGES, HELDOUT = 32, 2000
FRESH = 500_009  # added to seeds of calibration images, which are then none of those that a model was trained on
PLANTED, FACTOR = 4, 20.0  # channels, and how many times as large
MODEL = (
    "vision transformer of the lab (3 layers, 64 wide, 37 tokens), trained here on its images to tell the pattern of "
    "the brighter of two squares; 32 images of calibration, 2,000 held-out ones; 3 models."
)

Prepare = Callable[[Any, int], None]


def quantized(
    method: Compression, prepare: Prepare | None = None, *, models: int = MODELS, calibration: int = IMAGES
) -> Arm:
    """An arm that compresses the vision model of the seed, in fp32, and measures it beside the model as it was.

    The model, its calibration images and what `prepare` does to it follow the seed (`s % models` of the model), so that
    arms of one seed are paired. Figures: `accuracy` on held-out images and `float_accuracy` of the model as it was;
    `kl` (mean nats an image, from its distribution over kinds to the compressed one's), `agreement` (share of images
    that both take for the same), `bits` (stored, of a packed weight), `error` (relative, of a layer's weights),
    `seconds`.

    prepare: a module-level function that changes the float model in place. models: how many seeds of the model.
    calibration: images.
    """
    from posttrain.lab.vision import PATTERNS

    arguments = {
        "method": method, "prepare": prepare, "models": models, "calibration": calibration, "model": PATTERNS.key
    }  # fmt: skip
    return Arm(run_quantized, arguments)


def run_quantized(
    seed: int,
    quick: bool,
    *,
    method: Compression,
    prepare: Prepare | None,
    models: int = MODELS,
    calibration: int = IMAGES,
    model: str = "",
) -> Measured:
    """See `quantized`; `model` is the key of the model in the lab."""
    from posttrain.lab.images import images
    from posttrain.lab.vision import PATTERNS, logits, vision_model

    float_model = vision_model(PATTERNS, 0 if quick else seed % models)
    if prepare is not None:
        prepare(float_model, seed)
    unseen = images(100 if quick else HELDOUT, 0, "heldout")
    batch = {"pixel_values": images(4 if quick else calibration, FRESH + seed).pixels}
    small = copy.deepcopy(float_model)
    done = compress_model(small, method, [batch], seed=seed)
    truth, found = logits(float_model, unseen.pixels).log_softmax(-1), logits(small, unseen.pixels).log_softmax(-1)
    figures = {
        "accuracy": _share(found.argmax(-1) == unseen.labels),
        "float_accuracy": _share(truth.argmax(-1) == unseen.labels),
        "kl": float((truth.exp() * (truth - found)).sum(-1).mean()),
        "agreement": _share(found.argmax(-1) == truth.argmax(-1)),
        "bits": done.bits,
        "error": sum(layer.error for layer in done.layers) / len(done.layers),
        "seconds": done.seconds,
    }
    return Measured(figures, seconds=done.seconds)


def _share(which: torch.Tensor) -> float:
    return float(which.float().mean())


def large_norm_channels(model: Any, seed: int) -> None:
    """Four channels of each norm's output, drawn by seed, twenty times as large; the norms' readers undo it."""
    pixels = torch.zeros(1, model.config.num_channels, model.config.image_size, model.config.image_size)
    plant(model, {"pixel_values": pixels + torch.linspace(0, 1, pixels.shape[-1])}, seed, PLANTED, FACTOR)


@study(method="dopq-vit", card="028")
def dopq_vit() -> Study:
    """A tangent's levels should lose less of attention than powers of √2, of 2, and even steps, at equal bits.

    Weights have 8 bits, a scale a row, and nothing but the attention probabilities is rounded: to 4 and to 3 bits. Even
    steps give the many small probabilities one or two levels, powers give the few large ones levels that are 30 or 50 %
    apart; the tangent is fine at both ends. How much that matters depends on how sharp attention is; this model must
    find one square among 37 patches.

    The second part is the median. With whole zero points a common scale cancels (integers stay what they are, and the
    weights' own scales take the factor up), so that only zero points can tell: the released code's mean is no whole
    number, which moves rounding thresholds; a rounded mean and the median should be alike. W4A4, with the same levels
    of probabilities.

    Rule, fixed before the run: by the divergence from the float model, the tangent is below powers of √2 and below even
    steps, at 4 and at 3 bits; the median is below the mean as released; and the median is within 0.02 nats of the mean
    rounded.
    """
    four, three = 4, 3
    arms: dict[str, Arm] = {}
    for bits in (four, three):
        levels: dict[str, Activations] = {
            "even": Percentile(bits), "log2": Logarithm(bits, root=False), "log√2": Logarithm(bits),
            "tangent, c = 1/2": Tangent(bits, centre=0.5), "tangent": Tangent(bits),
        }  # fmt: skip
        arms |= {f"{name}, {bits} bits": quantized(_probabilities_alone(each)) for name, each in levels.items()}
    plain = methods.dopq_vit()
    released = plain.replace(transforms=(Reparameterization(4, "mean", whole=False),))
    arms |= {
        "mean as released": quantized(released),
        "mean rounded": quantized(methods.dopq_vit(centre="mean")),
        "median": quantized(plain),
    }
    return Study(
        claim="Levels that a tangent spreads lose less of attention than powers of √2 and even steps; the median of "
        "the channels' scales is better than the mean.",
        setting=f"{MODEL} Probabilities alone at 4 and 3 bits; then all of W4A4.",
        arms=arms,
        expectations=(
            Lower("tangent, 4 bits", than="log√2, 4 bits", metric="kl", why="large probabilities carry what it says"),
            Lower("tangent, 4 bits", than="even, 4 bits", metric="kl", why="most probabilities are small"),
            Lower("tangent, 3 bits", than="log√2, 3 bits", metric="kl", why="as with 4 bits"),
            Lower("tangent, 3 bits", than="even, 3 bits", metric="kl", why="as with 4 bits"),
            Lower("median", than="mean as released", metric="kl", why="the paper's second part, by the zero point"),
            Within("median", of="mean rounded", metric="kl", tolerance=0.02, why="a common scale cancels"),
        ),
    )


@study(method="repquant", card="029")
def repquant() -> Study:
    """Where a few channels of a norm are large, one folded range should be as good as a range for every channel.

    Four channels of each norm's output are twenty times as large, drawn by seed, and the norm's readers undo it
    (planted: small models do not grow them). Weights have 8 bits and activations 4 in the first part; attention is left
    as it is, so that the norms' outputs decide. `one range` is the same without reparameterisation; `a range a channel`
    has the ranges that are folded, unfolded, which no integer product could take.

    Folding multiplies weight columns by r1, so that the weights' error is the price; at 8 bits it should not be seen.
    Learned ends differ from searched ones by what the layers behind make of the errors. In the second part weights have
    4 bits too, and their rounding is learned or not.

    Rule, fixed before the run: by the divergence from the float model, folded is below one range, and within 0.02 nats
    of a range a channel; learned ends are below searched ones; learned rounding is below the nearest.
    """
    folded = methods.repquant(8, softmax="none", clip="percentile", reconstruction="none")
    unfolded = folded.replace(transforms=(Reparameterization(4, folded=False),))
    return Study(
        claim="Ranges by channel folded into norms and layers are as good as unfolded and far better than one range; "
        "learned ends and learned rounding are better still.",
        setting=f"{MODEL} Four channels of each norm twenty times as large; W8A4, then W4A4.",
        arms={
            "one range": _outliers(folded.replace(transforms=())),
            "a range a channel": _outliers(unfolded),
            "folded": _outliers(folded),
            "learned ends": _outliers(methods.repquant(8, softmax="none", reconstruction="none")),
            "W4A4, nearest": _outliers(methods.repquant(softmax="none", reconstruction="none")),
            "W4A4, learned": _outliers(methods.repquant(softmax="none", epochs=40)),
        },
        expectations=(
            Lower("folded", than="one range", metric="kl", why="the paper's main point"),
            Within("folded", of="a range a channel", metric="kl", tolerance=0.02, why="the integers are the same"),
            Lower("learned ends", than="folded", metric="kl", why="ends by what the layers behind lose"),
            Lower("W4A4, learned", than="W4A4, nearest", metric="kl", why="rounding by the block's outputs"),
        ),
        notes="The outliers are planted. Reconstruction passes 40 times over the 32 images: 320 steps a block. A pilot "
        "with another calibration draw, after which nothing was changed: learned ends lost 15 % less of the layers' "
        "outputs than searched ones, of unseen images too, and yet more of the model's (0.024 nats and 0.015).",
    )


def _outliers(method: Compression) -> Arm:
    return quantized(method, large_norm_channels)


def _probabilities_alone(levels: Activations) -> Compression:
    """8-bit weights with a scale a row, and nothing else rounded but attention probabilities."""
    return Compression("probabilities", RoundToNearest(Restricted(8, 0)), attention=RoundedAttention(None, levels))
