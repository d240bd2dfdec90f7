"""Text that a mixture writes itself: the score by hand, its two limits, and the counts of experts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.compress.balanced import SelfBalanced, balance, imbalance, usage, writable
from posttrain.compress.experts import unfuse
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.trajectory import PosttrainError
from tiny_models import SHAPE, make_policy, random_tokens


def mixture(name: str = "mixtral", skew: float = 0.0) -> nn.Module:
    """With routers that lean towards the first experts."""
    model = make_policy(name, None).base
    if skew:
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(_leaning(skew))
    unfuse(model)
    return model


def _leaning(skew: float) -> Any:
    def hook(router: nn.Module, given: Any, out: Any) -> Any:
        logits = out[0] + skew * torch.linspace(1, 0, out[0].shape[-1])
        chance, index = torch.softmax(logits, -1).topk(2, -1)
        return logits, chance / chance.sum(-1, keepdim=True), index

    return hook


def text(rows: int = 4, length: int = 10) -> list[dict[str, Any]]:
    ids = random_tokens(rows * length, torch.Generator().manual_seed(0)).view(rows, length)
    return [{"input_ids": ids, "use_cache": False}]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- imbalance -------------------------------------------------------------------------------------------------------


def test_imbalance_is_nothing_if_and_only_if_experts_are_used_alike() -> None:
    assert float(imbalance(torch.full((1, 3, 4), 5.0))) == 0.0
    uneven = torch.full((1, 3, 4), 5.0)
    uneven[0, 1, 2] = 6.0
    assert float(imbalance(uneven)) > 0


def test_imbalance_by_hand() -> None:
    # shares (1/2, 1/2, 0, 0) and (1/4, ...): deviations of 1/4 from the mean of 1/4, over E - 1 = 3
    counts = torch.tensor([[[4.0, 4.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]])
    assert float(imbalance(counts)) == pytest.approx(math.sqrt(4 / 16 / 3) / 2)


def test_usage_counts_what_the_routers_chose_row_by_row() -> None:
    model = mixture()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, given, out: seen.append(out[2]))
    with usage(model) as take, torch.no_grad():
        model(**text()[0])
        counts = take(4)
        assert counts.shape == (4, 2, 4)
        for number, index in enumerate(seen):
            for row in range(4):
                wanted = torch.bincount(index.view(4, -1)[row], minlength=4)
                assert torch.equal(counts[row, number], wanted.float())
        model(**text()[0])
        assert torch.equal(take(4), counts)  # what was taken is not counted again
    assert balance(model, text()) == pytest.approx(float(imbalance(counts.sum(0, keepdim=True))))


# -- writing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def chances(model: nn.Module, ids: Tensor) -> Tensor:
    """`[rows, length, vocabulary]` log-probabilities of what may be written: no token that begins or ends a text."""
    logits = model(input_ids=ids, use_cache=False).logits
    logits[..., [SHAPE["bos_token_id"], SHAPE["eos_token_id"]]] = -torch.inf
    return logits.log_softmax(-1)


def likelihood(model: nn.Module, ids: Tensor) -> Tensor:
    """`[rows]` log-probability of all tokens but the first."""
    return chances(model, ids)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].sum(1)


@torch.no_grad()
def uneven(model: nn.Module, ids: Tensor) -> Tensor:
    """`[rows]` imbalance of all tokens but the last, whose experts are not known when it is chosen."""
    with usage(model) as take:
        model(input_ids=ids[:, :-1], use_cache=False)
        return imbalance(take(len(ids)))


def test_with_all_the_weight_on_likelihood_and_one_beam_it_is_greedy() -> None:
    model = mixture()
    ids = SelfBalanced(temperature=1e9, beams=1).write(model, 3, 8, draw())
    now = ids[:, :1]
    for _ in range(7):
        now = torch.cat([now, chances(model, now)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, now)


def test_with_all_beams_it_is_the_best_of_all_sequences() -> None:
    # as many beams as there are tokens keep every prefix of two tokens, so the third is chosen among all
    model = mixture(skew=1.0)
    tokens = writable(model)
    assert len(tokens) == 62
    for temperature in (1e9, 0.02):
        found = SelfBalanced(temperature=temperature, beams=62).write(model, 1, 3, draw())
        every = torch.cartesian_prod(found[0, :1], tokens, tokens)
        cost = -likelihood(model, every) / 3 + math.sqrt(4) * uneven(model, every) / temperature
        assert float(cost[(every == found).all(1)]) <= float(cost.min()) + 1e-5


def test_what_begins_or_ends_a_text_is_never_written() -> None:
    model = mixture()
    assert SHAPE["eos_token_id"] not in writable(model)
    with torch.no_grad():  # the end is what the model finds likeliest
        model.lm_head.weight[SHAPE["eos_token_id"]] = 10 * model.model.norm.weight
    ids = SelfBalanced().write(model, 8, 12, draw())
    assert not torch.isin(ids, torch.tensor([SHAPE["bos_token_id"], SHAPE["eos_token_id"]])).any()


def test_balance_is_bought_with_likelihood() -> None:
    model = mixture(skew=1.5)
    likely = SelfBalanced(temperature=1e9).write(model, 16, 16, draw())
    even = SelfBalanced(temperature=0.05).write(model, 16, 16, draw())
    assert float(uneven(model, even).mean()) < 0.8 * float(uneven(model, likely).mean())
    assert float(likelihood(model, even).mean()) < float(likelihood(model, likely).mean())


def test_caches_follow_their_beams() -> None:
    # the likelihood that the search kept is that of the whole sequence computed anew
    model = mixture()
    solver = SelfBalanced(beams=3)
    kept: list[Tensor] = []
    continued = SelfBalanced._continued

    def watched(self: SelfBalanced, *given: Any) -> Any:
        out = continued(self, *given)
        kept.append(out[2])
        return out

    try:
        SelfBalanced._continued = watched  # type: ignore[method-assign]
        ids = solver.write(model, 2, 9, draw())
    finally:
        SelfBalanced._continued = continued  # type: ignore[method-assign]
    for row, wanted in enumerate(likelihood(model, ids)):
        assert float((kept[-1][row] - wanted).abs().min()) < 1e-4


def test_it_writes_as_much_as_was_given_by_seed() -> None:
    model = mixture()
    solver = SelfBalanced(rows=3)
    first, again, other = (solver.chosen(model, text(5, 7), seed) for seed in (0, 0, 1))
    assert [tuple(b["input_ids"].shape) for b in first] == [(3, 7), (2, 7)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])


def test_a_dense_model_is_calibrated_on_the_given_text() -> None:
    given = text()
    assert SelfBalanced().chosen(make_policy("llama", None).base, given, 0) is given


def test_the_pipeline_calibrates_on_what_was_written() -> None:
    model = mixture()
    seen: list[Tensor] = []
    inner = copy.deepcopy(model)
    inner.model.embed_tokens.register_forward_hook(lambda m, given, out: seen.append(given[0]))
    made = Compression("m", RoundToNearest(Uniform(8, 0)), calibration=SelfBalanced())
    compress_model(inner, made, text(), seed=3)
    written = SelfBalanced().chosen(model, text(), 3)
    assert any(s.shape == (4, 10) and torch.equal(s, written[0]["input_ids"]) for s in seen)


def test_models_whose_routing_is_not_seen_are_told_so() -> None:
    model = make_policy("llama4", None).base
    with pytest.raises(PosttrainError, match="balanced=False"):
        SelfBalanced().chosen(model, text(), 0)
    with pytest.raises(PosttrainError, match="temperature is 0"):
        SelfBalanced(temperature=0)
