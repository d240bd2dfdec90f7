r"""How sharp the loss is in the logits: by how much it can rise if each logit moves by a small share of itself.

.. math:: S_\epsilon = 100\,\frac{\max_{\delta \in C} f(z + \delta) - f(z)}{1 + f(z)},\qquad
          C = \{\delta : |\delta_i| \le \epsilon\,(|z_i| + 1)\}

f is the cross-entropy of a token y under softmax(z). Its derivative by a logit, :math:`p_i - 1[i = y]`, never changes
its sign, so that the maximum is at the corner of C where the token's own logit falls and all others rise: no search.
It costs one forward pass, and tells confidence and the size of logits as well as the loss's shape: compare it at
about equal losses.

Reference: To FP8 and Back Again, 2024, arXiv 2405.18710 (card 157); Keskar et al., 2016, arXiv 1609.04836.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.evaluation.perplexity import batches
from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, PosttrainError

EPSILON = 5e-4


def logit_sharpness(logits: Tensor, target: Tensor, epsilon: float = EPSILON) -> Tensor:
    """`[...]` fp64 sharpness of each token, from `[..., vocabulary]` logits and `[...]` int64 targets.

    Raises PosttrainError for a negative epsilon.
    """
    if not epsilon >= 0:
        raise PosttrainError(f"sharpness: epsilon is {epsilon}; expected 0 or more")
    z = logits.double()
    own = target[..., None]
    reach = epsilon * (z.abs() + 1)
    moved = (z + reach).scatter(-1, own, (z - reach).gather(-1, own))
    before, after = _loss(z, own), _loss(moved, own)
    return 100 * (after - before) / (1 + before)


def _loss(logits: Tensor, own: Tensor) -> Tensor:
    return torch.logsumexp(logits, -1) - logits.gather(-1, own)[..., 0]


@torch.no_grad()
def sharpness(policy: CausalPolicy, groups: Sequence[Group], epsilon: float = EPSILON) -> float:
    """The sharpness at the last action token of each sequence, mean over sequences."""
    found: list[Tensor] = []
    with evaluating(policy.model):
        for part in batches(groups):
            batch = Batch.of(part)
            last = batch.lengths.cumsum(0) - 1
            hidden = policy.hidden_states(batch)
            logits = policy.head().logits(hidden[last.to(hidden.device)])
            found.append(logit_sharpness(logits, batch.target[last].to(logits.device), epsilon).cpu())
    return float(torch.cat(found).mean())
