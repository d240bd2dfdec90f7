r"""How far a model's next-token distributions are from another's, as they are drawn from with some sampling.

At temperature T, for tokens of a given text (card 136):

.. math:: D(T) = \mathrm{mean}_t\,\mathrm{KL}(\mathrm{softmax}(z_t/T)\,\|\,\mathrm{softmax}(\hat z_t/T)),\qquad
          V(T) = \mathrm{mean}_t\,\tfrac12\sum_v |p_{tv} - \hat p_{tv}|

V, the total variation, is the share of tokens that cannot be drawn alike, whatever random numbers both are given; at
temperature 0 it is the share of tokens whose likeliest one is another. Truncated distributions have different supports,
so that D is infinite for most of them and V is what tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.evaluation.perplexity import batches
from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.objective.batch import Batch
from posttrain.rollout.engine import Progress
from posttrain.rollout.sampling import probabilities
from posttrain.trajectory import Group, PosttrainError, Sampling

ELEMENTS = 1 << 22  # of logits held at a time


@dataclass(frozen=True, slots=True)
class Shift:
    """Means over the tokens of a text. kl: D, nats. variation: V. entropy: of the model less that of the reference,
    nats. flips: share of tokens whose likeliest one is another, which no sampling changes.
    """

    kl: float
    variation: float
    entropy: float
    flips: float


@torch.no_grad()
def shifts(
    policy: CausalPolicy,
    reference: CausalPolicy,
    groups: Sequence[Group],
    samplings: Sequence[Sampling],
    progress: Progress | None = None,
) -> list[Shift]:
    """A model beside its reference at every action token of some text, drawn from in several ways; one `Shift` each.

    Raises PosttrainError where the two have different vocabularies.
    """
    vocabulary = common_vocabulary(policy, reference)
    sums, count = torch.zeros(len(samplings), 4, dtype=torch.float64), 0
    done, total = 0, sum(len(group) for group in groups)
    with evaluating(policy.model), evaluating(reference.model):
        for part in batches(groups):
            batch = Batch.of(part)
            mine, theirs = policy.hidden_states(batch), reference.hidden_states(batch)
            for rows in torch.arange(len(mine)).split(max(1, ELEMENTS // vocabulary)):
                span = slice(int(rows[0]), int(rows[-1]) + 1)
                logits, known = policy.head().logits(mine[span]), reference.head().logits(theirs[span])
                for place, sampling in enumerate(samplings):
                    sums[place] += torch.stack([f.double().sum() for f in distances(logits, known, sampling)]).cpu()
            count += len(mine)
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return [Shift(*row) for row in (sums / count).tolist()]


def common_vocabulary(policy: CausalPolicy, reference: CausalPolicy) -> int:
    """How many tokens both know. Raises PosttrainError where they know different numbers of them."""
    mine, theirs = (p.head().weight.shape[0] for p in (policy, reference))
    if mine != theirs:
        raise PosttrainError(
            f"{policy.name} and {reference.name} have vocabularies of {mine} and {theirs} tokens; expected the same one"
        )
    return mine


def distances(logits: Tensor, reference: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, total variation, difference of entropies, and flips, `[rows]` each, of `[rows, vocab]` logits."""
    q, p = probabilities(logits, sampling), probabilities(reference, sampling)
    if sampling.temperature > 0 and not sampling.truncated:
        # in logarithms: at low temperatures what is unlikely has no probability left in fp32
        log_q, log_p = ((z / sampling.temperature).log_softmax(-1) for z in (logits, reference))
        kl = (p * (log_p - log_q)).sum(-1)
    else:
        kl = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
    entropy = torch.special.entr(q).sum(-1) - torch.special.entr(p).sum(-1)
    flips = logits.argmax(-1) != reference.argmax(-1)
    return kl, (p - q).abs().sum(-1) / 2, entropy, flips
