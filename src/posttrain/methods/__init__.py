"""The catalogue: a family a module, a method a documented function that composes parts."""

from posttrain.compress.method import Compression
from posttrain.methods.agents import s_ppo, st_ppo, turn_ppo
from posttrain.methods.allocation import (
    cptquant_cca,
    cptquant_pruning,
    cptquant_taylor,
    moequant,
    q_vlm,
    slim_llm,
    slim_llm_plus,
)
from posttrain.methods.baselines import clip_cov, dppo, gmpo, gpg, grpo_passk, kl_cov, opo, otb, remax
from posttrain.methods.continual import recap, rif_rft
from posttrain.methods.curriculum import curr_reft, dump, modomodo
from posttrain.methods.distillation import kd_rkl, kdrl
from posttrain.methods.exploration import darling, rep_exp
from posttrain.methods.guided import prefix_rft, thinktuning
from posttrain.methods.hybrid import ahpo, chord, chord_phi, hpt, luffy, srft, visurf
from posttrain.methods.importance import minirl, minpro
from posttrain.methods.low_bit import billm, dmmv, fp4, fp8, mxfp4, nf4, nupes, nvfp4, ptq1_61, ptqtp, spqr
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
from posttrain.methods.precision import llm_int8, reduced_precision
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
from posttrain.methods.pretraining import rlp, rmt
from posttrain.methods.quantization import gptq, rtn
from posttrain.methods.reconstruction import abq_llm, adaround, brecq, cbq, l4q, lsq, omniquant, sapr
from posttrain.methods.registry import find, method, registered
from posttrain.methods.reward_shaping import noisy_rewards, rpr, timehc_rl, trust_grpo
from posttrain.methods.risk import riskpo
from posttrain.methods.sampling import reinforce_ada
from posttrain.methods.self_play import eva
from posttrain.methods.self_training import mm_upt, sapo
from posttrain.methods.sparsity import double_sparsity, granet, magnitude, paser, sparsegpt, wanda
from posttrain.methods.state_space import quamba
from posttrain.methods.supervised import asft, dft, raft, sft
from posttrain.methods.transforms import awq, crossquant, os_plus, quarot, smoothquant
from posttrain.methods.vector import decoupleq, vptq
from posttrain.methods.vision import dopq_vit, repquant
from posttrain.methods.zero import expert_iteration, process_grpo, zero_rl
from posttrain.training.method import Method, Pipeline

__all__ = [
    "Compression",
    "Method",
    "Pipeline",
    "abq_llm",
    "adaround",
    "ahpo",
    "apo_down",
    "apo_zero",
    "asft",
    "awq",
    "billm",
    "brecq",
    "cbq",
    "chord",
    "chord_phi",
    "cispo",
    "clip_cov",
    "cptquant_cca",
    "cptquant_pruning",
    "cptquant_taylor",
    "crossquant",
    "curr_reft",
    "dapo",
    "darling",
    "decoupleq",
    "dft",
    "dmmv",
    "dopq_vit",
    "double_sparsity",
    "dpo",
    "dpo_norm",
    "dppo",
    "dr_grpo",
    "dump",
    "eva",
    "expert_iteration",
    "find",
    "fp4",
    "fp8",
    "gdpo",
    "gmpo",
    "gpg",
    "gptq",
    "granet",
    "grpo",
    "grpo_passk",
    "gspo",
    "hinge_dpo",
    "hpt",
    "ipo",
    "kd_rkl",
    "kdrl",
    "kl_cov",
    "kto",
    "l4q",
    "llm_int8",
    "lsq",
    "luffy",
    "magnitude",
    "method",
    "minirl",
    "minpro",
    "mm_upt",
    "modomodo",
    "moequant",
    "mxfp4",
    "nf4",
    "noisy_rewards",
    "nupes",
    "nvfp4",
    "omniquant",
    "opo",
    "orpo",
    "os_plus",
    "otb",
    "paser",
    "ppo",
    "prefix_rft",
    "process_grpo",
    "ptq1_61",
    "ptqtp",
    "q_vlm",
    "quamba",
    "quarot",
    "raft",
    "recap",
    "reduced_precision",
    "registered",
    "reinforce",
    "reinforce_ada",
    "reinforce_plus_plus",
    "remax",
    "rep_exp",
    "repquant",
    "rif_rft",
    "riskpo",
    "rloo",
    "rlp",
    "rmt",
    "robust_dpo",
    "rpr",
    "rtn",
    "s_ppo",
    "sapo",
    "sapr",
    "sft",
    "simpo",
    "slim_llm",
    "slim_llm_plus",
    "smoothquant",
    "sparsegpt",
    "spqr",
    "srft",
    "st_ppo",
    "thinktuning",
    "timehc_rl",
    "trust_grpo",
    "turn_ppo",
    "visurf",
    "vptq",
    "wanda",
    "zero_rl",
]
