"""The report in headless Chromium: curves are drawn, the table works, and nothing a model wrote runs or loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_run import HACK, append, write_run

from posttrain import report

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1300,1000",
)  # fmt: skip


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not on the PATH; the browser tests need chromium and chromedriver installed")
    return found


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory) -> Path:
    """A run of 400 samples and one more, whose texts are all hostile."""
    run = write_run(tmp_path_factory.mktemp("run"), names=("sft", HACK), notes=[HACK], command=HACK, model=HACK)
    sample = {"stage": 1, "step": 41, "split": HACK, "finish": HACK, "reward": 0.5, "rewards": {HACK: 0.5, "b": 0}}
    append(run / "samples.jsonl", json.dumps(sample | dict.fromkeys(("prompt", "completion", "answer"), HACK)))
    append(run / "metrics.jsonl", json.dumps({"stage": 1, "step": 41, "reward": 1.0, HACK: 1.0}) + "\n")
    append(run / "evaluations.jsonl", json.dumps({"label": HACK, "task": "chain_sum", "accuracy": 0.5}))
    append(run / "recipe.yaml", f"# {HACK}\n")
    report.build(run)
    return run


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(program("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, hostile_run: Path) -> Iterator:
    """The browser with the page freshly opened; after each test nothing ran, nothing loaded, nothing complained."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get((hostile_run / "report.html").as_uri())
    yield browser
    assert browser.execute_script("return typeof window.hacked") == "undefined"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    names = browser.execute_script("return performance.getEntries().map((entry) => entry.name)")
    assert [name for name in names if name.startswith("http")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert any(url.startswith("file:") for url in requests)  # the log is on


def find(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def one(browser, selector: str):
    (element,) = find(browser, selector)
    return element


def rows(browser) -> list[list[str]]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#sample-table tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText))"
    )


def paths(browser, panel: str) -> list[str]:
    """The `d` of the lines in the figure with the title `panel`, each seen to cross most of the figure."""
    found = browser.execute_script(
        "const figure = [...document.querySelectorAll('figure')]"
        ".find((f) => f.querySelector('.metric').textContent === arguments[0]);"
        "return [...figure.querySelectorAll('path.js-line')].map((path) =>"
        " [path.getAttribute('d'), path.getBoundingClientRect().width / figure.clientWidth])",
        panel,
    )
    assert all(share > 0.3 for _, share in found), panel
    return [d for d, _ in found]


def test_curves_are_drawn(opened):
    for panel in ("Reward", "Loss, sft", f"Loss, {HACK}", "Entropy", "KL divergence", "Completion length",
                  "Clip fraction", "Tokens per second"):  # fmt: skip
        drawn = paths(opened, panel)
        assert drawn, panel
        assert all(drawn), panel
    assert len(paths(opened, "Tokens per second")) == 4  # two stages, each with its mean


def test_before_and_after_are_shown_with_their_intervals(opened):
    plot = one(opened, "#results .plot")
    bars = opened.execute_script(
        "return [...arguments[0].querySelectorAll('.bars .point path')].map(p => p.getBoundingClientRect().width)", plot
    )
    assert len(bars) == 4
    assert bars[2] / bars[0] == pytest.approx(0.62 / 0.05, rel=0.05)
    assert len(find(opened, "#results .plot path.xerror")) == 4
    assert "5% [3, 9]" in plot.text
    assert "62% [55, 69]" in plot.text
    assert HACK in [tick.text for tick in find(opened, "#results .plot .ytick text")]
    assert "62% [55, 69]" in one(opened, "#results table").text
    assert "+57.0 percentage points" in one(opened, ".verdict").text


def test_the_other_metrics_are_drawn_when_opened(opened):
    from selenium.webdriver.support.ui import WebDriverWait

    assert paths(opened, "gate_open") == []
    one(opened, "#all-metrics summary").click()
    WebDriverWait(opened, 10).until(lambda browser: paths(browser, "gate_open"))
    assert HACK in [element.text for element in find(opened, "#all-metrics .metric")]


def test_curves_follow_the_axis_and_the_stages(opened):
    title = "return document.querySelector('#curves .plot .xtitle').textContent"
    assert opened.execute_script(title) == "step"
    by_step = paths(opened, "Reward")
    one(opened, "[name=axis][value=time]").click()
    assert opened.execute_script(title) == "minutes"
    assert paths(opened, "Reward") != by_step
    one(opened, "[name=axis][value=step]").click()
    assert paths(opened, "Reward") == by_step
    one(opened, "[name=stage][value='0']").click()
    assert len(paths(opened, "Tokens per second")) == 2
    shown = [element.text for element in find(opened, ".metric") if element.is_displayed()]
    assert "Loss, sft" not in shown
    assert "Reward" in shown


def test_the_table_filters(opened):
    count = one(opened, "#count")
    assert count.text == "401 samples"
    assert len(rows(opened)) == 25
    text = one(opened, "[name=text]")
    text.send_keys("what is 12 + ")
    assert count.text == "10 of 401 samples"
    assert [row[3] for row in rows(opened)] == [f"What is 12 + {k}?" for k in range(10)]
    one(opened, "[name=reward-from]").send_keys("1")
    assert [row[5] for row in rows(opened)] == ["12", "14", "16", "18", "20"]
    one(opened, "[name=split] option[value=heldout]").click()
    assert [row[3] for row in rows(opened)] == ["What is 12 + 0?"]
    text.send_keys("no such text")
    assert rows(opened) == []
    assert count.text == "0 of 401 samples"
    one(opened, "#clear").click()
    assert count.text == "401 samples"
    assert len(rows(opened)) == 25
    one(opened, "[name=step-from]").send_keys("39")
    one(opened, "[name=step-to]").send_keys("39")
    assert {row[0] for row in rows(opened)} == {"39"}
    assert count.text == "10 of 401 samples"
    options = [option.text for option in find(opened, "[name=stage] option")]
    assert options == ["all", HACK]


def test_the_table_sorts_and_turns_pages(opened):
    reward = one(opened, "[data-sort=reward]")
    reward.click()
    assert {row[2].split("\n")[0] for row in rows(opened)} == {"0"}
    reward.send_keys("\n")  # by keyboard
    assert {row[2] for row in rows(opened)} == {"1"}
    assert reward.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    one(opened, "[data-sort=step]").click()
    assert rows(opened)[0][0] == "1"
    assert not one(opened, "[data-page=previous]").is_enabled()
    one(opened, "[data-page=next]").click()
    assert rows(opened)[0][0] == "3"  # ten samples a step, 25 a page
    one(opened, "[data-page=last]").click()
    assert one(opened, "#page-number").text == "Page 17 of 17"
    assert len(rows(opened)) == 1
    assert not one(opened, "[data-page=next]").is_enabled()


def test_hostile_text_is_shown_as_text(opened):
    one(opened, "[name=text]").send_keys("window.hacked")
    ((step, stage, reward, prompt, completion, answer),) = rows(opened)
    assert (step.split("\n")[0], prompt, completion, answer) == ("41", HACK, HACK, HACK)
    assert stage.split("\n") == [HACK, HACK, HACK]
    assert reward.split("\n") == ["0.5", f"{HACK} 0.5", "b 0"]
    assert find(opened, "main img") == []
    assert HACK in one(opened, "h1").text
    for summary in find(opened, "details summary"):
        summary.click()
    assert f"# {HACK}" in one(opened, "#recipe pre").text


def test_long_text_opens_with_its_newlines(browser, tmp_path: Path):
    run = write_run(tmp_path)
    poem = "\n".join(f"line {i}" for i in range(60))
    append(run / "samples.jsonl", json.dumps({"stage": 1, "step": 41, "completion": poem}))
    browser.get(report.build(run).as_uri())
    one(browser, "[name=text]").send_keys("line 59")
    text = one(browser, "#sample-table .completion .text")
    assert text.text == poem
    closed = text.size["height"]
    more = one(browser, ".more")
    assert more.get_attribute("aria-expanded") == "false"
    more.click()
    assert more.get_attribute("aria-expanded") == "true"
    assert text.size["height"] > 5 * closed
    more.click()
    assert text.size["height"] == closed
    one(browser, "[name=full]").click()
    assert one(browser, "#sample-table .completion .text").size["height"] > 5 * closed
