"""CHORD, ViSurf, AHPO, HPT, LUFFY and SRFT against their papers' losses, and in limits where they equal something."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flat_tokens import one_token
from mixed_world import (
    EVEN,
    MIXED,
    MixedWorld,
    Paper,
    Seen,
    assert_same,
    assert_same_gradient,
    centred,
    clipped,
    experts,
    group_of,
    normalised,
    pooled,
    rollouts,
)
from padded_world import float64  # noqa: F401
from torch import Tensor

from posttrain import methods
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.imitation import Uncertain
from posttrain.objective.mask import Clip, DualClip
from posttrain.objective.mixture import Mixture
from posttrain.objective.off_policy import Shaped
from posttrain.objective.schedule import at
from posttrain.reward.shapings.label import LabelControl
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError

# -- the papers ------------------------------------------------------------------------------------------------------


def dual_clipped(s: Seen, advantage: float, ceiling: float = 3.0) -> Tensor:
    loss = -clipped(s.ratio, advantage)
    return loss.clamp(max=ceiling * abs(advantage)) if advantage < 0 else loss


def chord(mu: float, phi: bool = False) -> Paper:
    def paper(seen: list[Seen]) -> Tensor:
        own, shown = rollouts(seen), experts(seen)
        reinforcement = pooled([dual_clipped(s, normalised(s, own)) for s in own])
        weight = [(s.logp.exp() * (1 - s.logp.exp())).detach() if phi else torch.ones(len(s)) for s in shown]
        imitation = pooled([-w * s.logp for w, s in zip(weight, shown, strict=True)])
        return (1 - mu) * reinforcement + mu * imitation

    return paper


def visurf(clip: float = 0.2, beta: float = 0.0, tokens: bool = False) -> Paper:
    def paper(seen: list[Seen]) -> Tensor:
        each = []
        for s in seen:
            d = s.reference - s.logp
            each.append(-clipped(s.ratio, normalised(s, seen), clip, clip) + beta * (d.exp() - d - 1))
        return pooled(each) if tokens else torch.stack([e.mean() for e in each]).mean()

    return paper


def ahpo(seen: list[Seen]) -> Tensor:
    """Every demonstration that is in the batch has ξ = 1: the strategy left the others out."""
    own = rollouts(seen)
    terms = []
    for g in sorted({s.group for s in seen}):
        members = [s for s in own if s.group == g]
        shown = [s for s in experts(seen) if s.group == g]
        loss = torch.zeros(())
        if members:
            loss = loss + torch.stack([-clipped(s.ratio, normalised(s, own)).mean() for s in members]).mean()
        for s in shown:
            loss = loss - s.logp.mean()
        terms.append(loss)
    return torch.stack(terms).mean()


def hpt(imitation: float = 1.0, length: int = 128, entropy: float = 0.001) -> Paper:
    def paper(seen: list[Seen]) -> Tensor:
        own = rollouts(seen)
        each = [(-s.ratio * centred(s, own) - entropy * s.entropy).sum() / length for s in own]
        return torch.stack(each).mean() + imitation * pooled([-s.logp for s in experts(seen)])

    return paper


def luffy(gamma: float = 0.1) -> Paper:
    def paper(seen: list[Seen]) -> Tensor:
        each = []
        for s in seen:
            p = s.logp.exp()
            factor = s.ratio if s.source == "policy" else p / (p + gamma)
            each.append(-factor * normalised(s, seen))
        return pooled(each)

    return paper


def srft(imitation: float = 0.5, exploration: float = 0.1) -> Paper:
    def paper(seen: list[Seen]) -> Tensor:
        off = pooled([-s.logp.exp() * normalised(s, seen) for s in experts(seen)])
        sft = pooled([-imitation * (-s.entropy.mean()).exp().detach() * s.logp for s in experts(seen)])
        weights = [
            exploration * s.entropy.mean().exp().detach() if s.reward == 1 else torch.tensor(-1.0)
            for s in rollouts(seen)
        ]
        on = pooled([-w * s.logp for w, s in zip(weights, rollouts(seen), strict=True)])
        return off + sft + on

    return paper


PAPERS: list[tuple[str, dict[str, object], Paper]] = [
    ("chord", {"peak": 0.3, "valley": 0.3}, chord(0.3)),
    ("chord", {"peak": 0.9, "valley": 0.05, "decay": 200}, chord(0.9)),
    ("chord", {"peak": 0.6, "valley": 0.6, "phi": True}, chord(0.6, phi=True)),
    ("chord-phi", {}, chord(0.1, phi=True)),
    ("visurf", {}, visurf()),
    ("visurf", {"clip": 0.1, "beta": 0.3, "mean": "token"}, visurf(0.1, 0.3, tokens=True)),
    ("ahpo", {}, ahpo),
    ("hpt", {}, hpt()),
    ("hpt", {"imitation": 0.3, "length": 8, "entropy": 0.2}, hpt(0.3, 8, 0.2)),
    ("luffy", {}, luffy()),
    ("luffy", {"gamma": 0.3}, luffy(0.3)),
    ("srft", {}, srft()),
    ("srft", {"imitation": 0.2, "exploration": 0.7}, srft(0.2, 0.7)),
]


def made(name: str, arguments: dict[str, object]) -> Method:
    return methods.find(name).function(**arguments)


@pytest.mark.gradient("chord", "chord-phi", "visurf", "ahpo", "hpt", "luffy", "srft")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "arguments", "paper"), PAPERS, ids=lambda v: v if isinstance(v, str) else "")
def test_loss_and_gradient_equal_the_papers(name: str, arguments: dict[str, object], paper: Paper, seed: int) -> None:
    world = MixedWorld(EVEN if name == "ahpo" else MIXED, seed=seed)
    assert_same(world.of_method(made(name, arguments)), world.of_paper(paper))


@pytest.mark.parametrize("budget", [1, 12])
@pytest.mark.parametrize(("name", "arguments", "paper"), PAPERS, ids=lambda v: v if isinstance(v, str) else "")
def test_micro_batches_change_nothing(name: str, arguments: dict[str, object], paper: Paper, budget: int) -> None:
    # card 009, check (d): demonstrations are spread unevenly over the micro-batches, also alone in one
    world = MixedWorld(seed=2)
    method = made(name, arguments)
    assert_same(world.of_method(method, budget), world.of_method(method), 1e-11)


def alone(source: str) -> MixedWorld:
    """Only the sequences of one source; rollouts in groups."""
    layout = [[m for m in members if m[0] == source] for members in MIXED]
    return MixedWorld([members for members in layout if members], seed=3)


# -- CHORD -----------------------------------------------------------------------------------------------------------


@pytest.mark.limit("chord", "chord-phi")
@pytest.mark.parametrize("method", [methods.chord(0, 0), methods.chord_phi(0)])
def test_chord_without_imitation_is_grpo(method: Method) -> None:
    world = MixedWorld(seed=4)
    grpo = methods.grpo().replace(
        advantage=GroupNormalised(eps=1e-6), masks=(Clip(), DualClip(3.0)), aggregate=TokenMean()
    )
    members = (world.batch.source == 0).nonzero()[:, 0]
    batch = world.fresh().select(members)
    grpo.objective.prepare(batch)
    wanted = grpo.objective(batch, world.likelihood(batch, grpo), batch.totals)
    assert_same(world.of_method(method), (wanted.value, world.gradient(wanted.surrogate)), 1e-12)


@pytest.mark.limit("chord")
def test_chord_with_imitation_alone_is_sft_on_the_demonstrations() -> None:
    world = MixedWorld(seed=4)
    batch = world.fresh().select((world.batch.source == 1).nonzero()[:, 0])
    sft = methods.sft()
    sft.objective.prepare(batch)
    wanted = sft.objective(batch, world.likelihood(batch, sft), batch.totals)
    assert_same(world.of_method(methods.chord(1, 1)), (wanted.value, world.gradient(wanted.surrogate)), 1e-12)


def test_phi_on_one_token_of_probability_a_half() -> None:
    # card 009, check (b): the loss is 0.25 ln 2 and the gradient with respect to the token's logit -0.125
    value, gradient = one_token(methods.chord_phi(1.0).objective, 0.5)
    assert value == pytest.approx(0.25 * math.log(2), abs=1e-12)
    assert gradient == pytest.approx(-0.125, abs=1e-12)


@pytest.mark.parametrize("probability", [0.1, 1 / 3, 0.9])
def test_the_gradient_of_phi_is_that_of_the_card(probability: float) -> None:
    _, gradient = one_token(methods.chord_phi(1.0).objective, probability)
    assert gradient == pytest.approx(-probability * (1 - probability) ** 2, abs=1e-12)


def test_phi_does_not_round_to_nothing_for_a_likely_token() -> None:
    batch = replace(alone("expert").batch, advantage=torch.ones(1, dtype=torch.float32))
    logp = torch.tensor([-1e-8], dtype=torch.float32)  # 1 - exp(logp) is 0 in fp32
    assert float(Uncertain().credit(batch, logp).advantage) == pytest.approx(1e-8, rel=1e-3)


def test_mu_follows_the_papers_schedule() -> None:
    # card 009, check (c)
    objective = methods.chord().objective
    assert isinstance(objective, Mixture)
    batch = alone("expert").batch
    own, shown = objective.terms
    for step, mu in ((0, 0.9), (100, 0.475), (200, 0.05), (500, 0.05)):
        now = replace(batch, step=step, total=1000)
        assert at(shown.weight, now) == pytest.approx(mu, abs=1e-12)
        assert at(own.weight, now) == pytest.approx(1 - mu, abs=1e-12)
    warm = methods.chord(0.5, 0.02, rise=200, decay=400).objective
    assert isinstance(warm, Mixture)
    found = [at(warm.terms[1].weight, replace(batch, step=s, total=1000)) for s in (0, 100, 200, 400, 600)]
    assert found == pytest.approx([0, 0.25, 0.5, 0.26, 0.02])


def test_the_cutoff_takes_the_gradient_of_tokens_that_are_known() -> None:
    objective = methods.chord(1, 1, cutoff=0.6).objective
    value, gradient = one_token(objective, 0.7)
    assert gradient == 0
    assert value == pytest.approx(-math.log(0.6), abs=1e-12)
    value, gradient = one_token(objective, 0.5)
    assert gradient == pytest.approx(-0.5, abs=1e-12)
    assert value == pytest.approx(math.log(2), abs=1e-12)


def test_demonstrations_do_not_enter_the_rollouts_baseline() -> None:
    method = methods.chord(0.5, 0.5)
    world = MixedWorld(seed=5)
    batch = world.fresh()
    method.objective.prepare(batch)
    assert batch.advantage is not None
    first = batch.advantage[batch.sequence == 0][0]
    assert float(first) == pytest.approx((1 - 1 / 3) / (math.sqrt(1 / 3) + 1e-6))  # of (1, 0, 0), without the label


@pytest.mark.parametrize("arguments", [{"peak": 1.2}, {"valley": -0.1}])
def test_weights_beyond_0_and_1_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(PosttrainError, match="from 0 to 1"):
        methods.chord(**arguments)  # type: ignore[arg-type]
    with pytest.raises(PosttrainError, match="from 0 to 1"):
        methods.chord_phi(mu=1.5)


# -- ViSurf ----------------------------------------------------------------------------------------------------------


def advantages(method: Method, layout: list[list[tuple[str, float]]]) -> list[float]:
    world = MixedWorld(layout, seed=6)  # type: ignore[arg-type]
    batch = world.fresh()
    method.objective.prepare(batch)
    assert batch.advantage is not None
    first = batch.lengths.cumsum(0) - batch.lengths
    return batch.advantage[first].tolist()


def test_a_label_among_failures_has_the_only_positive_advantage() -> None:
    # card 007, check (a)
    found = advantages(methods.visurf(), [[("policy", 0.0)] * 3 + [("expert", 1.0)]])
    assert found == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-5)


@pytest.mark.limit("visurf")
def test_a_matched_label_drops_out_of_the_gradient() -> None:
    # card 007, check (b): without σ the gradient is 3/4 of GRPO's on the three rollouts
    rewards = [1.0, 0.0, 1.0]
    world = MixedWorld([[("policy", r) for r in rewards] + [("expert", 2 / 3)]], seed=7)
    unscaled = methods.visurf().replace(advantage=GroupNormalised("none"))
    _, found = world.of_method(unscaled)
    grpo = methods.grpo().replace(advantage=GroupNormalised("none"))
    batch = world.fresh().select(torch.arange(3))
    grpo.objective.prepare(batch)
    wanted = world.gradient(grpo.objective(batch, world.likelihood(batch, grpo), batch.totals).surrogate)
    assert_same_gradient(found, [0.75 * g for g in wanted])
    assert advantages(methods.visurf(), [[("policy", r) for r in rewards] + [("expert", 2 / 3)]])[3] == 0.0


def test_equal_rewards_give_no_gradient() -> None:
    # card 007, check (c)
    world = MixedWorld([[("policy", 1.0)] * 3 + [("expert", 1.0)]], seed=8)
    _, gradient = world.of_method(methods.visurf())
    assert all(not bool(g.any()) for g in gradient)


def test_the_labels_ratio_starts_at_one() -> None:
    # at π_θ = π_old the label is a plain imitation term, weighted with its advantage
    world = MixedWorld([[("policy", 0.0)] * 3 + [("expert", 1.0)]], seed=9, on_policy=True)

    def paper(seen: list[Seen]) -> Tensor:
        return -sum(normalised(s, seen) * s.logp.mean() for s in seen) / 4  # type: ignore[return-value]

    assert_same_gradient(world.of_method(methods.visurf())[1], world.of_paper(paper)[1])


def test_visurf_has_the_controls_of_its_arguments() -> None:
    assert methods.visurf(thinking=("think",), smooth=False).shaping == (LabelControl(("think",), False),)
    with pytest.raises(PosttrainError, match="expected sequence or token"):
        methods.visurf(mean="tokens")  # type: ignore[arg-type]


# -- AHPO and HPT ----------------------------------------------------------------------------------------------------


@pytest.mark.limit("ahpo")
def test_ahpo_without_demonstrations_is_grpo() -> None:
    # card 038, check (a): the strategy brings none in where fewer = 0 (tests/rollout/strategies/test_gate.py)
    world = alone("policy")
    grpo = methods.grpo().replace(advantage=GroupNormalised(eps=1e-6))
    assert_same(world.of_method(methods.ahpo(0)), world.of_method(grpo), 1e-12)


@pytest.mark.limit("ahpo")
def test_ahpo_that_always_imitates_is_grpo_plus_the_likelihood_of_every_demonstration() -> None:
    # card 038, check (b)
    layout = [[("policy", 1.0), ("policy", 0.0), ("expert", 1.0)], [("policy", 1.0), ("policy", 1.0), ("expert", 1.0)]]
    world = MixedWorld(layout, seed=10)  # type: ignore[arg-type]

    def paper(seen: list[Seen]) -> Tensor:
        own = rollouts(seen)
        grpo = torch.stack([-clipped(s.ratio, normalised(s, own)).mean() for s in own]).mean()
        return grpo - torch.stack([s.logp.mean() for s in experts(seen)]).mean()

    assert_same(world.of_method(methods.ahpo(9)), world.of_paper(paper))


@pytest.mark.limit("ahpo")
def test_ahpo_on_failures_alone_has_the_gradient_of_imitation() -> None:
    # card 038, check (d)
    world = MixedWorld([[("policy", 0.0)] * 4 + [("expert", 1.0)]], seed=11)
    _, wanted = world.of_paper(lambda seen: -experts(seen)[0].logp.mean())
    assert_same_gradient(world.of_method(methods.ahpo())[1], wanted)


@pytest.mark.limit("hpt")
def test_hpt_without_demonstrations_is_dr_grpo_without_clipping() -> None:
    # card 046, check (a): gate = -1
    world = alone("policy")
    dr_grpo = methods.dr_grpo(length=16).replace(masks=())
    assert_same(world.of_method(methods.hpt(-1, length=16, entropy=0.0)), world.of_method(dr_grpo), 1e-12)
    assert methods.hpt(-1).rollouts.fewer == 0  # type: ignore[attr-defined]


@pytest.mark.limit("hpt")
def test_hpt_on_demonstrations_alone_is_sft() -> None:
    # card 046, check (a): gate = n
    world = alone("expert")
    assert_same(world.of_method(methods.hpt(8)), world.of_method(methods.sft()), 1e-12)


# -- LUFFY and SRFT --------------------------------------------------------------------------------------------------


@pytest.mark.limit("luffy")
def test_luffy_on_rollouts_alone_is_grpo_over_tokens_without_clipping() -> None:
    world = alone("policy")
    grpo = methods.grpo().replace(advantage=GroupNormalised(eps=1e-6), masks=(), aggregate=TokenMean())
    assert_same(world.of_method(methods.luffy()), world.of_method(grpo), 1e-12)


def test_a_demonstrated_token_pulls_most_at_gamma() -> None:
    # card 046, check (c): π f'(π) = 0.25 at p = γ = 0.1, and less on either side
    batch = alone("expert").batch
    weight = Shaped(0.1)(batch, torch.tensor([0.05, 0.1, 0.2]).log()).weight
    assert float(weight[1]) == pytest.approx(0.25, abs=1e-12)
    assert float(weight[0]) < 0.25 > float(weight[2])


@pytest.mark.limit("srft")
def test_srft_without_its_entropy_terms_pushes_failures_down_and_takes_dft_for_demonstrations() -> None:
    world = MixedWorld([[("policy", 0.0)] * 3 + [("expert", 1.0)]], seed=12)

    def paper(seen: list[Seen]) -> Tensor:
        dft = pooled([-s.logp.exp().detach() * s.logp for s in experts(seen)]) * normalised(experts(seen)[0], seen)
        return dft + pooled([s.logp for s in rollouts(seen)])

    assert_same_gradient(world.of_method(methods.srft(0.0, 0.0))[1], world.of_paper(paper)[1])


def test_srft_compares_a_demonstration_with_the_rollouts_of_its_group() -> None:
    found = advantages(methods.srft(), [[("policy", 0.0)] * 3 + [("expert", 1.0)]])
    assert found == pytest.approx([-1, -1, -1, 1.5], abs=1e-5)


# -- the estimator's table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "luffy"])
def test_on_policy_the_weight_of_a_rollout_is_its_advantage(name: str) -> None:
    # card 046, check (b)
    world = alone("policy")
    world.batch.old_logp = world.policy.log_likelihood(world.batch).logp.detach()
    method = methods.find(name).function()
    batch = world.fresh()
    method.objective.prepare(batch)
    logp = world.policy.log_likelihood(batch).logp
    ratio = method.objective.denominator(batch, logp)
    torch.testing.assert_close(ratio.weight.detach(), torch.ones_like(ratio.weight), rtol=1e-12, atol=1e-12)


def test_advantages_of_a_group_add_up_to_nothing() -> None:
    # card 046, check (d)
    world = alone("policy")
    for name in ("grpo", "dr-grpo", "rloo"):
        advantage = methods.find(name).function().objective.advantage.of(world.batch)
        for g in world.batch.group.unique():
            assert float(advantage[world.batch.group == g].sum()) == pytest.approx(0, abs=1e-12)
    size = torch.tensor([float(len(group_of(world.seen(), s))) for s in world.seen()])
    rloo, dr_grpo = (methods.find(n).function().objective.advantage.of(world.batch) for n in ("rloo", "dr-grpo"))
    torch.testing.assert_close(rloo, size / (size - 1) * dr_grpo, rtol=1e-12, atol=1e-12)
