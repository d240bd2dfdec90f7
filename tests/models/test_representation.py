from __future__ import annotations

import pytest
import torch

import tiny_models
from conftest import make_tokenizer
from posttrain.models.representation import mean_hidden
from posttrain.trajectory import Group, Trajectory


@pytest.mark.parametrize("name", ["llama", "bloom"])  # packed, padded
def test_mean_of_the_states_at_the_chosen_tokens(name: str) -> None:
    policy = tiny_models.make_policy(name, make_tokenizer())
    groups = tiny_models.ragged_groups()
    found = mean_hidden(policy, groups, budget=20)
    members = [t for g in groups for t in g.trajectories]
    assert found.shape == (len(members), 32)
    for row, trajectory in zip(found, members, strict=True):
        with torch.no_grad():
            states = policy.body(input_ids=trajectory.tokens[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(row, states[trajectory.action_mask].mean(0), rtol=1e-4, atol=1e-5)


def test_a_completion_that_fills_the_context_goes_without_its_last_state() -> None:
    policy = tiny_models.make_policy("opt", make_tokenizer())  # learned positions: not one more
    tokens = tiny_models.random_tokens(policy.max_length, torch.Generator().manual_seed(0))
    full = Trajectory(tokens, torch.arange(len(tokens)) >= 60)
    (found,) = mean_hidden(policy, [Group([full])])
    with torch.no_grad():
        states = policy.body(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(found, states[60:-1].mean(0), rtol=1e-4, atol=1e-5)
