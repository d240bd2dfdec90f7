from __future__ import annotations

import pytest

from posttrain.evaluation.solutions import STEPS, answer_line, isolate_variable, running_results, solver
from posttrain.reward.verifiers import ReasoningGym
from posttrain.trajectory import PosttrainError, Prompt


def test_running_results_by_hand() -> None:
    entry = {"answer": "14", "metadata": {"expression": "12 + 7 - 5"}}
    assert running_results(entry) == "12 + 7 = 19\n19 - 5 = 14\nAnswer: 14"
    assert running_results({"answer": "-3", "metadata": {"expression": "-3"}}) == "Answer: -3"
    decimals = {"answer": "7.140", "metadata": {"expression": "1.42 + 5.720"}}
    assert running_results(decimals) == "1.42 + 5.720 = 7.140\nAnswer: 7.140"


def test_isolate_variable_by_hand() -> None:
    def solve(equation: str, answer: str) -> str | None:
        return isolate_variable({"answer": answer, "metadata": {"equation": equation, "variable": "S"}})

    assert solve("3*S + 5 = 20", "5") == "3*S = 20 - 5 = 15\nS = 15 / 3 = 5\nAnswer: 5"
    assert solve("-2*S - 4 = -10", "3") == "-2*S = -10 + 4 = -6\nS = -6 / -2 = 3\nAnswer: 3"
    assert solve("S - 4 = 6", "10") == "S = 6 + 4 = 10\nAnswer: 10"
    assert solve("0 = 0", "83") is None


@pytest.mark.parametrize("task", sorted(STEPS))
def test_every_worked_solution_ends_in_the_right_answer(task: str) -> None:
    import reasoning_gym
    import torch

    for entry in reasoning_gym.create_dataset(task, seed=11, size=25):
        solution = STEPS[task](entry)
        if solution is None:
            assert entry["metadata"]["equation"] == "0 = 0"
            continue
        prompt = Prompt(torch.zeros(0, dtype=torch.int64), meta={"entry": entry})
        assert ReasoningGym(task)(solution, prompt) == 1
        *steps, last = solution.splitlines()
        assert last == f"Answer: {entry['answer']}"
        for line in steps:  # each equation is true
            left, right = line.split(" = ")[-2:]
            assert eval(left) == pytest.approx(float(right))


def test_answers_over_lines_are_put_in_tags() -> None:
    assert answer_line("5") == "Answer: 5"
    assert answer_line("1 2\n3 4") == "<answer>\n1 2\n3 4\n</answer>"


def test_solver() -> None:
    entry = {"answer": "14", "metadata": {"expression": "12 + 2"}}
    assert solver("chain_sum", "answer")(entry) == "Answer: 14"
    assert solver("rush_hour", "answer")({"answer": None}) is None
    assert solver("chain_sum", "steps")(entry) == "12 + 2 = 14\nAnswer: 14"
    assert solver("chain_sum", lambda e: f"it is {e['answer']}")(entry) == "it is 14"
    with pytest.raises(PosttrainError, match=r"no worked steps are known for sudoku \(known: chain_sum"):
        solver("sudoku", "steps")
    with pytest.raises(PosttrainError, match="did you mean steps"):
        solver("chain_sum", "step")
