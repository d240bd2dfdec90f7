"""vLLM behind HTTP: a running server that the engine is attached to."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from posttrain.rollout.vllm.backend import CHANGING, Answer, Done, EngineLost, Request, Shape, ended
from posttrain.rollout.vllm.http import Server
from posttrain.rollout.vllm.weights import Weights
from posttrain.trajectory import PosttrainError

CONNECTIONS = 256  # requests under way together at most; the server queues those beyond its rows
HEARTBEAT = 5.0  # seconds without a finished completion after which the server is asked whether it lives
MISSED = 3  # heartbeats in a row that may fail
PATIENCE = 300.0  # seconds that a server may be away before the rollout is given up
UPDATE_SECONDS = 1800.0  # for one message of weights


class Served:
    """A server at a URL, such as `posttrain serve` starts. Weights go to it over the wire, or as the path of a folder
    that it sees too (`shared`).

    patience: seconds that it may be away before `recover` gives up.
    """

    def __init__(self, url: str, token: str | None, *, shared: bool = False, patience: float = PATIENCE) -> None:
        self.server = Server(url, token)
        self.shared, self.patience = shared, patience
        self._running = False
        self._limit: int | None = None

    @property
    def exact_precision(self) -> bool:
        return False  # it was started by somebody else

    @property
    def where(self) -> str:
        return f"the vLLM server at {self.server.url}"

    @property
    def running(self) -> bool:
        return self._running

    @property
    def max_length(self) -> int | None:
        return self._limit

    def check(self) -> None:
        """It answers, takes the token, and can be given weights."""
        try:
            self._greet()
        except EngineLost as lost:
            raise PosttrainError(f"{lost}; expected a vLLM server there: start one with posttrain serve") from lost

    def start(self, folder: Path, shape: Shape) -> None:
        self._greet()
        self._running = True

    def _greet(self) -> None:
        self.server.get("/health")
        models = self.server.get("/v1/models")
        found = models.get("data") if isinstance(models, dict) else None
        if not found:
            raise PosttrainError(f"{self.where} serves no model; expected a vLLM server")
        self._limit = found[0].get("max_model_len")
        self.version()

    def version(self) -> str:
        return str(self.server.get("/weight_info")["weight_version"])

    def update(self, weights: Weights) -> None:
        try:
            self._update(weights)
        except EngineLost as lost:
            self.server.get("/health")  # where it lives, it would fail again
            raise PosttrainError(f"{self.where} did not take the weights ({lost}); is it the same model?") from lost

    def _update(self, weights: Weights) -> None:
        self.server.post("/update_weight_version", {"new_version": CHANGING})
        self.server.post("/init_weight_transfer_engine", {"init_info": {}})
        try:
            self.server.post("/start_weight_update")
        except EngineLost:  # an update that broke off is still open: close it, and begin anew
            self.server.post("/finish_weight_update", {}, UPDATE_SECONDS)
            self.server.post("/start_weight_update")
        if self.shared:
            self._send({"folder": str(weights.folder), "files": weights.files})
        else:
            for piece in weights.pieces():
                text = base64.b64encode(piece).decode()
                self._send({"data": text, "digest": hashlib.sha256(piece).hexdigest()})
        self._send({"complete": True})
        self.server.post("/finish_weight_update", {"weight_version": weights.version}, UPDATE_SECONDS)
        if not self.server.post("/reset_prefix_cache").get("success"):
            raise EngineLost(f"{self.where} kept prompts that it cached by the weights before")

    def _send(self, message: dict[str, Any]) -> None:
        self.server.post("/update_weights", {"update_info": message}, UPDATE_SECONDS)

    def generate(self, asked: Sequence[Request], sampling: dict[str, Any], done: Done) -> list[Answer]:
        with ThreadPoolExecutor(min(CONNECTIONS, len(asked)), thread_name_prefix="vllm") as pool:
            futures = [pool.submit(self._complete, request, sampling) for request in asked]
            try:
                self._watch(futures, done)
            except BaseException:
                for future in futures:
                    future.cancel()
                while not all(future.done() for future in futures):
                    self.server.hang_up()
                    wait(futures, 0.1)
                raise
        return [future.result() for future in futures]

    def _complete(self, request: Request, sampling: dict[str, Any]) -> Answer:
        body = {
            **sampling,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            "return_token_ids": True,
        }
        answer = self.server.post("/v1/completions", body, timeout=None)
        try:
            (choice,) = answer["choices"]
            found = Answer(
                choice["token_ids"], choice["logprobs"]["token_logprobs"], ended(choice["finish_reason"], self.where)
            )
            if len(found.tokens) != len(found.logp) or not found.tokens:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise PosttrainError(
                f"{self.where} gave no token ids with log-probabilities; expected a vLLM of version 0.32 or newer"
            ) from None
        return found

    def _watch(self, futures: list[Future[Answer]], done: Done) -> None:
        """Wait for all; raise the first error, and where nothing comes for a while and nobody answers, EngineLost."""
        pending: set[Future[Answer]] = set(futures)
        missed = 0
        while pending:
            finished, pending = wait(pending, HEARTBEAT, FIRST_COMPLETED)
            for future in finished:
                future.result()
            if finished:
                missed = 0
                done(len(futures) - len(pending))
                continue
            try:
                self.server.get("/health", HEARTBEAT)
                missed = 0
            except EngineLost:
                missed += 1
                if missed == MISSED:
                    raise

    def recover(self, folder: Path, shape: Shape) -> None:
        """Wait until it answers again: somebody else starts it."""
        begun, pause = time.monotonic(), 0.5
        while True:
            try:
                self._greet()
                return
            except EngineLost as lost:
                if time.monotonic() - begun > self.patience:
                    raise PosttrainError(
                        f"{lost}; waited {self.patience:.0f} s: start it again (posttrain serve) and resume the run"
                    ) from lost
            time.sleep(pause)
            pause = min(10.0, 1.5 * pause)

    def close(self) -> None:
        self._running = False
