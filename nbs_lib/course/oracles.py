"""Packages that proofs compare with. They lie in a folder of their own, `.venv/oracles`: transformers and peft import torchao and bitsandbytes wherever
they find them, which takes seconds and warns of kernels that this machine cannot load.
"""
from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(sys.prefix)/"oracles"


def oracles() -> None:
    """Let this process import them from now on. One that the environment itself has comes first."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
