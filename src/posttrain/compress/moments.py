"""What calibration tells of a linear layer's inputs: second moments, ranges, means, and a sample of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.trajectory import PosttrainError


class InputMoments:
    """Running statistics of the `[tokens, in]` inputs of one linear layer, in fp32.

    gram: `[in, in]` sum of X^T X (weighted). absmax, minimum, maximum: `[in]`. abs_sum, square_sum: `[in]`.
    count: tokens seen; weight: sum of their weights (the same unless they were weighted).
    kept: a sample of whole token vectors for searches, `[at most keep, in]`.
    """

    def __init__(self, width: int, *, gram: bool = True, keep: int = 0, seed: int = 0) -> None:
        self.width, self.count, self.weight, self.keep = width, 0, 0.0, keep
        self.gram = torch.zeros(width, width) if gram else None
        self.absmax, self.abs_sum, self.sum = torch.zeros(width), torch.zeros(width), torch.zeros(width)
        self.square_sum = torch.zeros(width)
        self.minimum, self.maximum = torch.full((width,), torch.inf), torch.full((width,), -torch.inf)
        self._kept, self._keys = torch.zeros(0, width), torch.zeros(0)
        self._draw = torch.Generator().manual_seed(seed)

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Count `[..., in]` inputs. weights: `[...]`, how much each token's outer product counts in the Gram matrix."""
        x = inputs.detach().reshape(-1, self.width).float().cpu()
        if not len(x):
            return
        if not torch.isfinite(x).all():
            raise PosttrainError("calibration met inputs that are not finite; check the model and its precision")
        self.count += len(x)
        self.weight += float(weights.sum()) if weights is not None else len(x)
        if self.gram is not None:
            scaled = x if weights is None else x * weights.reshape(-1, 1).float().cpu().sqrt()
            self.gram.addmm_(scaled.T, scaled)
        size = x.abs()
        self.absmax = torch.maximum(self.absmax, size.amax(0))
        self.minimum, self.maximum = torch.minimum(self.minimum, x.amin(0)), torch.maximum(self.maximum, x.amax(0))
        self.abs_sum += size.sum(0)
        self.sum += x.sum(0)
        self.square_sum += x.square().sum(0)
        if self.keep:  # the tokens with the largest of evenly drawn keys are an even sample of all, however they came
            keys = torch.cat([self._keys, torch.rand(len(x), generator=self._draw)])
            best = keys.topk(min(self.keep, len(keys))).indices.sort().values
            self._kept, self._keys = torch.cat([self._kept, x])[best], keys[best]

    @property
    def hessian(self) -> Tensor:
        """`[in, in]`: 2/n X^T X, the second derivative of the layer's squared error by a row of its weights."""
        if self.gram is None:
            raise ValueError("the Gram matrix was not collected")
        return self.gram * (2.0 / max(self.weight, 1e-12))

    @property
    def norm(self) -> Tensor:
        """`[in]`: the length of each input over all tokens."""
        return self.square_sum.sqrt()

    @property
    def mean_abs(self) -> Tensor:
        return self.abs_sum / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        return self.sum / max(self.count, 1)

    @property
    def kept(self) -> Tensor:
        """`[at most keep, in]`: tokens drawn evenly from what was seen."""
        return self._kept
