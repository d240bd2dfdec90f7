"""The page of sensitivity to decoding: what it shows is what was found, and it is whole by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from posttrain.evaluation.decoding import DecodingSensitivity
from posttrain.evaluation.decoding_grid import DecodingGrid
from posttrain.evaluation.decoding_shift import Shift
from posttrain.evaluation.evaluation import Estimate
from posttrain.report import decoding as page

GRID = DecodingGrid((("temperature", (0.5, 1.0)), ("top_p", (0.8, 1.0))))


def found(right: dict[str, list[float]], problems: int = 40) -> DecodingSensitivity:
    arrays = {name: np.repeat(np.array(row)[:, None], problems, 1) for name, row in right.items()}
    return DecodingSensitivity(
        task="sums",
        grid=GRID,
        models=tuple(right),
        right=arrays,
        accuracy={name: [Estimate(q, q - 0.05, q + 0.05) for q in row] for name, row in right.items()},
        shifts={name: [Shift(float("inf"), 0.125, 0.1, 0.2)] * 4 for name in list(right)[1:]},
        rate=dict.fromkeys(right, 12.0),
        samples=2,
    )


TWO = {"float": [0.5, 0.5, 0.5, 0.5], "small <b>": [0.5, 0.25, 0.5, 0.5]}


def figures(html: str) -> dict[str, dict]:
    held = re.search(r'id="curves-data">(.*?)</script>', html, re.DOTALL)
    assert held
    return json.loads(held[1])["figures"]


def test_heat_maps_and_curves_hold_the_figures() -> None:
    html = page.render(found(TWO))
    drawn = figures(html)
    assert set(drawn) == {"result-axis-temperature", "result-axis-top_p", "result-gain", "result-variation"}
    assert drawn["result-gain"]["data"][0]["z"] == [[0.0, -25.0, 0.0, 0.0]]
    assert drawn["result-variation"]["data"][0]["z"] == [[0.125] * 4]
    assert drawn["result-gain"]["data"][0]["x"] == ["temperature 0.5", "temperature 1", "top_p 0.8", "top_p 1"]
    curve = drawn["result-axis-temperature"]["data"]
    assert [trace["y"] for trace in curve] == [[0.5, 0.5], [0.5, 0.25]]
    assert [trace["x"] for trace in curve] == [[0.5, 1.0]] * 2
    for name in drawn:
        assert f'data-figure="{name}"' in html


def test_names_are_text_and_the_page_loads_nothing() -> None:
    html = page.render(found(TWO))
    assert "<b>" not in html.split("<body>")[1].split("<script")[0]
    assert "small &lt;b&gt;" in html
    assert "default-src &#39;none&#39;" in html
    assert "inf" in html, "a divergence that is infinite stands in the table"


def test_one_model_alone_has_curves_only() -> None:
    html = page.render(found({"float": TWO["float"]}))
    assert set(figures(html)) == {"result-axis-temperature", "result-axis-top_p"}
    assert "result-gain" not in html


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (TWO, "small <b> takes more to temperature than float (+12.5 [+12.5, +12.5] points); small <b> is apart from "
              "float at temperature 1"),
        ({"float": [0.5] * 4, "small": [0.25] * 4}, "small is apart from float at 4 of 4 settings"),
        ({"float": [0.5] * 4, "small": [0.5] * 4}, "No setting tells small from float beyond the noise"),
        ({"float": [0.5, 0.25, 0.5, 0.5]}, "Along temperature, the accuracy of float varies by 12.5% [12.5, 12.5]"),
    ],
)  # fmt: skip
def test_the_sentence(right: dict[str, list[float]], words: str) -> None:
    assert page.sentence(found(right)) == words


def test_it_is_written_whole(tmp_path: Path) -> None:
    page.write(found(TWO), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
