"""The critic of actor-critic methods: a linear value head on the policy's hidden states."""

from __future__ import annotations

from torch import Tensor, nn


class ValueHead(nn.Module):
    """Value of the state before each action token: hidden `[M, width]` to `[M]` fp32.

    It starts at zero, so that the first advantages are returns. The hidden states it sees are detached: the critic
    learns from the policy's features without pulling at them (a separate network, as PPO for language models usually
    takes, costs a second model; this costs a vector).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.linear(hidden.detach().float())[:, 0]
        return out
