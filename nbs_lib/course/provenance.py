"""Where a measurement comes from: what this process sees of its machine, of its libraries, and of the command that made it."""
from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys


def provenance(command: str) -> dict[str, str | int]:
    """Device, driver, versions, date, and the command, for rows of a benchmark. Imports torch."""
    import torch

    out: dict[str, str | int] = {"device": f"CPU, {platform.machine()}", "torch": torch.__version__, "cuda": torch.version.cuda or "", "python": platform.python_version(),
                                 "cpus": os.cpu_count() or 0, "date": datetime.date.today().isoformat(), "command": command}
    if torch.cuda.is_available():
        smi = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"], capture_output=True, text=True).stdout
        out |= {"device": torch.cuda.get_device_name(), "driver, power limit, clock": (smi.splitlines() or [""])[0], "cudnn": torch.backends.cudnn.version(),
                "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return out


def command_line(module: str) -> str:
    """How this process was started, as people type it."""
    return " ".join([f"python3 -m {module}", *sys.argv[1:]])
