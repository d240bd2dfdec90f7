from __future__ import annotations

from posttrain.methods.taxonomy import Branch, Taxonomy, taxonomy

TREE = taxonomy()


def test_the_cards_are_a_partition() -> None:
    # card 026, check of step 2: every paper has exactly one place
    places = [card for branch in TREE.branches.values() if branch.tag is None for card in branch.cards]
    assert sorted(places) == [f"{number:03d}" for number in range(1, 183)]


def test_the_tree_hangs_together() -> None:
    seen: set[str] = set()
    for branch in TREE.branches.values():
        assert branch.parent is None or branch.parent in seen, f"{branch.id} comes before what it is under"
        seen.add(branch.id)
    assert len(seen) == len(TREE.branches)
    walked = [b.id for top in TREE.children(None) for b in TREE.below(top.id)]
    assert walked == list(TREE.branches)
    assert [b.id for b in TREE.children(None)] == ["1", "2", "3", "4", "5", "6", "7", "X"]
    assert [b.id for b in TREE.children("X")] == [f"X{n}" for n in range(1, 11)]


def test_a_family_may_stand_at_home() -> None:
    for family, home in TREE.home.items():
        assert family in TREE.branches[home].families
    assert set(TREE.home) == {family for branch in TREE.branches.values() for family in branch.families}


def test_branches_that_no_card_covers() -> None:
    empty = {b.id for b in TREE.branches.values() if TREE.holds(b) and not b.cards}
    assert empty == {
        "2.3u", "3.1t", "4.1qk", "4.1ss", "4.1r", "4.2a", "4.2s", "4.2r", "4.2h", "5.2e", "5.2r", "5.3t",
    }  # fmt: skip
    assert not any(TREE.holds(TREE.branches[b]) for b in ("1", "3.2", "4.1", "4.2", "6", "7", "X"))


def test_a_few_places_by_hand() -> None:
    # from the table of card 026
    cards = {"030": "3.2a", "044": "2.1", "046": "1.3", "051": "1.1", "063": "X9", "137": "4.1q", "159": "5.3"}
    for card, branch in cards.items():
        found = TREE.of_card(card)
        assert found is not None
        assert found.id == branch
    assert TREE.of_card("000") is None
    assert TREE.branches["6"].tag == "source"
    assert TREE.branches["6"].cards == ("066", "094", "102", "122", "124")


def test_a_method_stands_by_its_card_where_its_family_may_and_else_at_home() -> None:
    assert TREE.place("hybrid", ["046"]) == "1.3"
    assert TREE.place("policy-gradient", ["046"]) == "3.2a"  # GRPO is no hybrid, though it is on that card
    assert TREE.place("policy-gradient", ["044", "046"]) == "2.1"
    assert TREE.place("preference", []) == "2.3"
    assert TREE.place("quantization", ["000"]) == "4.1q"
    assert TREE.place("a family of yours", ["030"]) is None


def test_a_branch_holds_methods_unless_it_only_joins_others() -> None:
    joint, leaf, both = Branch("a", "A"), Branch("ab", "B", "a"), Branch("ac", "C", "a", ("f",))
    tree = Taxonomy({b.id: b for b in (joint, leaf, both, Branch("acd", "D", "ac"))}, {})
    assert [tree.holds(b) for b in tree.branches.values()] == [False, True, True, True]
