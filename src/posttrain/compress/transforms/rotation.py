"""A rotation of the residual stream, folded into everything that reads or writes it, so that no channel stands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.compress.calls import Batch, captured
from posttrain.compress.fold import change, parameters
from posttrain.compress.stacks import Stack, stacks
from posttrain.compress.transforms import hadamard
from posttrain.compress.transforms.residual import Ends, residual, turned
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Walk
from posttrain.trajectory import PosttrainError

Kind = Literal["hadamard", "orthogonal"]
ROWS, LENGTH = 2, 16  # random tokens that a rotation is tried on


@dataclass(frozen=True)
class ResidualRotation(Transform):
    r"""The residual stream x is replaced by x Q: tables E Q, readers W Q, writers Q^T W, with norm gains folded first.

    An RMS norm does not see a rotation. A layer norm sees none that keeps the mean of the channels as it is: where a
    model has layer norms, Q is one of those (the paper takes the mean out of all that writes the stream instead, which
    needs another norm in the model). Q is a Hadamard matrix with random signs, `H diag(±1) / sqrt(n)` or, keeping
    means, `H^T diag(1, ±1, ...) H / n`.

    Everything is tried on copies first: PosttrainError, with the model as it was, where a block has a part that does
    not fit (a norm on a layer's outputs as in Gemma, a post-norm block, an encoder). A vocabulary projection that is
    tied to the embedding is untied, since only one of them stands behind a norm.

    kind: `orthogonal` draws any rotation, for widths of which no Hadamard matrix is known. seed: of Q.

    Reference: QuaRot, 2024, arXiv 2404.00456 (card 000, section 8).
    """

    kind: Kind = "hadamard"
    seed: int = 0

    def apply_to_model(self, model: nn.Module) -> None:
        rotate(model, lambda width, centred: rotation_matrix(width, self.kind, centred, self.seed))


@torch.no_grad()
def rotate(model: nn.Module, matrix: Callable[[int, bool], Tensor]) -> None:
    """Rotate the residual stream of a model, in place. matrix: makes the `[width, width]` fp64 Q of its width, and of
    whether it must map the vector of ones to itself.
    """
    stack, table = _stack_and_table(model)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, table.num_embeddings, (ROWS, LENGTH), generator=draw).to(table.weight.device)
    batch: Batch = {"input_ids": tokens, "use_cache": False}
    blocks = [residual(block, table.embedding_dim) for block in Walk(model, stack, [batch])]
    ends = Ends(model, stack, batch)
    rotation = matrix(table.embedding_dim, ends.centred or any(block.centred for block in blocks))
    for block in blocks:
        block.check(rotation)
    ends.check(rotation)
    _rotate_tables(model, stack, batch, rotation)
    for block in blocks:
        change(block.module, block.rotated(parameters(block.module), rotation))
    change(ends.norm, ends.norm_rotated(rotation))
    change(ends.head, {"weight": ends.head_rotated(rotation)})


def rotation_matrix(width: int, kind: Kind = "hadamard", centred: bool = False, seed: int = 0) -> Tensor:
    """`[width, width]` fp64 Q with Q^T Q = I. centred: it also maps the vector of ones to itself."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        if not hadamard.exists(width):
            raise PosttrainError(f"no Hadamard matrix of order {width} is known here; take the kind orthogonal instead")
        signs = torch.randint(0, 2, (width,), generator=draw, dtype=torch.int64).double() * 2 - 1
        matrix = hadamard.hadamard(width) / width**0.5
        if not centred:
            return matrix * signs
        matrix = matrix * matrix[0].sign()  # its first row is constant now: the direction of the mean
        signs[0] = 1.0
        return matrix.T @ (signs[:, None] * matrix)
    if kind != "orthogonal":
        raise PosttrainError(f"kind of rotation is {kind!r}; expected hadamard or orthogonal")
    size = width - 1 if centred else width
    drawn, upper = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    found = drawn * upper.diagonal().sign()
    if not centred:
        return found
    basis = torch.eye(width, dtype=torch.float64)
    basis[:, 0] = 1.0
    basis = torch.linalg.qr(basis).Q  # its first column is the direction of the mean
    return basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), found) @ basis.T


def _stack_and_table(model: Any) -> tuple[Stack, nn.Embedding]:
    found = stacks(model)
    table: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if len(found) != 1 or not isinstance(table, nn.Embedding) or not isinstance(head, nn.Linear):
        raise PosttrainError(
            f"{type(model).__name__} cannot be rotated; expected a language model with one stack of blocks between a "
            f"table of tokens and a linear vocabulary projection"
        )
    return found[0], table


def _rotate_tables(model: Any, stack: Stack, batch: Batch, rotation: Tensor) -> None:
    """Rotate the tables that the first block's input is a sum of: tokens, positions. A vocabulary projection that was
    tied to one keeps its weight as it was, and the configuration, which is saved, no longer says that it is tied.
    """
    width = rotation.shape[0]
    inside = tuple(f"{stack.name}.{i}." for i in range(len(stack.blocks)))
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == width and not name.startswith(inside)
    ]
    before = captured(model, stack, [batch])[0][0].hidden
    kept = [table.weight for table in tables]
    for table, weight in zip(tables, kept, strict=True):
        made = turned(weight.detach(), 1, rotation).to(weight.dtype)
        table.weight = nn.Parameter(made, requires_grad=weight.requires_grad)
    after, wanted = captured(model, stack, [batch])[0][0].hidden, turned(before, -1, rotation)
    tolerance = 1e-4 if before.dtype in (torch.float32, torch.float64) else 3e-2
    if not (after - wanted).norm() <= tolerance * wanted.norm():
        for table, weight in zip(tables, kept, strict=True):
            table.weight = weight
        raise PosttrainError(
            f"{type(model).__name__} cannot be rotated: its first block's input is more than a sum of tables (such as "
            f"a norm behind the embedding)"
        )
    if any(model.get_output_embeddings().weight is weight for weight in kept):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
