"""Loss and gradient of every online method that TRL 1.16 has too, against TRL's own trainers on the same sequences.

Theirs: rows padded, prompts on the left, attention over pads masked, the advantages and the loss of their trainers.
Ours: packed rows without padding, the fused operator, the surrogate. The pad token is the end token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_sides import (
    COMPLETIONS,
    END,
    GENERATIONS,
    PROMPTS,
    REWARDS,
    ROWS,
    SECOND_REWARDS,
    Ours,
    assert_equal,
    dataset,
    make_ours,
    rollouts,
    theirs,
    trainer_options,
)

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.methods import Method
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.divergence import ReferenceKL
from posttrain.objective.mask import Clip, DualClip


@pytest.fixture(scope="module")
def ours() -> Ours:
    return make_ours()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trainer_options(tmp_path_factory.mktemp("trl"))


@dataclass(frozen=True)
class Online:
    """TRL's configuration, our method, and the sampling temperature of both."""

    config: dict[str, Any]
    method: Method
    temperature: float = 1.0


ONLINE = {
    "grpo": Online({"loss_type": "grpo"}, methods.grpo()),
    "grpo-kl": Online({"loss_type": "grpo", "beta": 0.3}, methods.grpo(beta=0.3)),
    "grpo-kl-corrected": Online(  # TRL's default since 1.0; the paper's KL has no correction
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
        methods.grpo().replace(divergences=(ReferenceKL(0.3, corrected=True),)),
    ),
    "grpo-narrow": Online({"loss_type": "grpo", "epsilon": 0.05}, methods.grpo(0.05)),
    "grpo-temperature": Online({"loss_type": "grpo", "beta": 0.3}, methods.grpo(beta=0.3), 0.7),
    "grpo-batch-scale": Online(
        {"loss_type": "grpo", "scale_rewards": "batch"}, methods.grpo().replace(advantage=GroupNormalised("batch"))
    ),
    "bnpo": Online({"loss_type": "bnpo", "beta": 0.3}, methods.grpo(beta=0.3).replace(aggregate=TokenMean())),
    "dr-grpo": Online(
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.3}, methods.dr_grpo(beta=0.3, length=8)
    ),
    "dapo": Online({"loss_type": "dapo", "epsilon_high": 0.28}, methods.dapo()),
    "gspo": Online(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        methods.gspo(),
    ),
    "gspo-kl": Online(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "beta": 0.3},
        methods.gspo(0.1, 0.1, 0.3),
    ),
    "cispo": Online({"loss_type": "cispo", "epsilon_high": 5.0}, methods.cispo()),
    "cispo-narrow": Online({"loss_type": "cispo", "epsilon_high": 1.1}, methods.cispo(1.1)),
    "two-sided": Online(
        {"loss_type": "grpo", "delta": 1.5}, methods.grpo().replace(masks=(Clip(0.2, 0.2), DualClip(1.5)))
    ),
    "gdpo": Online(
        {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
        methods.gdpo(weights={"two": 0.5}),
    ),
}


def padded(flat: Tensor) -> Tensor:
    """`[M]` in the order of `ROWS` to `[sequences, longest completion]`, 0 where padded."""
    lengths = [len(COMPLETIONS[g][i]) for g, i in ROWS]
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)


def fake_generation(trainer: Any, *, full: bool) -> None:
    """Put our completions where the trainer would sample its own."""
    prompts = [PROMPTS[g] for g, _ in ROWS]
    completions = [COMPLETIONS[g][i] for g, i in ROWS]
    texts = [""] * len(ROWS)
    plain = (prompts, completions, texts)
    trainer._generate = lambda _: (prompts, completions, None, texts, None, {}, None, []) if full else plain


def score_by(table: tuple[tuple[float, ...], ...], name: str) -> Callable[..., list[float]]:
    def score(**_: Any) -> list[float]:
        return [table[g][i] for g, i in ROWS]

    score.__name__ = name
    return score


def online_trainer(kind: str, case: Online, options: dict[str, Any], reference: Any) -> Any:
    import trl
    from trl.trainer.utils import add_fused_lm_head

    config = {**case.config, "beta": 0.0}  # with another beta the trainer would load the reference from a path
    if kind == "GRPO":
        config.setdefault("use_bias_correction_kl", False)
    scores = [score_by(REWARDS, "one")]
    if "multi_objective_aggregation" in config:
        scores.append(score_by(SECOND_REWARDS, "two"))
    settings = {"num_generations": GENERATIONS, "max_completion_length": 8, "temperature": case.temperature}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=make_model(0),
        reward_funcs=scores,
        args=getattr(trl, f"{kind}Config")(**options, **settings, **config),
        train_dataset=dataset(prompt=["a", "b"]),
        processing_class=make_tokenizer(),
    )
    if beta := case.config.get("beta"):
        trainer.beta, trainer.ref_model = beta, copy.deepcopy(reference)
        add_fused_lm_head(trainer.ref_model, temperature=case.temperature)
    fake_generation(trainer, full=kind == "GRPO")
    return trainer


def score(trainer: Any) -> dict[str, Tensor]:
    """TRL's own inputs to its loss: masks, advantages, reference log-probabilities."""
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "a"} for _ in ROWS])
    trainer.model.eval()
    return inputs


def drift(count: int) -> Tensor:
    """What the old log-probabilities differ from the present ones by: enough for every clip to bite."""
    return 0.3 * torch.randn(count, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("stale", [True, False], ids=["after-updates", "first-update"])
@pytest.mark.parametrize("name", ONLINE)
def test_group_methods(name: str, stale: bool, ours: Ours, options: dict[str, Any]) -> None:
    case = ONLINE[name]
    trainer = online_trainer("GRPO", case, options, ours.reference.model)
    inputs = score(trainer)
    batch = rollouts()
    batch.reference_logp = ours.logp(batch, ours.reference, case.temperature)
    if stale:
        batch.old_logp = ours.logp(batch, temperature=case.temperature) + drift(batch.target.numel())
        inputs["old_per_token_logps"] = padded(batch.old_logp)
    case.method.objective.advantage.prepare(batch)
    assert batch.advantage is not None
    first = batch.lengths.cumsum(0) - batch.lengths
    torch.testing.assert_close(batch.advantage[first], inputs["advantages"], rtol=1e-5, atol=1e-6)
    found = ours.loss(case.method, batch, case.temperature)
    loss = trainer._compute_loss(trainer.model, inputs)
    assert_equal(found, theirs(trainer.model, loss))


def test_the_drift_makes_every_clip_bite(ours: Ours) -> None:
    # or the comparison above would hold for a method that never clips
    for name, case in ONLINE.items():
        batch = rollouts()
        batch.reference_logp = ours.logp(batch, ours.reference)
        batch.old_logp = ours.logp(batch) + drift(batch.target.numel())
        case.method.objective.advantage.prepare(batch)
        likelihood = ours.policy.log_likelihood(batch)
        masked, tokens = case.method.objective(batch, likelihood, batch.totals).metrics.get("clip_fraction", (1, 2))
        assert 0 < masked < tokens, name


def test_dapo_overlong_filtering(ours: Ours, options: dict[str, Any]) -> None:
    # TRL takes completions that were cut off out of the token count too; DAPO's mean is over all tokens, as here:
    # with the count set to that, the two agree
    case = Online({"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True}, methods.dapo())
    trainer = online_trainer("GRPO", case, options, None)
    inputs = score(trainer)
    batch = rollouts()
    batch.truncated = torch.tensor([COMPLETIONS[g][i][-1] != END for g, i in ROWS])
    dropped = int(batch.lengths[batch.truncated].sum())
    assert int(inputs["num_items_in_batch"]) == batch.totals.tokens - dropped
    inputs["num_items_in_batch"] = torch.tensor(batch.totals.tokens)
    batch.old_logp = ours.logp(batch) + drift(batch.target.numel())
    inputs["old_per_token_logps"] = padded(batch.old_logp)
    case.method.objective.advantage.prepare(batch)
    loss = trainer._compute_loss(trainer.model, inputs)
    assert_equal(ours.loss(case.method, batch), theirs(trainer.model, loss))


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_rloo(kl: float, ours: Ours, options: dict[str, Any]) -> None:
    case = Online({"beta": kl}, methods.rloo(kl=kl))
    trainer = online_trainer("RLOO", case, options, ours.reference.model)
    inputs = score(trainer)
    batch = rollouts()
    batch.old_logp = ours.logp(batch)
    batch.reference_logp = ours.logp(batch, ours.reference)
    case.method.objective.advantage.prepare(batch)
    assert batch.advantage is not None
    first = batch.lengths.cumsum(0) - batch.lengths
    torch.testing.assert_close(batch.advantage[first], inputs["advantages"], rtol=1e-5, atol=1e-5)
    assert_equal(ours.loss(case.method, batch), theirs(trainer.model, trainer._compute_loss(trainer.model, inputs)))
    # after updates: a completion's ratio is a product, which leaves the band sooner
    batch.old_logp = batch.old_logp + drift(batch.target.numel())
    inputs["old_logps"] = batch.sum(batch.old_logp)
    assert_equal(ours.loss(case.method, batch), theirs(trainer.model, trainer._compute_loss(trainer.model, inputs)))
