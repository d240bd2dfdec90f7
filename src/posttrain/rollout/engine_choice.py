"""Which engine decodes a model in this process."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.plain import PlainEngine
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Prompt, Sampling

_TRIED: WeakKeyDictionary[CausalPolicy, bool] = WeakKeyDictionary()  # whether the embedded engine decodes a policy


def engine_for(policy: CausalPolicy, rows: int = 64) -> EmbeddedEngine | PlainEngine:
    """The embedded engine where it gives the model's own log-probabilities (tried on a few tokens), else the plain one.

    rows: completions decoded together at most.
    """
    if policy not in _TRIED:
        _TRIED[policy] = policy.packs and _decodes(EmbeddedEngine(policy))
    return EmbeddedEngine(policy, rows=rows) if _TRIED[policy] else PlainEngine(policy, rows=rows)


@torch.no_grad()
def _decodes(engine: EmbeddedEngine) -> bool:
    """Whether the log-probabilities of decoded tokens are those that training would compute."""
    policy = engine.policy
    prompt = Prompt(torch.arange(3) % policy.head().weight.shape[0])
    try:
        groups = rollout(engine, [prompt], 2, Sampling(max_tokens=4), seed=0)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError):
        return False
    batch = Batch.of(groups)
    expected = policy.log_likelihood(batch).logp.cpu()
    tolerance = 1e-3 if policy.dtype == torch.float32 else 0.25  # nats a token; another computation is whole nats off
    return bool((expected - batch.behaviour_logp_full).abs().mean() <= tolerance)
