"""vLLM as a server: started and killed, attached to by URL, guarded by its token, trained with."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from vllm_models import GREEDY, assert_same, become, embedded, make_policy, prompts, tokens

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.vllm import served
from posttrain.rollout.vllm.backend import EngineLost, Request, sampling_parameters
from posttrain.rollout.vllm.engine import VllmEngine
from posttrain.rollout.vllm.guard import TOKEN
from posttrain.rollout.vllm.served import Served
from posttrain.rollout.vllm.started import Started
from posttrain.trajectory import PosttrainError, Sampling

pytestmark = pytest.mark.vllm
UNTIED = {"tie_word_embeddings": False}
ROUTES = [
    ("GET", "/health"), ("GET", "/v1/models"), ("GET", "/weight_info"), ("GET", "/metrics"), ("GET", "/docs"),
    ("POST", "/v1/completions"), ("POST", "/start_weight_update"), ("POST", "/update_weights"),
    ("POST", "/collective_rpc"), ("POST", "/invocations"), ("POST", "/pause"), ("GET", "/no-such-route"),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    said: list[str] = []
    made = VllmEngine(make_policy(**UNTIED), Started(options={"max_model_len": 256}), say=said.append)
    made.said = said  # type: ignore[attr-defined]
    made.generate(prompts(1), 1, GREEDY, 0)
    yield made
    group = process_of(made).pid
    made.close()
    assert not alive(group)


@pytest.fixture
def policy(engine: VllmEngine) -> CausalPolicy:
    policy = make_policy(**UNTIED)
    engine.serve(policy)
    return policy


def process_of(engine: VllmEngine) -> subprocess.Popen[bytes]:
    assert isinstance(engine.backend, Started)
    assert engine.backend.process is not None
    return engine.backend.process


def server_of(engine: VllmEngine) -> tuple[str, str]:
    assert isinstance(engine.backend, Started)
    assert engine.backend.server.token is not None
    return engine.backend.server.url, engine.backend.server.token


def alive(group: int) -> bool:
    """Whether any process of a group lives; one that has ended and was not waited for does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(of) == group and state != "Z":
            return True
    return False


def test_completions_are_the_embedded_engines(engine: VllmEngine, policy: CausalPolicy) -> None:
    assert_same(engine.generate(prompts(), 1, GREEDY, 0), embedded(policy))


def test_weights_change_in_place(engine: VllmEngine, policy: CausalPolicy) -> None:
    before, process = engine.generate(prompts(), 1, GREEDY, 0), process_of(engine)
    become(policy, make_policy(3, **UNTIED))
    after = engine.generate(prompts(), 1, GREEDY, 0)
    assert tokens(after) != tokens(before)
    assert_same(after, embedded(policy))
    assert process_of(engine) is process
    assert process.poll() is None


def test_only_this_machine_reaches_it(engine: VllmEngine) -> None:
    port = urlsplit(server_of(engine)[0]).port
    listening = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize("token", [None, "wrong"])
def test_nothing_answers_without_the_token(engine: VllmEngine, token: str | None) -> None:
    parts = urlsplit(server_of(engine)[0])
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    for method, path in ROUTES:
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)
        connection.request(method, path, "{}" if method == "POST" else None, headers)
        assert connection.getresponse().status == 401, path
        connection.close()
    with pytest.raises(PosttrainError, match=rf"answered 401: its token .* {TOKEN}"):
        Served(server_of(engine)[0], token).check()


def test_attached_by_url_weights_go_over_the_wire(
    engine: VllmEngine, policy: CausalPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several pieces; and whoever draws next finds that the server holds other weights than its own."""
    sent = []
    pieces = served.Weights.pieces
    monkeypatch.setattr(
        served.Weights, "pieces", lambda self: [sent.append(len(p)) or p for p in pieces(self, 100_000)]
    )
    other = VllmEngine(make_policy(5, **UNTIED), Served(*server_of(engine)))
    assert_same(other.generate(prompts(), 1, GREEDY, 0), embedded(other.policy))
    assert len(sent) > 3
    assert other.max_length == 256
    other.close()
    assert process_of(engine).poll() is None, "a server that was attached to goes on"
    assert_same(engine.generate(prompts(), 1, GREEDY, 0), embedded(policy))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 3}, r"did not take the weights|refused the request"),
        ({"intermediate_size": 320}, r"does not compute tiny-0 as the trainer does"),  # which vLLM cuts to its size
    ],
)
def test_a_server_of_another_model_is_noticed(
    engine: VllmEngine, policy: CausalPolicy, config: dict[str, int], message: str
) -> None:
    """And finds its own way back: weights of an update that broke off are not trusted, nor in the way of the next."""
    other = VllmEngine(make_policy(0, **config, **UNTIED), Served(*server_of(engine)))
    with pytest.raises(PosttrainError, match=message):
        other.generate(prompts(1), 1, GREEDY, 0)
    other.close()
    assert_same(engine.generate(prompts(), 1, GREEDY, 0), embedded(policy))


def test_it_is_trained_with(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run whose engine is the server's URL: the weights that drew are the trainer's, step after step."""
    from posttrain.api import train

    url, token = server_of(engine)
    monkeypatch.setenv(TOKEN, token)
    policy = make_policy(7, **UNTIED)
    before = [p.detach().clone() for p in policy.model.parameters()]
    task = {"reasoning_gym": "chain_sum", "terms": [2, 2], "digits": [1, 1], "train": 8, "heldout": 2}
    run = train(
        policy, "grpo", task, reward=letters, folder=tmp_path / "run", engine=url, show=False, steps=3, batch=2,
        group=4, max_tokens=12, learning_rate=1e-2, evaluate={"max_tokens": 4},
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "sampler_kl" in row]
    assert len(rows) == 3
    assert max(abs(row["sampler_kl"]) for row in rows) < 1e-3
    assert max(row["sampler_chi2"] for row in rows) < 1e-4
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.model.parameters(), strict=True))
    assert run.after is not None


def letters(completion: str, prompt: object) -> float:
    return sum(c.isalpha() for c in completion) / (1 + len(completion))


def test_a_server_that_hangs_is_noticed(
    engine: VllmEngine, policy: CausalPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts connections and answers none."""
    monkeypatch.setattr(served, "HEARTBEAT", 1.0)
    group, attached = process_of(engine).pid, Served(*server_of(engine))
    asked = [Request(prompts(1)[0].tokens.tolist(), 8, 0)]
    os.killpg(group, signal.SIGSTOP)
    try:
        with pytest.raises(EngineLost, match=r"does not answer .*timed out"):
            attached.generate(asked, sampling_parameters(GREEDY, []), lambda count: None)
    finally:
        os.killpg(group, signal.SIGCONT)
    assert_same(engine.generate(prompts(), 1, GREEDY, 0), embedded(policy))


def test_killed_in_the_middle_of_a_rollout_it_is_repeated(engine: VllmEngine, policy: CausalPolicy) -> None:
    """The same completions come out as if nothing had happened, by the present weights, not those it started with."""
    become(policy, make_policy(8, **UNTIED))
    sampling = Sampling(max_tokens=160)
    undisturbed = engine.generate(prompts(), 12, sampling, 1)
    victim, told = process_of(engine), []

    def kill(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 1:
            assert done < total
            os.kill(victim.pid, signal.SIGKILL)

    repeated = engine.generate(prompts(), 12, sampling, 1, kill)
    assert victim.poll() == -signal.SIGKILL
    assert not alive(victim.pid), "its workers have ended too"
    assert process_of(engine).pid != victim.pid
    assert_same(repeated, undisturbed)
    assert told[-1] == 48
    (said,) = engine.said  # type: ignore[attr-defined]
    assert "ended with signal 9 (SIGKILL)" in said


def test_a_server_that_is_gone_is_waited_for_and_then_given_up(engine: VllmEngine, policy: CausalPolicy) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(PosttrainError, match=r"does not answer .*refused.*; expected a vLLM server there"):
        Served(nobody, "token").check()
    url, token = server_of(engine)
    attached = Served(url, token, patience=0.5)
    follower = VllmEngine(policy, attached, say=lambda text: None)
    follower.generate(prompts(1), 1, GREEDY, 0)
    attached.server = type(attached.server)(nobody, token)
    with pytest.raises(PosttrainError, match=r"waited 0 s: start it again \(posttrain serve\) and resume the run"):
        follower.generate(prompts(1), 1, GREEDY, 0)
    follower.close()


def test_posttrain_serve_and_what_it_refuses(tmp_path: Path) -> None:
    """The command, in a process of its own; interrupted, it ends with its workers."""
    policy = make_policy(2)
    policy.save(tmp_path / "model")
    program = [sys.executable, "-m", "posttrain.cli.main", "serve"]
    gone = subprocess.run([*program, str(tmp_path / "nowhere/at all")], capture_output=True, text=True, timeout=120)
    assert gone.returncode == 1
    assert "no model at" in gone.stderr.splitlines()[-1]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        taken = subprocess.run(
            [*program, str(tmp_path / "model"), "--port", str(port)], capture_output=True, text=True, timeout=120
        )
    assert taken.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in taken.stderr.splitlines()[-1]
    server = subprocess.Popen(
        [*program, str(tmp_path / "model"), "--port", str(port), "--precision", "fp32",
         "--options", "{max_model_len: 64}"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        token = ""
        for line in server.stderr:
            if f"export {TOKEN}=" in line:
                token = line.strip().rpartition("=")[2]
                break
        attached = Served(f"http://127.0.0.1:{port}", token, patience=900)
        attached.recover(tmp_path, None)  # type: ignore[arg-type] - which waits for it
        engine = VllmEngine(policy, attached)
        assert_same(engine.generate(prompts(), 1, GREEDY, 0), embedded(policy))
        engine.close()
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
        server.stderr.read()
        assert server.wait(60) == 0
    finally:
        if alive(server.pid):
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_it_ends_with_its_trainer(engine: VllmEngine) -> None:
    """A trainer that is killed closes nothing but its end of the pipe. The last test: the server is gone after it."""
    process = process_of(engine)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)
    deadline = time.monotonic() + 15
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid)
