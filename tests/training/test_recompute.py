"""Layers computed again in the backward pass: less is held, and the weights are those without it."""

from __future__ import annotations

import torch

from posttrain import methods
from posttrain.plan.ledger import Ledger
from tiny_training import demonstrations, make_policy, offline, same, weights


def test_the_same_weights_from_less_memory() -> None:
    found, peaks = [], []
    for checkpointing in (False, True):
        policy = make_policy(num_hidden_layers=6)
        assert policy.packs
        method = methods.sft().with_settings(batch=12, steps=2, learning_rate=1e-3, checkpointing=checkpointing)
        torch.manual_seed(0)
        trainer = offline(method, demonstrations(), policy)
        with Ledger("cpu") as ledger:
            trainer.run()
        found.append(weights(policy))
        peaks.append(ledger.peak.bytes)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in policy.model.modules())
    assert same(*found)
    assert not same(found[0], weights(make_policy(num_hidden_layers=6)))
    assert peaks[1] < 0.8 * peaks[0]
