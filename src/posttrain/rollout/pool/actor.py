"""What runs in a rollout worker of the cluster: the policy, an engine, whole episodes with their environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine import Engine, keep_experts
from posttrain.rollout.environment import Environment
from posttrain.rollout.rollout import play
from posttrain.trajectory import Completion, Prompt, Sampling, Trajectory

MakeEngine = Callable[[CausalPolicy, int], Engine]  # from the policy and how many completions are decoded together


class RolloutWorker:
    """Draws from a copy of the policy. Each call says which weights it is to have.

    rows: completions decoded together at most. experts: record which experts tokens are sent to. threads: of torch.
    """

    def __init__(self, policy: CausalPolicy, make_engine: MakeEngine, rows: int, experts: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        if torch.cuda.is_available():  # the cluster gave this worker a GPU
            policy.model.to("cuda")
        policy.model.eval()
        self.policy, self.version = policy, -1
        self.engine = make_engine(policy, rows)
        if experts:
            keep_experts(self.engine, "the pool of rollout workers")

    def ready(self) -> int:
        """The number of the process."""
        return os.getpid()

    def play(
        self,
        version: int,
        weights: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        environment: Environment | None,
    ) -> list[list[Trajectory]]:
        """Whole episodes; see `rollout`."""
        self._hold(version, weights)
        groups = play(self.engine, prompts, samples, sampling, seed, environment)
        return [group.trajectories for group in groups]

    def generate(
        self,
        version: int,
        weights: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        self._hold(version, weights)
        return self.engine.generate(prompts, samples, sampling, seed)

    def _hold(self, version: int, weights: NDArray[np.uint8]) -> None:
        """Have the weights of that version, older ones too: work of a worker that died may be of an earlier step."""
        if version != self.version:
            unpack(self.policy, weights)
            self.version = version


def pack(policy: CausalPolicy) -> NDArray[np.uint8]:
    """All that training changes, as the bytes of a safetensors file: parameters that are trained, and buffers."""
    return np.frombuffer(
        save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in _changing(policy).items()}), np.uint8
    )


@torch.no_grad()
def unpack(policy: CausalPolicy, packed: NDArray[np.uint8]) -> None:
    """Take over what `pack` made of a policy of the same shape."""
    own: dict[str, Any] = dict(policy.model.named_parameters()) | dict(policy.model.named_buffers())
    for name, tensor in load(packed.tobytes()).items():
        own[name].copy_(tensor)


def _changing(policy: CausalPolicy) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(policy.trainable_parameters())
    return found | dict(policy.model.named_buffers())
