"""Joining other processes: what a launcher says, what it may forget, and that one process is left alone."""

from __future__ import annotations

import pytest
import torch

from posttrain import processes
from posttrain.cli.main import main
from posttrain.processes import Processes, add, add_up, agree, any_of, everyone, gather, here, led, lost, same, start
from posttrain.trajectory import PosttrainError

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_FSDP")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_alone_and_talks_to_itself() -> None:
    assert start() == here() == Processes(0, 1, False)
    assert here().main
    assert not here().several
    value = torch.tensor([1.0, 2.0])
    assert add(value) is value
    assert add_up(2.5) == 2.5
    assert (any_of(True), any_of(False)) == (True, False)
    assert everyone({"a": 1}) == [{"a": 1}]
    assert agree("x") == "x"
    assert led(lambda: 3) == 3
    assert gather({"v": value}, [1]) == [({"v": value}, [1])]
    same(1, "nothing")
    assert not lost(RuntimeError("gloo: connection closed by peer"))


def test_weights_of_one_process_cannot_be_spread() -> None:
    with pytest.raises(PosttrainError, match=r"spread over several processes.*there is one; start several"):
        start(shard=True)
    assert start(shard=False).world == 1


def test_accelerate_that_starts_one_process_for_several_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU `accelerate launch --num_processes 2` starts one process: a run on half of what was asked for."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert start().world == 1, "one process was asked for"
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(PosttrainError, match=r"one process where several were asked for.*--multi_gpu"):
        start()


def test_half_a_launcher_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PosttrainError, match=r"WORLD_SIZE is 2 and RANK, MASTER_ADDR, MASTER_PORT is not set"):
        start()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(PosttrainError, match=r"WORLD_SIZE is 'two'; expected the number of processes"):
        start()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start().world == 1


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PosttrainError, match=r"2 GPUs and at least 3 processes; start one a GPU"):
        start()


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(processes._state, "here", Processes(1, 2))
    monkeypatch.setattr(processes, "everyone", lambda fact: ["a", fact])
    same("a", "the recipe")
    with pytest.raises(PosttrainError, match=r"differ in the recipe: process 0 has 'a', process 1 'b'"):
        same("b", "the recipe")


def test_an_error_of_the_first_is_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(processes._state, "here", Processes(1, 2))
    monkeypatch.setattr(processes, "agree", lambda fact: "the folder is taken")
    with pytest.raises(PosttrainError, match="the folder is taken"):
        led(lambda: pytest.fail("the first alone does it"))
    monkeypatch.setattr(processes, "agree", lambda fact: None)
    assert led(lambda: pytest.fail("the first alone does it")) is None


def test_errors_of_a_lost_process_are_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(processes._state, "here", Processes(0, 2))
    assert lost(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"))
    assert not lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost(ValueError("gloo"))


def test_other_commands_refuse_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["methods", "list"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "posttrain: process 1: error: several processes carry out run and train alone; start this command without a "
        "launcher\n"
    )
