"""A policy that was compressed: made from a float one, which stays as it was; it predicts and samples, and is not
trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.compress import files
from posttrain.compress.calls import Batch
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import Progress, Summary, compress_model
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CompressedPolicy(CausalPolicy):
    """A causal language model whose blocks hold packed layers. compression: what was done to it."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, name: str, compression: Summary) -> None:
        super().__init__(model, tokenizer, name)
        self.compression = compression

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        raise PosttrainError(
            f"{self.name} is compressed ({self.compression.method}, {self.compression.bits:.2f} bits a weight) and "
            f"cannot be trained: packed weights take no gradient; train the float model and compress the result"
        )

    def frozen_copy(self) -> CompressedPolicy:
        return CompressedPolicy(copy.deepcopy(self.model), self.tokenizer, self.name, self.compression)

    def save(self, folder: str | Path) -> Path:
        """Write the folder that `load` reads; it must be new or empty."""
        return files.save(self, folder)


def read(folder: Path, dtype: torch.dtype, device: torch.device, name: str) -> CompressedPolicy:
    """The policy of a folder that `save` wrote; its float parts (embeddings, norms) are computed in `dtype`."""
    model, tokenizer, done = files.load_folder(folder, dtype)
    return CompressedPolicy(model.to(device), tokenizer, name, done)


def check_float(policy: CausalPolicy) -> None:
    """PosttrainError for a policy that is compressed already."""
    if isinstance(policy, CompressedPolicy):
        raise PosttrainError(
            f"{policy.name} is compressed already ({policy.compression.method}); compress the float model instead"
        )


def compressed_copy(
    policy: CausalPolicy,
    method: Compression,
    batches: Sequence[Batch],
    *,
    skip: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> CompressedPolicy:
    """A compressed copy of a policy, on its device; the policy itself stays as it is.

    It is computed on the CPU, in the precision that the policy is in. batches, skip, progress: of `compress_model`.
    """
    check_float(policy)
    model: Any = copy.deepcopy(policy.model)
    if policy.adapted:
        model = model.merge_and_unload()
    model = model.cpu().requires_grad_(False).eval()
    on_cpu = [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    summary = compress_model(model, method, on_cpu, skip=skip, seed=seed, progress=progress)
    return CompressedPolicy(model.to(policy.device), policy.tokenizer, f"{policy.name} {method.name}", summary)
