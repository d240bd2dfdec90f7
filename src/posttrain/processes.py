"""The processes that train together: which of them this one is, and what they tell each other.

A launcher (`torchrun`, `accelerate launch`) starts one command several times and says in the environment who is who.
Every process walks through the same program; work is shared out in a few places, and what comes of it is exchanged by
the functions here, which all processes must call in the same order. Where there is one process each of them returns at
once what it was given.

What is exchanged are tensors and JSON: nothing is pickled.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from posttrain.trajectory import PosttrainError

PATIENCE = timedelta(minutes=30)  # how long a process waits for the others, who may be at a long completion
FACTS = "facts"  # the entry of a message that is JSON
LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")  # in what its libraries report


@dataclass(frozen=True, slots=True)
class Processes:
    """rank: the number of this process among `world`. sharded: weights are spread over all (FSDP2), not copied."""

    rank: int = 0
    world: int = 1
    sharded: bool = False

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world > 1

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world}"


T = TypeVar("T")
_ALONE = Processes()
_state: dict[str, Any] = {"here": _ALONE, "group": None}


def here() -> Processes:
    """This process among those that train together; alone until `start` was called."""
    found: Processes = _state["here"]
    return found


def start(shard: bool | None = None) -> Processes:
    """Join the processes that a launcher started; a script that has joined them by itself is taken as it is.

    shard: spread the weights over the processes (FSDP2). None does what `accelerate launch --use_fsdp` says.

    Raises:
        PosttrainError: a launcher that started one process where several were asked for, more processes than GPUs, or
            weights to be spread over one process.
    """
    import torch.distributed as dist

    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") if shard is None else shard
    joined = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if joined else _launched()
    if world == 1:
        if shard:
            raise PosttrainError(
                "the weights are to be spread over several processes (shard), and there is one; start several: "
                "torchrun --nproc-per-node 2 -m posttrain ..."
            )
        _state["here"] = _ALONE
        return _ALONE
    _take_device()
    if not joined:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise PosttrainError(
                f"process {os.environ.get('RANK')} of {world} cannot join the others: {' '.join(str(error).split())}; "
                f"check that MASTER_ADDR and MASTER_PORT lead to the first of them"
            ) from error
        atexit.register(_leave)
    if _state["group"] is None and "gloo" not in str(dist.get_backend_config()):
        _state["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)  # for what lies on the CPU
    _state["here"] = Processes(dist.get_rank(), world, wanted)
    same(wanted, "whether weights are spread (shard)")
    return here()


def _launched() -> int:
    """How many processes a launcher started."""
    given = os.environ.get("WORLD_SIZE", "")
    if not given:
        # accelerate announces several processes by an address, and starts one of them where it finds no GPU
        if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("MASTER_PORT"):
            raise PosttrainError(
                "accelerate launch started one process where several were asked for, as it does without GPUs; "
                "add --multi_gpu (it works on CPUs, too), or start them by torchrun --nproc-per-node N"
            )
        return 1
    if not given.isdigit() or not int(given):
        raise PosttrainError(f"WORLD_SIZE is {given!r}; expected the number of processes, as launchers set it")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if int(given) > 1 and missing:
        raise PosttrainError(
            f"WORLD_SIZE is {given} and {', '.join(missing)} is not set; start the processes by torchrun or "
            f"accelerate launch"
        )
    return int(given)


def _take_device() -> None:
    """Each process of a machine has a GPU of its own, if there are any."""
    count, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if not count:
        return
    if own >= count:
        raise PosttrainError(
            f"this machine has {count} GPUs and at least {own + 1} processes; start one a GPU, or hide the GPUs "
            f"(CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    torch.cuda.set_device(own)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


# -- what they tell each other -----------------------------------------------------------------------------------------


def add(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor of one shape, in its place."""
    if here().several:
        import torch.distributed as dist

        dist.all_reduce(values, group=_group(values))
    return values


def add_up(value: float) -> float:
    """The sum over all processes of a number; NaN where one of them has it."""
    return float(add(torch.tensor(value, dtype=torch.float64))) if here().several else value


def any_of(flag: bool) -> bool:
    """Whether it is so for any process."""
    return bool(add(torch.tensor(int(flag)))) if here().several else flag


def wait() -> None:
    """Go on when all processes have come here."""
    any_of(False)


def gather(tensors: Mapping[str, Tensor], facts: Any = None) -> list[tuple[dict[str, Tensor], Any]]:
    """What every process gives, in the order of their numbers: tensors on the CPU (none shares its memory with another
    one's), and facts that JSON can hold."""
    if not here().several:
        return [(dict(tensors), facts)]
    import torch.distributed as dist
    from safetensors.torch import load, save

    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    message = torch.frombuffer(bytearray(save({**tensors, FACTS: text})), dtype=torch.uint8)
    size = torch.tensor([len(message)])
    sizes = [torch.empty_like(size) for _ in range(here().world)]
    dist.all_gather(sizes, size, group=_group(size))
    room = torch.zeros(max(int(n) for n in sizes), dtype=torch.uint8)
    room[: len(message)] = message
    received = [torch.empty_like(room) for _ in sizes]
    dist.all_gather(received, room, group=_group(room))
    found = []
    for part, length in zip(received, sizes, strict=True):
        opened = load(part[: int(length)].numpy().tobytes())
        found.append((opened, json.loads(opened.pop(FACTS).numpy().tobytes())))
    return found


def everyone(fact: Any) -> list[Any]:
    """What each process says, in the order of their numbers; JSON."""
    return [said for _, said in gather({}, fact)]


def agree(fact: Any) -> Any:
    """What the first process says; JSON."""
    return everyone(fact)[0] if here().several else fact


def same(fact: Any, what: str) -> None:
    """PosttrainError in every process unless all say the same of `what`; JSON."""
    if not here().several:
        return
    said = everyone(fact)
    for rank, other in enumerate(said):
        if other != said[0]:
            raise PosttrainError(
                f"the processes differ in {what}: process 0 has {said[0]!r}, process {rank} {other!r}; all must run "
                f"the same command, with the same versions and files, and draw random numbers by the run's seed alone"
            )


def led(work: Callable[[], T]) -> T | None:
    """What the first process makes while the others wait (None for these); where it meets an error that the user can
    mend, all raise it."""
    if not here().several:
        return work()
    made, failed = None, None
    if here().main:
        try:
            made = work()
        except PosttrainError as error:
            failed = error
    told = agree(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    if told is not None:
        raise PosttrainError(told)
    return made


def _group(values: Tensor) -> Any:
    return _state["group"] if values.device.type == "cpu" else None


# -- when one of them ends ---------------------------------------------------------------------------------------------


def lost(error: BaseException) -> bool:
    """Whether an error means that another process is not there any more."""
    if not here().several or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in LOST)
