"""Where a measurement comes from: what this process sees of its machine, of its libraries, and of the command that made it; where it is kept, and how a verdict cites it."""
from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any


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


def libraries(*names: str) -> dict[str, str]:
    """Versions of installed packages; "" for one that is not."""
    from importlib.metadata import PackageNotFoundError, version

    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""
    return {name: found(name) for name in names}


def stored(name: str) -> dict[str, Any] | None:
    """A committed measurement, nbs_lib/data/NAME.json; None where there is none."""
    file = files("nbs_lib") / "data" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


class Parts(dict):
    """A file of measurements by part, {"steps": {"rows": […], "provenance": {…}}, …}: what is kept is in the file at once, which is replaced as a whole, so that a run that is
    killed loses nothing of before, and another run of other parts adds to it.

    file: a path, or None: nothing is written. made: the provenance of what this run keeps. ValueError for a file that holds something else.
    """

    def __init__(self, file: Path | None, made: dict[str, Any]):
        self.file, self.made = file, made
        if file is None or not file.exists():
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise ValueError(f"{file} cannot be gone on with: {e}. Name another file with --out, or move this one away.") from None
        if not isinstance(known, dict):
            raise ValueError(f"{file} holds no measurements by part. Name another file with --out.")
        self.update(known)

    def keep(self, part: str, value: dict[str, Any]) -> None:
        """This part is measured anew, or further: its value with the provenance of this run."""
        self[part] = value | {"provenance": self.made}
        self.write()

    def write(self) -> None:
        """What is here now, into the file."""
        if self.file is None:
            return
        new = self.file.with_name(self.file.name + ".new")
        new.write_text(json.dumps(self, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, self.file)


def finding(claim: str, verdict: str, because: str, where: dict[str, Any], how: str = "") -> dict[str, str]:
    """A claim tested, its verdict, the reason with its numbers, and where that was measured: `where` is provenance, `how` a word beside the device."""
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "jax", "jaxlib", "peft") if where.get(name))
    return {"claim": claim, "verdict": verdict, "because": because, "versions": versions, "device": where["device"] + (f", {how}" if how else "")}
