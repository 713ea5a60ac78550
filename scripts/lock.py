"""Resolve settings.ini's requirements into requirements.lock, for Python 3.11 to 3.13 with environment markers (`make lock`).

torch's own nvidia-* and triton pins are left to torch's metadata, so that a CPU build stays without them.
"""
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"


def main() -> None:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = config["DEFAULT"]
    wanted = [TORCH, "setuptools", *cfg["requirements"].split()]
    for extra in ("torch", "jax", "labs", "dev"):
        wanted += cfg[f"{extra}_requirements"].split()
    lonely = cfg["alone_requirements"].split() + cfg["oracle_requirements"].split()
    pins = sorted(resolve(wanted, cfg) + resolve(lonely, cfg, "--no-deps"), key=lambda pin: pin.partition("=")[0])
    head = "# Pins of everything that the environment and CI install, for Python 3.11 to 3.13. Made by `make lock`; do not edit.\n"
    (ROOT / "requirements.lock").write_text(head + "\n".join(pins) + "\n")
    print(f"requirements.lock: {len(pins)} packages")


def resolve(wanted: list[str], cfg, *options: str) -> list[str]:
    """The pins of `wanted` and of what they require."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as f:
        f.write("\n".join(wanted))
        f.flush()
        run = subprocess.run([sys.executable, "-m", "uv", "pip", "compile", "--universal", f"--python-version={cfg['min_python']}",
                              "--no-annotate", "--no-header", "-q", *options, f.name], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    pins = [line for line in run.stdout.splitlines() if not re.match(r"(nvidia-|cuda-|triton)", line)]
    return [p for p in pins if "sys_platform == 'win32'" not in p and "os_name == 'nt'" not in p]


if __name__ == "__main__":
    main()
