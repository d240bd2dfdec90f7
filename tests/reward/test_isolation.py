"""Isolated rewards: what hangs, crashes or eats memory costs its own score, and nothing else."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_rewards
import pytest
import torch

from posttrain import methods
from posttrain.reward.isolation import Isolated, Limits, Sandbox, limits_from
from posttrain.reward.reward import Reward, reward_from
from posttrain.reward.scorers import Answer
from posttrain.trajectory import PosttrainError, Prompt
from tiny_training import online, same, weights

FILE = Path(__file__).with_name("faulty_rewards.py")
OBEY = f"{FILE}:obey"
MEMORY = 300 << 20


def answers(*completions: str, answer: Any = "4") -> list[Answer]:
    prompt = Prompt(torch.tensor([5, 6]), text="2 + 2", answer=answer, key=3)
    return [Answer(prompt, text, 2, "stop") for text in completions]


def isolated(*, source: str = OBEY, weight: float = 1.0, **limits: Any) -> Reward:
    spec = {source: weight, "on_error": -1.0, "isolate": {"timeout": 1.0, "memory": MEMORY, "workers": 2, **limits}}
    return reward_from(spec)


def sandbox(reward: Reward) -> Sandbox:
    (component,) = (f for f, _ in reward.components.values())
    assert isinstance(component, Isolated)
    return component.sandbox


@pytest.fixture(scope="module")
def reward() -> Iterator[Reward]:
    """One for all tests: its warden starts once. Every test counts afresh."""
    made = isolated()
    yield made
    sandbox(made).close()


@pytest.fixture(scope="module")
def patient() -> Iterator[Reward]:
    """For calls that take their time on a busy machine."""
    made = isolated(timeout=120.0)
    yield made
    sandbox(made).close()


def totals(reward: Reward, *completions: str) -> list[float]:
    return [score.total for score in reward.score_all(answers(*completions))]


def test_it_scores_as_the_reward_in_this_process(reward: Reward) -> None:
    texts = ["answer", "", "sieben", "raise no", "nan", *(str(i) * (i % 7) for i in range(100))]
    here = reward_from({OBEY: 1.0, "on_error": -1.0}).score_all(answers(*texts))
    found = reward.afresh().score_all(answers(*texts))
    assert found == here, "values, parts and messages"
    assert found[0].total == 4 + 2 + 0.5
    assert found[3].errors == {"obey": "obey: ValueError: no"}
    assert reward.score(answers("x")[0].prompt, "abc", tokens=1, finish="stop").total == 3


@pytest.mark.parametrize(
    ("does", "kind", "message"),
    [
        ("hang", "timeout", "obey: no answer within 1 s"),
        ("spin", "timeout", "obey: no answer within 1 s"),
        ("exit 3", "crash", "obey: its process ended (exit code 3)"),
        ("sys-exit 0", "crash", "obey: its process ended (exit code 0)"),
        ("segfault", "crash", "obey: its process ended (SIGSEGV)"),
        ("kill", "crash", "obey: its process ended (SIGKILL: out of memory, perhaps)"),
        (f"eat {2 * MEMORY}", "memory", "obey: more than isolate: memory allows (MemoryError: )"),
        (f"eat-tensor {2 * MEMORY}", "memory", "obey: more than isolate: memory allows (RuntimeError: "),
        ("write", "crash", "obey: its process ended"),
        ("raise x", "raised", "obey: ValueError: x"),
    ],
)
def test_a_fault_costs_its_own_score(reward: Reward, does: str, kind: str, message: str) -> None:
    counted = reward.afresh()
    scores = counted.score_all(answers("a", "bb", does, "dddd", "eeeee"))
    assert [s.total for s in scores] == [1, 2, -1, 4, 5]
    assert scores[2].parts == {"obey": -1.0}
    assert scores[2].errors["obey"].startswith(message)
    assert dict(counted.faults["obey"]) == {kind: 1}
    assert counted.errors == {"obey": 1}
    assert counted.first_error == scores[2].errors["obey"]
    assert counted.failures() == ("obey 1" if kind == "raised" else f"obey 1 ({kind} 1)")
    assert not reward.errors["obey"], "each copy counts for itself"


def test_many_faults_at_once(reward: Reward) -> None:
    """Over several pieces, and each kind several times."""
    counted = reward.afresh()
    texts = [["ab", "exit 1", "hang", f"eat {2 * MEMORY}", "c" * (i % 5)][i % 5 if i < 10 else 4] for i in range(70)]
    expected = [float(len(t)) if t[:1] not in "eh" or not t else -1.0 for t in texts]
    assert totals(counted, *texts) == expected
    assert dict(counted.faults["obey"]) == {"crash": 2, "timeout": 2, "memory": 2}


def test_memory_within_the_limit_is_free_to_use(patient: Reward) -> None:
    assert totals(patient.afresh(), f"eat {MEMORY // 2}") == [MEMORY // 2]


def test_what_earlier_calls_left_behind_is_not_blamed_on_the_next(patient: Reward) -> None:
    """Each call leaks a third of the limit: no call fails, as a fresh worker tries it again."""
    counted = patient.afresh()
    text = f"leak {MEMORY // 3}"
    assert totals(counted, *[text] * 12) == [len(text)] * 12
    assert counted.errors == {"obey": 0}


def test_what_a_hanging_call_started_ends_with_it(reward: Reward, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert totals(reward.afresh(), f"hang-with-child {file}") == [-1]
    child = int(file.read_text())
    for _ in range(100):
        if not alive(child):
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the process that the hanging call had started went on")


def alive(pid: int) -> bool:
    """Whether a process runs (one that ended and that nobody asked after does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_random_numbers_follow_from_the_call(reward: Reward) -> None:
    """Whichever worker makes it, and whatever it did before."""
    first = totals(reward, "random", "random b")
    assert first[0] != first[1]
    assert totals(reward, *["x"] * 40, "random b", "hang", "random")[-3::2] == [first[1], first[0]]


def test_slow_calls_share_the_workers(reward: Reward) -> None:
    pids = set(totals(reward, *["pid"] * 3 * 16))
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_warden_that_is_killed_is_replaced(reward: Reward) -> None:
    totals(reward, "x")
    end = sandbox(reward)._end
    process = end.peek()[2][0]  # type: ignore[attr-defined]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert totals(reward, "a", "bb") == [1, 2]


def test_it_ends_with_its_owner(capfd: pytest.CaptureFixture[str]) -> None:
    own = isolated(workers=1)
    worker = int(totals(own, "pid", "print hello")[0])
    warden = sandbox(own)._end.peek()[2][0]  # type: ignore[attr-defined]
    assert alive(worker)
    sandbox(own).close()
    assert warden.returncode is not None
    assert not alive(worker)
    sandbox(own).close()  # again is nothing
    printed = capfd.readouterr()
    assert "hello" in printed.err
    assert "hello" not in printed.out, "what a component prints is no output of the program"


def test_components_with_arguments_classes_and_callables() -> None:
    spec = {
        f"{FILE}:Scaled": {"factor": 3, "weight": 2.0},
        "long": {"verifier": "length", "maximum": 4, "weight": 1.0},
        "exact_match": 1.0,
        "brief": faulty_rewards.slow,
        "isolate": {"workers": 1},
    }
    own = reward_from(spec)
    here = reward_from({k: v for k, v in spec.items() if k != "isolate"})
    assert own.score_all(answers("4", "four!!")) == here.score_all(answers("4", "four!!"))
    assert own.weights == {"Scaled": 2.0, "long": 1.0, "exact_match": 1.0, "brief": 1.0}
    copied = copy.deepcopy(own)
    assert copied.components["Scaled"][0].sandbox is sandbox_of(own)
    assert own.components["exact_match"][0]("4", answers("4")[0].prompt) == 1.0, "alone it is a callable as any other"
    again = pickle.loads(pickle.dumps(own))  # as another process gets it: with a warden of its own
    assert again.score_all(answers("4")) == own.score_all(answers("4"))
    for reward in (own, again):
        sandbox_of(reward).close()


def sandbox_of(reward: Reward) -> Sandbox:
    return next(f.sandbox for f, _ in reward.components.values() if isinstance(f, Isolated))


def test_a_component_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    """It needs more memory than is allowed, or ends its process, where the recipe's check did not."""
    file = tmp_path / "gone_rewards.py"
    big = "BIG = bytearray(1 << 28)\n\ndef brief(completion, prompt):\n    return 1.0\n"
    file.write_text(big)
    own = reward_from({f"{file}:brief": 1.0, "isolate": {"memory": "100MiB"}})
    with pytest.raises(PosttrainError, match=r"cannot import it: MemoryError"):
        totals(own, "a")
    file.write_text("import os\nif os.environ.get('DIE'):\n    os._exit(7)\n" + big.partition("\n\n")[2])
    own = reward_from({f"{file}:brief": 1.0, "isolate": True})
    os.environ["DIE"] = "1"
    try:
        with pytest.raises(PosttrainError, match=r"the process that loads it ended \(exit code 7\)"):
            totals(own, "a")
    finally:
        del os.environ["DIE"]


def test_training_goes_on(tmp_path: Path) -> None:
    """A step whose reward hangs and crashes now and then; the weights are those of a run scored in this process by a
    reward that gives the declared value there."""
    source = tmp_path / "sometimes.py"
    source.write_text(
        "import os, time\n"
        "def reward(completion, prompt):\n"
        "    if len(completion) % 5 == 1:\n        os._exit(1)\n"
        "    if len(completion) == 7:\n        time.sleep(1000)\n"
        "    return len(completion) / 10\n"
    )

    def declared(completion: str, prompt: Prompt) -> float:
        return -0.5 if len(completion) % 5 == 1 or len(completion) == 7 else len(completion) / 10

    method = methods.grpo().with_settings(steps=2, batch=3, group=4, max_tokens=8, learning_rate=1e-3)
    spec = {f"{source}:reward": 1.0, "on_error": -0.5, "isolate": {"timeout": 0.5}}
    found, expected = online(method, reward=spec), online(method, reward=declared)  # type: ignore[arg-type]
    for trainer in (found, expected):
        trainer.run()
    assert found.source.reward.errors["reward"] > 0
    assert same(weights(found.policy), weights(expected.policy))
    sandbox(found.source.reward).close()


# -- what a recipe may say ---------------------------------------------------------------------------------------------


def test_limits() -> None:
    assert limits_from(False) is limits_from(None) is None
    assert limits_from(True) == Limits()
    found = limits_from({"timeout": 5, "memory": "2GiB", "workers": 3})
    assert found == Limits(5, 2 << 30, 3)
    sizes = {"1024": 1024, 4096: 4096, "1.5 KiB": 1536, "500MB": 500_000_000, "2gb": 2_000_000_000, "1mib": 1 << 20}
    for text, size in sizes.items():
        assert limits_from({"memory": text}) == Limits(memory=size)
    assert limits_from({"memory": None}) == Limits(memory=None)


@pytest.mark.parametrize(
    ("isolate", "message"),
    [
        ("yes", "isolate is 'yes'; expected true, or such as"),
        (2, "isolate is 2"),
        ({"time": 5}, "unknown setting of isolate 'time'; did you mean timeout"),
        ({"timeout": 0}, "timeout is 0; expected seconds above 0"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"timeout": True}, "timeout is True"),
        ({"workers": 1.5}, "workers is 1.5; expected a number of processes above 0"),
        ({"memory": "much"}, "memory is 'much'; expected bytes, or such as 500MB, 2GiB, or null"),
        ({"memory": 0}, "memory is 0"),
        ({"memory": "1.2.3GB"}, "memory is '1.2.3GB'"),
        ({"memory": True}, "memory is True"),
    ],
)
def test_limits_that_are_none(isolate: Any, message: str) -> None:
    with pytest.raises(PosttrainError, match=message) as caught:
        reward_from({"exact_match": 1.0, "isolate": isolate})
    assert "\n" not in str(caught.value)


def test_a_callable_that_no_other_process_finds() -> None:
    with pytest.raises(PosttrainError, match=r"reward mine: .*put it into a module of its own"):
        reward_from({"mine": lambda completion, prompt: 1.0, "isolate": True})
    own = reward_from({"exact_match": 1.0, "isolate": True})
    prompt = Prompt(torch.tensor([1]), answer="4", meta={"judge": lambda: None})
    with pytest.raises(PosttrainError, match="reward exact_match: a prompt cannot be sent to another process"):
        own.score(prompt, "4", tokens=1, finish="stop")


def test_isolation_is_for_components() -> None:
    with pytest.raises(PosttrainError, match="at least one component"):
        reward_from({"isolate": True})
