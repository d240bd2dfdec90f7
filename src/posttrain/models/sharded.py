"""A policy whose weights are spread over the processes: FSDP2 (`fully_shard`), without a change to the policy itself.

The policy that everybody knows stays a plain model; a *twin* of it, of the same kind of modules, holds the weights in
pieces and is what computes log-probabilities and gradients. Each block of the twin is gathered when it is computed and
let go after it; gradients are summed over the processes and spread again. Trained weights are fp32 in the pieces (they
are the optimizer's master weights) and computed in the policy's own precision. The plain model has its weights only
inside `Sharded.whole()`, for rollouts and evaluations, and again at the end. Adapters are small: they stay whole in
every process, and only the model below them is spread.

Reference: PyTorch FSDP: experiences on scaling fully sharded data parallel, 2023, arXiv 2304.11277; `fully_shard` of
PyTorch 2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.trajectory import PosttrainError


def is_piece(tensor: Tensor) -> bool:
    """Whether a parameter (or its gradient) is this process's piece of one that is spread."""
    return hasattr(tensor, "to_local")


def piece(tensor: Any) -> Tensor:
    """This process's rows of a tensor that is spread, sharing its memory; any other tensor itself."""
    found: Tensor = tensor.detach().to_local() if is_piece(tensor) else tensor
    return found


def parameters_of(policy: CausalPolicy) -> dict[str, nn.Parameter]:
    """All parameters by name; the pieces of those that are spread, also where the model has them whole for a moment."""
    return policy.pieces if isinstance(policy, ShardedPolicy) else dict(policy.model.named_parameters())


class Sharded:
    """policy: the plain one; it has no weights outside of `whole`. twin: the one that computes."""

    def __init__(self, policy: CausalPolicy) -> None:
        self.policy, self.twin = policy, ShardedPolicy(policy)
        theirs = self.twin.pieces
        self._pairs = [(p, theirs[name]) for name, p in policy.model.named_parameters() if is_piece(theirs[name])]
        self._let_go()

    @contextmanager
    def whole(self) -> Iterator[CausalPolicy]:
        """The plain policy with the present weights, in every process; a model must fit into one for that."""
        self.gather()
        try:
            yield self.policy
        finally:
            self._let_go()

    @torch.no_grad()
    def gather(self) -> None:
        """Give the plain policy the present weights for good."""
        for plain, spread in self._pairs:
            plain.data = spread.detach().to(plain.dtype).full_tensor()  # type: ignore[attr-defined]

    def _let_go(self) -> None:
        for plain, _ in self._pairs:
            plain.data = torch.empty(0, dtype=plain.dtype, device=plain.device)


class ShardedPolicy(CausalPolicy):
    """The twin of a plain policy, its weights spread over all processes. It answers for log-likelihoods and hidden
    states; all processes must ask equally often. The plain policy's weights are not touched.
    """

    def __init__(self, plain: CausalPolicy) -> None:
        packs = plain.packs  # tried with the plain model's own forward pass, as long as its weights are there
        tensors = chain(plain.model.parameters(), plain.model.buffers())
        model = copy.deepcopy(plain.model, {id(t): t for t in tensors})  # other modules, the same tensors
        super().__init__(model, plain.tokenizer, plain.name)
        self._packs = packs
        self._root: Any = _Root(model)
        _spread(self._root, self.base, plain)
        self.pieces: dict[str, nn.Parameter] = dict(model.named_parameters())

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.pieces.items() if p.requires_grad]

    def log_likelihood(self, batch: Batch, **options: Any) -> Likelihood:
        found: list[Likelihood] = []

        def compute() -> tuple[Tensor | None, ...]:
            answer = super(ShardedPolicy, self).log_likelihood(batch, **options)
            found.append(answer)
            return answer.logp, answer.entropy, answer.divergence, answer.hidden

        self._inside(compute)
        return found[0]

    def hidden_states(self, batch: Batch) -> Tensor:
        found: Tensor = self._inside(lambda: super(ShardedPolicy, self).hidden_states(batch))
        return found

    def _inside(self, compute: Callable[[], Any]) -> Any:
        """What is computed where the embeddings and the vocabulary projection are whole; they stay so until the next
        call, or the backward pass, since an answer speaks of the projection."""
        self._root.reshard()  # what is whole from an earlier call may be older than the pieces
        return self._root(compute)


class _Root(nn.Module):
    """Holds what is in no block, and gathers it for whatever is computed inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


def _spread(root: nn.Module, base: Any, plain: CausalPolicy) -> None:
    """Spread the blocks of a model one by one, and then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from posttrain.processes import here

    adapters = {p for p in root.parameters() if p.requires_grad} if plain.adapted else set()
    spread = [p for p in root.parameters() if p not in adapters]
    dtypes = {p.dtype for p in spread}
    if len(dtypes) > 1:
        raise PosttrainError(
            f"{plain.name} has weights in {', '.join(sorted(map(str, dtypes)))}, which cannot be spread together; load "
            f"it with precision bf16 or fp32, or train without shard"
        )
    low = dtypes != {torch.float32}
    policy = MixedPrecisionPolicy(param_dtype=dtypes.pop() if low else None, reduce_dtype=torch.float32)
    mesh = init_device_mesh(plain.device.type, (here().world,))
    single: dict[int, nn.Parameter] = {}
    for unit in [*_blocks(base), root]:
        if low:
            _in_single_precision(unit, adapters, single)
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=adapters)
        made: Any = unit
        # gradients of all processes are added: what a loss divides by is counted over all of them
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
        # an expert that no token of this process went to has no gradient here and may have one elsewhere
        made.set_reduce_scatter_unused_params(True)


def _blocks(base: Any) -> list[nn.Module]:
    """The modules that the model's authors say are not to be split: its layers, inner ones first. None known: the model
    is one piece."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [module for module in reversed(list(base.modules())) if type(module).__name__ in names]


def _in_single_precision(unit: nn.Module, kept: set[nn.Parameter], done: dict[int, nn.Parameter]) -> None:
    """Trained parameters of a unit that are not spread yet become fp32 copies; one that two modules share stays one."""
    for module in unit.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.requires_grad or parameter in kept or is_piece(parameter):
                continue
            if parameter.dtype != torch.float32:
                if id(parameter) not in done:
                    done[id(parameter)] = nn.Parameter(parameter.detach().float())
                module._parameters[name] = done[id(parameter)]
