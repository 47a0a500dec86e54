"""Seeds: one call makes a run repeatable; derived seeds keep parallel parts independent."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and, when it is already loaded, torch (CPU and every GPU)."""
    import sys

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)


def derive_seed(seed: int, *names: object) -> int:
    """Return a 32-bit seed that depends on ``seed`` and ``names`` only, equal on every machine."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
