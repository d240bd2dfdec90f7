"""Two styles of one task: the verifier takes both, and says which one it saw."""

from __future__ import annotations

import pytest
from scoring import score

from posttrain.lab.worlds import arithmetic, styles


@pytest.mark.parametrize(
    ("text", "style"), [("103", "terse"), ("ans: 1 0 3", "spaced"), ("6+7=13 4+5+1=10 103", "worked"), ("hm", None)]
)
def test_the_style_is_told(text, style):
    task = styles(train=0, heldout=0)
    item = next(i for i in arithmetic(train=400, heldout=0).train if int(i.answer) > 0)
    parts = score(task, item, text).parts
    assert {name: parts[name] for name in ("terse", "spaced", "worked")} == {
        name: float(name == style) for name in ("terse", "spaced", "worked")
    }


def test_styles_share_their_problems_and_differ_in_demonstrations():
    terse, spaced = styles(style="terse", train=50, heldout=20), styles(style="spaced", train=50, heldout=20)
    assert [i.prompt for i in terse.heldout] == [i.prompt for i in spaced.heldout]
    for a, b in zip(terse.train, spaced.train, strict=True):
        assert a.prompt == b.prompt
        assert b.solution == "ans: " + " ".join(str(a.solution))
        for task in (terse, spaced):
            assert score(task, a, str(a.solution)).total == score(task, a, str(b.solution)).total == 1.0
    assert terse.sampling.max_tokens == spaced.sampling.max_tokens == styles(style="worked").sampling.max_tokens
