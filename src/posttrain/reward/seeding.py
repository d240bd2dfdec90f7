"""Random numbers that a component draws, made to follow from the call where several processes make the calls."""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np
import torch


def seed_by_call(component: str, key: int, completion: str) -> None:
    """Seed the global generators by the component, its prompt's key and the completion."""
    text = f"{component}\0{key}\0{completion}".encode("utf-8", "surrogatepass")
    seed = int.from_bytes(blake2b(text, digest_size=4).digest(), "big")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what components may draw from
    torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which takes a hundred times as long
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
