"""RiskPO in the training loop: its quantiles are followed over the steps, reported, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain import methods
from posttrain.objective.risk import MixedValueAtRisk
from posttrain.training.loop import Trainer
from posttrain.training.stage import source_for
from tiny_tasks import tiny_policy, tiny_task


def trainer(steps: int, folder: Path | None = None, **settings: Any) -> Trainer:
    method = methods.riskpo(bundle=2, sharing="uniform").with_settings(
        steps=steps, batch=4, group=4, max_tokens=6, warmup=0.0, learning_rate=1e-2, checkpoint_every=1, **settings
    )
    policy = tiny_policy()
    return Trainer(policy, method, source_for(policy, method, tiny_task(), seed=0), seed=0, folder=folder)


def weights(of: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in of.policy.model.parameters()]


def test_a_run_tracks_its_quantiles_and_resumes_them(tmp_path: Path) -> None:
    whole = trainer(3)
    whole.run()
    part = whole.objective.parts[0]
    assert isinstance(part, MixedValueAtRisk)
    assert part.tracked
    assert whole.method.objective.parts[0].tracked == []  # the method itself has no state

    first = trainer(3, tmp_path)
    first.stop = lambda: first.progress.step == 2
    assert first.run().status == "interrupted"
    second = trainer(3, tmp_path)
    second.run()
    assert second.objective.parts[0].tracked == part.tracked
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


def test_a_step_reports_quantiles_and_risk() -> None:
    run = trainer(1)
    metrics = run.step(run.source.collect(0))
    assert metrics["quantile_low"] <= metrics["quantile_high"]
    assert metrics["cvar"] <= metrics["rvar"]
    assert metrics["entropy"] > 0
