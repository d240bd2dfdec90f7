"""Inside vLLM's workers: how weights arrive, as a backend of vLLM's own weight transfer interface.

vLLM's own backends need GPUs on both sides (NCCL, CUDA IPC, RDMA). This one takes safetensors, from files that the
worker sees or from the message itself, works on every device, and checks what it took: the digest of every file, and
that no parameter of the model was left out. vLLM finds it by the entry point `vllm.general_plugins`.

A message is one of
    {"folder": PATH, "files": {NAME: SHA-256, ...}}    load these files
    {"data": BASE64, "digest": SHA-256}                load these bytes, a safetensors file
    {"complete": true}                                 all was sent: raise if a parameter is missing
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

BACKEND = "posttrain"


def register() -> None:
    """Make the backend known to vLLM in this process; vLLM may call it more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, _engine())


def _engine() -> type[Any]:
    """The class is made here, since its base is vLLM's and this module is imported without it as well."""
    from dataclasses import dataclass, field

    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclass
    class Nothing(WeightTransferInitInfo):
        """There is nothing to agree on beforehand."""

    @dataclass
    class Message(WeightTransferUpdateInfo):
        folder: str = ""
        files: dict[str, str] = field(default_factory=dict)
        data: str = ""
        digest: str = ""
        complete: bool = False

    class SafetensorsTransfer(WeightTransferEngine[Nothing, Message]):
        init_info_cls = Nothing
        update_info_cls = Message

        def init_transfer_engine(self, init_info: Nothing) -> None:
            pass

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            own = {name for name, _ in self.model.named_parameters()}  # a shared one under its first name alone
            initialize_layerwise_reload(self.model)
            self.missing = own & {name for name, _ in self.model.named_parameters()}

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # not the base's, which then waits for an accelerator that may not be there
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":
                import torch

                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Message) -> None:
            try:
                self.take(update_info)
            except BaseException:
                abandon(self.model)
                raise

        def take(self, message: Message) -> None:
            if message.complete:
                if self.missing:
                    raise ValueError(
                        f"{len(self.missing)} parameters of the model got no weights: "
                        f"{', '.join(sorted(self.missing)[:5])}"
                    )
                return
            if message.folder:
                tensors = read_files(Path(message.folder), message.files)
            else:
                tensors = read_bytes(message.data, message.digest)
            loaded = self.model.load_weights(tensors)
            self.missing -= self.missing if loaded is None else set(loaded)

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
            repack_tied(self.model)

        def shutdown(self) -> None:
            pass

    return SafetensorsTransfer


def read_files(folder: Path, files: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, each file checked before anything of it is used."""
    from safetensors import safe_open

    for name, digest in sorted(files.items()):
        path = folder / name
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != digest:
            raise ValueError(f"{path} has the digest {found}; expected {digest}: it was damaged on its way")
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                yield key, file.get_tensor(key)


def read_bytes(data: str, digest: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file that came as base64 text."""
    from safetensors.torch import load

    raw = base64.b64decode(data)
    found = hashlib.sha256(raw).hexdigest()
    if found != digest:
        raise ValueError(f"a piece of the weights has the digest {found}; expected {digest}: it was damaged on its way")
    yield from load(raw).items()


def abandon(model: nn.Module) -> None:
    """After an update that failed: forget what half-loaded layers hold, so that the next update finds them clean.

    The model is then a mixture of weights, and must not draw before that.
    """
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
        info.reset()


def repack_tied(model: nn.Module) -> None:
    """Pack the weights anew of layers that share another layer's.

    On CPUs vLLM multiplies by a packed copy of a layer's weight, and makes it anew for layers that were loaded: not for
    a vocabulary projection that shares the embedding's weight and was not loaded itself.
    """
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and weight is not None and weight.numel():
            method = getattr(layer, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(layer)
