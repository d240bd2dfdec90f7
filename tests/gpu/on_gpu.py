"""What the tests on a GPU share: where they run, policies there, and how close is close.

They run where torch sees a CUDA device and are skipped elsewhere; `POSTTRAIN_TEST_DEVICE=cpu` runs them on the CPU, to
try the tests themselves.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# cuBLAS reads it when it is first used; without it the order of its sums is not fixed
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # for `several`

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import Prompt

WANTED = os.environ.get("POSTTRAIN_TEST_DEVICE", "cuda")
DEVICE = torch.device(WANTED)
THERE = WANTED != "cuda" or torch.cuda.is_available()
# for `pytestmark` of every module here
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not THERE, reason="needs a GPU: torch.cuda.is_available() is false"),
]
TOKENIZER = make_tokenizer()
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.05,
}  # fmt: skip


def small_policy(dtype: torch.dtype = torch.float32, device: torch.device = DEVICE, **config: Any) -> CausalPolicy:
    """A Llama of about two million parameters, made on the CPU by seed, so that it is the same everywhere."""
    return CausalPolicy(make_model(**{**SMALL, **config}).to(dtype).to(device), TOKENIZER, "small")


def placed(policy: CausalPolicy, device: torch.device = DEVICE) -> CausalPolicy:
    policy.model.to(device)
    return policy


def drawn_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[Prompt]:
    """Prompts of random bytes, no special tokens among them."""
    draw = torch.Generator().manual_seed(seed)
    return [Prompt(torch.randint(3, 259, (n,), generator=draw), key=i) for i, n in enumerate(lengths)]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance of two tensors, wherever they are; of what is all zeros, the distance itself."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).norm() / (b.norm() or 1.0))
