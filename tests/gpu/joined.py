"""Trainings in a process group of one, for a test: `torchrun --nproc-per-node 1 joined.py OUT`.

Everything that several processes exchange is exchanged, by NCCL where there is a GPU: the one process pretends that
there are others. OUT gets, for each kind and each way to hold the weights, metrics and the distance from a process that
never joined a group.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from on_gpu import DEVICE, placed
from several import KINDS, ROWS, SMALL
from torch.distributed.fsdp import FSDPModule

from posttrain import processes
from tiny_training import offline, online, weights


class Pretended(processes.Processes):
    """One process that talks to the others although there are none."""

    @property
    def several(self) -> bool:
        return True


def trained(kind: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    make_method, make = KINDS[kind]
    own = {name: getattr(make_method().settings, name) for name in ("updates", "minibatches", "checkpointing")}
    method = make_method().with_settings(**{**SMALL, **own})
    policy = placed(make())
    trainer = online(method, policy) if method.online else offline(method, ROWS[method.data](), policy)
    rows: list[dict[str, float]] = []
    trainer.tracker.step = lambda step, seconds, values, groups: rows.append(values)  # type: ignore[method-assign]
    assert trainer.run().status == "finished"
    return rows, weights(trainer.policy)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    fsdp = hasattr(FSDPModule, "set_reduce_scatter_unused_params")  # of the torch that this package asks for
    found: dict[str, Any] = {"fsdp": fsdp}
    for kind in ("sft", "dpo", "grpo", "sft-low", "dpo-lora"):
        processes._state["here"] = processes.Processes()
        metrics, expected = trained(kind)
        for shard in (False, True) if fsdp else (False,):
            processes._state["here"] = Pretended(0, 1, shard)
            rows, after = trained(kind)
            apart = max(float((after[n].float() - expected[n].float()).abs().max()) for n in expected)
            losses = [[row["loss"] for row in each] for each in (rows, metrics)]
            found[f"{kind}, {'spread' if shard else 'copied'}"] = {"apart": apart, "losses": losses}
    out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
