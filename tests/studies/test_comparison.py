"""What is said of a comparison: which differences are real, in the table, the sentence and the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.evaluation.statistics import holm, wilson
from posttrain.studies.budget import Budget
from posttrain.studies.compare_page import render
from posttrain.studies.comparison import Comparison, Run, judge
from posttrain.studies.crossed import crossed

PROMPTS = 120


def outcomes(share: float, seeds: int = 3, base: int = 0) -> list[np.ndarray]:
    """0/1 outcomes: of the same prompts, those whose difficulty lies below `share` are mostly right."""
    difficulty = np.random.default_rng(1).uniform(size=PROMPTS)
    noise = np.random.default_rng(base).normal(0, 0.1, (seeds, PROMPTS))
    return list((difficulty + noise < share).astype(float))


def curve(seed: int, steps: int = 3) -> list[dict[str, float]]:
    return [
        {"step": s, "value": s / 10 + seed / 100, "seconds": 60.0 * s, "tokens": 100.0 * s, "rollouts": 8.0 * s}
        for s in range(steps)
    ]


def runs(tables: list[np.ndarray], rollouts: int = 16, spent: float = 100.0) -> list[Run]:
    found = []
    for seed, table in enumerate(tables):
        points = curve(seed, 3 + seed)
        if not rollouts:
            points = [{**p, "rollouts": 0.0} for p in points]
        curves = {"accuracy": points} | ({"reward": points} if rollouts else {})
        found.append(Run(seed, table, curves, spent, 1000 + seed, rollouts, 5))
    return found


def compared(**tables: Any) -> Comparison:
    made = {name: value if isinstance(value[0], Run) else runs(value) for name, value in tables.items()}
    return judge(Path("there"), "tiny", "sums", Budget.parse("100s"), outcomes(0.1)[0], made)


def test_pairs_are_tested_together_and_the_sentence_tells_what_is_real() -> None:
    tables = {"grpo": outcomes(0.4), "riskpo": outcomes(0.7, base=1), "rloo": outcomes(0.4, base=2)}
    found = compared(**tables)
    raw = [crossed(np.array(tables[a]) - np.array(tables[b])) for a, b in
           (("grpo", "riskpo"), ("grpo", "rloo"), ("riskpo", "rloo"))]  # fmt: skip
    assert [d.pvalue for d in found.differences] == holm([test.pvalue for test in raw])
    assert [d.real for d in found.differences] == [True, False, True]
    gap = -raw[0].mean
    assert gap == pytest.approx(np.mean(tables["riskpo"]) - np.mean(tables["grpo"]))
    assert found.sentence.startswith(
        f"riskpo beats grpo by {100 * gap:.1f} points [{-100 * raw[0].interval.high:.1f}, "
    )
    assert "riskpo beats rloo by " in found.sentence
    assert found.sentence.endswith("p < 0.001 after correction; the other difference is within the noise")
    assert found.methods[1].by_seed == [float(t.mean()) for t in tables["riskpo"]]


def test_no_difference_is_claimed_where_there_is_none() -> None:
    found = compared(a=outcomes(0.4), b=outcomes(0.4, base=1))
    assert found.sentence == "no difference between the two methods is beyond the noise"
    three = compared(a=outcomes(0.4), b=outcomes(0.4, base=1), c=outcomes(0.4, base=2))
    assert three.sentence == "no difference between any two methods is beyond the noise"


def test_a_difference_between_seeds_is_no_difference_between_methods() -> None:
    """One lucky seed: on these very prompts it is clear, over seeds it is not."""
    found = compared(a=[*outcomes(0.4, 2), outcomes(0.9, 1)[0]], b=outcomes(0.4, base=1))
    assert found.differences[0].difference > 0.1
    assert not found.differences[0].real


def test_one_seed_says_so() -> None:
    found = compared(a=outcomes(0.2, 1), b=outcomes(0.8, 1))
    assert found.sentence.endswith("after correction (with one seed a method: another seed may say otherwise)")


def test_one_method_alone() -> None:
    found = compared(a=outcomes(0.2))
    assert found.sentence == "a alone: nothing to compare with"
    assert "a" in str(found)


def test_all_right_against_all_wrong_keeps_an_interval() -> None:
    """Without any spread the difference is bounded by the methods' own intervals, and tested by signs over prompts."""
    found = compared(a=[np.ones(8)] * 3, b=[np.zeros(8)] * 3).differences[0]
    reach = wilson(0, 8).high
    assert (found.low, found.high) == pytest.approx((1 - np.hypot(reach, reach), 1.0))
    assert found.raw_pvalue == 2 / 2**8
    same = compared(a=[np.ones(8)] * 3, b=[np.ones(8)] * 3).differences[0]
    assert (same.low, same.high) == pytest.approx((-reach, reach))
    assert same.pvalue == 1


def test_accuracies_stay_within_bounds() -> None:
    few = [np.array([1.0] * 11 + [0.0])] * 3
    found = compared(a=few, b=[np.ones(12)] * 3)
    assert found.methods[0].accuracy.high == 1.0
    assert found.methods[1].accuracy.low == wilson(12, 12).low


def test_the_table() -> None:
    found = compared(grpo=outcomes(0.4), riskpo=outcomes(0.7, base=1))
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "method"
    assert "minus grpo" in lines[0]
    assert lines[1].startswith("before  ")
    difference = found.differences[0]
    assert f"+{-100 * difference.difference:.1f} [+{-100 * difference.high:.1f}, " in lines[3]
    assert lines[3].split()[-3:] == ["100", "1,001", "16"]
    assert lines[-1] == found.sentence
    assert "-0.0" not in str(compared(a=[np.zeros(5)] * 3, b=[np.zeros(5)] * 3))


def test_unequal_spending_is_said() -> None:
    found = compared(a=outcomes(0.4), b=runs(outcomes(0.4), spent=62.0), c=runs(outcomes(0.4), spent=140.0))
    assert found.remarks == ["b spent 62% of its budget", "c spent 140% of its budget"]
    assert found.remarks[0] in str(found)


def test_the_json() -> None:
    row = json.loads(compared(a=outcomes(0.4), b=outcomes(0.8, base=1)).to_json())
    assert row["differences"][0]["real"] is True
    assert row["budget"] == "100s"
    assert {"before", "methods", "sentence", "rule", "prompts", "seeds"} <= row.keys()


def test_the_page_has_curves_over_time_tokens_and_rollouts() -> None:
    page = render(compared(grpo=outcomes(0.4), sft=runs(outcomes(0.7), rollouts=0), **{"<b>x": outcomes(0.4)}))
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<b>x" not in text
    found = re.search(r'<script type="application/json" id="curves-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [axis["title"] for axis in data["axes"].values()] == ["minutes", "tokens", "rollouts", "step"]
    assert set(data["figures"]) == {"result-0", "curve-0", "curve-1"}
    lines = [trace for trace in data["figures"]["curve-0"]["data"] if trace.get("name")]
    assert [(line["name"], line["meta"]) for line in lines] == [("grpo", 0), ("sft", 1), ("&lt;b&gt;x", 2)]
    mean = lines[0]
    assert mean["y"] == pytest.approx([0.01, 0.11, 0.21])  # of three seeds, as far as the shortest goes
    at = {key: [axis["values"][row] for row in mean["customdata"]] for key, axis in data["axes"].items()}
    assert at == {"seconds": [0, 1, 2], "tokens": [0, 100, 200], "rollouts": [0, 8, 16], "step": [0, 1, 2]}
    assert mean["x"] == at["seconds"]
    sft = [data["axes"]["rollouts"]["values"][row] for row in lines[1]["customdata"]]
    assert sft == [None] * 3, "what samples nothing lies nowhere along the rollouts"
    low, high = data["figures"]["curve-0"]["data"][:2]
    assert low["y"] == pytest.approx([0.0, 0.1, 0.2])
    assert high["y"] == pytest.approx([0.02, 0.12, 0.22])
    assert [t["name"] for t in data["figures"]["curve-1"]["data"] if t.get("name")] == ["grpo", "&lt;b&gt;x"]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    for script in re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]
    assert not re.search(
        r"(?:src|href)\s*=\s*(?!\"data:,\")", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    )
