"""The catalogue: a family a module, a method a documented function that composes parts."""

from posttrain.methods.policy_gradient import (
    cispo,
    dapo,
    dr_grpo,
    gdpo,
    grpo,
    gspo,
    ppo,
    reinforce,
    reinforce_plus_plus,
    rloo,
)
from posttrain.methods.preference import (
    apo_down,
    apo_zero,
    dpo,
    dpo_norm,
    hinge_dpo,
    ipo,
    kto,
    orpo,
    robust_dpo,
    simpo,
)
from posttrain.methods.registry import find, method, registered
from posttrain.methods.supervised import dft, sft
from posttrain.training.method import Method, Pipeline

__all__ = [
    "Method",
    "Pipeline",
    "apo_down",
    "apo_zero",
    "cispo",
    "dapo",
    "dft",
    "dpo",
    "dpo_norm",
    "dr_grpo",
    "find",
    "gdpo",
    "grpo",
    "gspo",
    "hinge_dpo",
    "ipo",
    "kto",
    "method",
    "orpo",
    "ppo",
    "registered",
    "reinforce",
    "reinforce_plus_plus",
    "rloo",
    "robust_dpo",
    "sft",
    "simpo",
]
