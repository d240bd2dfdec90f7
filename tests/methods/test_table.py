from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from posttrain import methods
from posttrain.data.sampler import Undecided
from posttrain.methods import Method, Pipeline, table
from posttrain.methods.registry import Entry
from posttrain.methods.verdicts import Verdict
from posttrain.objective.advantage import Demonstration
from posttrain.objective.estimator import Objective
from posttrain.objective.mixture import Mixture, Term
from posttrain.objective.schedule import Decline
from posttrain.trajectory import PosttrainError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["unified-estimator.md", "choosing-a-method.md", "compression.md"])
def test_the_tables_in_the_documentation_are_those_of_the_catalogue(page: str) -> None:
    written = (DOCS / page).read_text(encoding="utf-8")
    assert written == table.filled(written), "write them anew: python -m posttrain.methods.table"


def test_the_pages_with_tables_are_found() -> None:
    pages = {page.name for page in table.documents()}
    assert {"unified-estimator.md", "choosing-a-method.md", "compression.md"} <= pages
    held = "".join(page.read_text(encoding="utf-8") for page in table.documents())
    assert all(f"<!-- table: {name} -->" in held for name in table.TABLES)


def entry(name: str, function: Callable[[], Method | Pipeline], family: str = "f", card: str | None = None) -> Entry:
    return Entry(name, family, card, function)


def rows(text: str) -> list[list[str]]:
    """Cells of a table's lines, without its ruler."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_methods_by_family_without_the_columns_that_are_empty_there() -> None:
    found = table.methods_table([
        entry("sft", methods.sft, "a", "044"), entry("dft", methods.dft, "a"), entry("ppo", methods.ppo, "b"),
    ])  # fmt: skip
    first, second = found.split("### ")[1:]
    assert first.startswith("a\n")
    assert rows(first) == [
        ["method", "card", "advantage", "denominator", "aggregation"],
        ["**sft**", "044", "`Demonstration`", "`CurrentPolicy`", "`TokenMean`"],
        ["**dft**", "", "`Demonstration`", "`One`", "`TokenMean`"],
    ]
    assert rows(second)[1][4:] == ["`Clip`", "`TokenMean`", "`CriticLoss`", "critic `True`"]


def mixed() -> Method:
    imitation = Term(Objective(Demonstration()), ("expert",), Decline(0.9, 0.1))
    rl = methods.grpo().objective
    assert isinstance(rl, Objective)
    return methods.grpo().replace(objective=Mixture((Term(rl, ("policy", "replay")), imitation)), critic=True)


def test_a_row_a_term_and_a_row_a_stage() -> None:
    found = rows(table.methods_table([
        entry("both", mixed, card="046"), entry("chain", lambda: methods.sft() >> mixed(), card="009"),
    ]))  # fmt: skip
    told = [[row[0], row[1], row[2], row[-1]] for row in found[1:]]
    assert told == [
        ["**both**<br>on policy, replay", "046", "`GroupNormalised`", "critic `True`"],
        ["on expert, times `Decline(0.9, 0.1)`", "", "`Demonstration`", ""],
        ["**chain**<br>stage 1: sft", "009", "`Demonstration`", ""],
        ["stage 2: grpo<br>on policy, replay", "", "`GroupNormalised`", "critic `True`"],
        ["on expert, times `Decline(0.9, 0.1)`", "", "`Demonstration`", ""],
    ]


def test_parts_by_kind_with_those_inside_of_others() -> None:
    def chosen() -> Method:
        return methods.dpo().replace(sampler=partial(Undecided))

    found = [row[:2] for row in rows(table.parts_table([entry("dpo", chosen), entry("both", mixed)]))]
    assert found[1:] == [
        ["advantage", "`Demonstration`"],
        ["", "`GroupNormalised`"],
        ["", "`Preference`"],
        ["pair loss", "`Sigmoid`"],
        ["denominator", "`CurrentPolicy`"],
        ["", "`OldPolicy`"],
        ["mask", "`Clip`"],
        ["aggregation", "`GroupMean`"],
        ["", "`SequenceMean`"],
        ["", "`TokenMean`"],
        ["schedule", "`Decline`"],
        ["sampler", "`Shuffled`"],
        ["", "`Undecided`"],
        ["rollouts", "`Plain`"],
    ]


def test_compression_methods_are_in_a_table_of_their_own() -> None:
    both = [entry("sft", methods.sft, "a"), entry("gptq", methods.gptq, "q", "000"),
            entry("small", lambda: methods.rtn(2, 64), "q", "024")]  # fmt: skip
    assert rows(table.compression_table(both)) == [
        ["method", "card", "solver", "grid"],
        ["**gptq**", "000", "`GPTQ`", "`Uniform`"],
        ["**small**", "024", "`RoundToNearest`", "`Uniform(bits=2, group=64)`"],
    ]
    assert "gptq" not in table.methods_table(both)
    assert "sft" in table.methods_table(both)
    assert rows(table.parts_table(both)) == rows(table.parts_table(both[:1]))


def test_parts_of_compression_and_the_formats() -> None:
    found = [row[:2] for row in rows(table.compression_parts_table([entry("gptq", methods.gptq)]))]
    assert found[1:3] == [["solver", "`GPTQ`"], ["grid", "`Uniform`"]]
    assert "`UniformWeight`" in [name for _, name in found]
    assert found[3][0] == "stored as"


class Part:
    r"""Mean of :math:`a|b`
    and ``c``:

    .. math::
        x_t = |y|

    More.
    """


class Plain:
    """One sentence. Another.

    More.
    """


def test_the_first_paragraph_of_a_part_and_its_equation() -> None:
    assert table.explained(Part) == r"Mean of $a\vert b$ and `c`: $x_t = \vert y\vert $"
    assert table.explained(Plain) == "One sentence. Another"


def test_results() -> None:
    assert table.results_table([]) == "No study has been run yet."
    found = [
        Verdict("second", ("grpo", "dapo"), "A | B.", "fails", "-1 [-2, 0]", ("046",), 3),
        Verdict("first", ("dft",), "C.", "holds"),
    ]
    assert table.results_table(found).splitlines() == [
        "| method | card | claim | verdict | what was measured | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| dft |  | C. | **holds** |  |  |",
        r"| grpo, dapo | 046 | A \| B. | **fails** | -1 [-2, 0] | 3 |",
    ]


def test_filling_in_touches_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: results -->\nstale words\n<!-- end of table -->\nafter\n")
    table.main([str(page)])
    assert capsys.readouterr().out == f"{page}: written\n"
    text = page.read_text()
    assert text.startswith("before\n<!-- table: results -->\n\n")
    assert text.endswith("\n\n<!-- end of table -->\nafter\n")
    assert "stale words" not in text
    table.main([str(page)])
    assert capsys.readouterr().out == f"{page}: as it should be\n"
    assert page.read_text() == text


def test_a_place_for_a_table_that_there_is_not() -> None:
    with pytest.raises(PosttrainError, match=r"page has a place for a table 'x'; expected one of methods, "):
        table.filled("<!-- table: x -->\n<!-- end of table -->", "page")
