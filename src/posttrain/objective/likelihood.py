"""What a policy answers when asked for the likelihood of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.logprob import Divergence, Head


@dataclass(slots=True)
class Likelihood:
    """logp: `[M]` fp32 log-probability of each action token (differentiable). Where asked for: entropy `[M]`,
    divergence `[M]` (full-vocabulary, to a reference), hidden `[M, width]` (the state that predicts each token) with
    its head, value `[M]` (a critic's estimate before each token), experts (for each sequence `[inputs, layers, k]`
    int16, those that its tokens were sent to).
    """

    logp: Tensor
    entropy: Tensor | None = None
    divergence: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    value: Tensor | None = None
    experts: list[Tensor] | None = None

    def take(self, index: Tensor) -> Likelihood:
        """The answer for some of the tokens, `[m]` int64."""
        return Likelihood(
            self.logp[index],
            None if self.entropy is None else self.entropy[index],
            None if self.divergence is None else self.divergence[index],
            None if self.hidden is None else self.hidden[index],
            self.head,
            None if self.value is None else self.value[index],
        )


class Policy(Protocol):
    """Anything with a likelihood: the objective asks for no more."""

    def log_likelihood(
        self,
        batch: Batch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        reference: Likelihood | None = None,
        divergence: Divergence = "reverse",
    ) -> Likelihood: ...
