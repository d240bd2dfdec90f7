"""Weights left out: does what each method looks at keep more of the model at the same sparsity."""

from __future__ import annotations

from posttrain import methods
from posttrain.studies.compression import compressed
from posttrain.studies.registry import study
from posttrain.studies.study import Study
from posttrain.studies.verdict import Lower, Within

MODEL = "lab model mixed (layers of 128 and 256 columns), 128 pages of calibration; 3 models."


@study(method=("magnitude", "wanda", "sparsegpt"), card="000")
def one_shot_pruning() -> Study:
    """At equal sparsity, looking at inputs should lose less than not looking, and making up for what goes less again.

    Half of the weights go, anywhere and 2:4. Wanda's claim is against magnitude, SparseGPT's against both. The pattern
    leaves less choice, so each method should lose more with it. Wanda's ablation compares weights with those of their
    layer; magnitude in each row tells how much of Wanda's gain is the comparison alone. A model this small has few
    weights to spare, so that half of them cost more than in the papers'; the order is what is claimed.

    Rule, fixed before the run: by the divergence from the float model, Wanda below magnitude (of the layer and of each
    row) and SparseGPT below Wanda, both without a pattern and with 2:4; Wanda without a pattern below Wanda with it.
    """
    return Study(
        claim="At equal sparsity SparseGPT loses less than Wanda, and Wanda less than magnitude.",
        setting=MODEL,
        arms={
            "magnitude": compressed(methods.magnitude()),
            "magnitude, rows": compressed(methods.magnitude(across="row")),
            "wanda, layer": compressed(methods.wanda(across="layer")),
            "wanda": compressed(methods.wanda()),
            "sparsegpt": compressed(methods.sparsegpt()),
            "magnitude, 2:4": compressed(methods.magnitude(pattern="2:4")),
            "wanda, 2:4": compressed(methods.wanda(pattern="2:4")),
            "sparsegpt, 2:4": compressed(methods.sparsegpt(pattern="2:4")),
        },
        expectations=(
            Lower("wanda", than="magnitude", metric="kl", why="a weight matters as much as its input is large"),
            Lower("wanda", than="magnitude, rows", metric="kl", why="and not for the comparison in rows alone"),
            Lower("sparsegpt", than="wanda", metric="kl", why="what stays makes up for what goes"),
            Lower("wanda, 2:4", than="magnitude, 2:4", metric="kl", why="as without a pattern"),
            Lower("sparsegpt, 2:4", than="wanda, 2:4", metric="kl", why="as without a pattern"),
            Lower("wanda", than="wanda, 2:4", metric="kl", why="a pattern leaves less choice"),
            Within("sparsegpt", of="magnitude", metric="bits", tolerance=0.01, why="equal sparsity"),
        ),
    )
