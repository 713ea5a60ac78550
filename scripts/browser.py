"""See to it that the browser tests find a Chromium: the one that is there, else Debian's package where apt can be used."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The path of a Chromium or Chrome: NBS_CHROMIUM, else the first on PATH."""
    return os.environ.get("NBS_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def main() -> None:
    if find():
        return
    apt = shutil.which("apt-get")
    if apt and os.geteuid() == 0:
        print("Browser: none found, installing Debian's chromium", flush=True)
        quiet = dict(env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdout=subprocess.DEVNULL)
        subprocess.run([apt, "update", "-qq"], **quiet)
        subprocess.run([apt, "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"], **quiet)
    if not find():
        sys.exit("The tests open every page in a real browser, and no Chromium or Chrome was found.\n"
                 "  Remedy: sudo apt-get install chromium, or NBS_CHROMIUM=/path/to/chrome make test")


if __name__ == "__main__":
    main()
