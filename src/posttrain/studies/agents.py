"""Learning over several turns: which unit the importance ratio has, and what clipping leaves over."""

from __future__ import annotations

from posttrain import methods
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.objective.aggregate import SequenceMean
from posttrain.studies.arms import in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Study
from posttrain.studies.verdict import Better, Lower
from posttrain.training.method import Method
from posttrain.training.stage import Trained

STALE = {"updates": 4, "minibatches": 2, "steps": 50, "learning_rate": 3e-4, "max_tokens": 8}


def clipping(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """Mean share of clipped tokens, and the lowest mean reward of ten steps after the first ten (a collapse shows)."""
    shares = [m["clip_fraction"] for m in result.metrics if "clip_fraction" in m]
    rewards = [m["reward"] for m in result.metrics]
    windows = [sum(rewards[i : i + 10]) / 10 for i in range(10, max(11, len(rewards) - 9))]
    return {"clip_fraction": sum(shares) / max(1, len(shares)), "lowest": min(windows)}


def _arm(method: Method) -> Arm:
    return trained(in_lab(method, **STALE), preset="turns", extra=clipping)


@study(method=("turn-ppo", "s-ppo", "st-ppo"), card="162")
def st_ppo() -> Study:
    """Token ratios do not fit an environment that answers turns; and what is clipped is what is least trusted.

    The lab world `turns` (several turns, reward at the end), PPO with a critic, γ = λ = 1, four passes of two
    minibatches a step, which makes rollouts stale on purpose; 50 steps of 16 prompts x 8 episodes, 3e-4 for all arms.
    Token PPO averages within sequences as the others do. Rule, fixed before the run: Turn-PPO clips a smaller share of
    tokens than PPO, and ST-PPO ends with a higher accuracy than PPO, each with its 95 % interval over five seeds beyond
    0. S-PPO is run beside them.
    """
    ppo = methods.ppo(lam=1.0, kl=0.0).replace(aggregate=SequenceMean())
    return Study(
        claim="Turn-level ratios clip less than token ratios, and ST-PPO is more accurate than PPO on stale rollouts.",
        setting="lab model turns, 50 steps x 16 prompts x 8 episodes, 4 passes of 2 minibatches, 5 seeds.",
        arms={
            "ppo": _arm(ppo),
            "turn-ppo": _arm(methods.turn_ppo()),
            "s-ppo": _arm(methods.s_ppo()),
            "st-ppo": _arm(methods.st_ppo()),
        },
        expectations=(
            Lower("turn-ppo", than="ppo", metric="clip_fraction"),
            Better("st-ppo", than="ppo", metric="accuracy"),
        ),
        seeds=5,
    )
