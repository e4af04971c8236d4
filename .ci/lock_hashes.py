#!/usr/bin/env python3
"""Writes constraints.lock: the packages of constraints.txt with the SHA-256 of what pip may install.

Usage: .venv/bin/python .ci/lock_hashes.py

pip itself chooses the files and reports their hashes (``--dry-run --report``), so what is locked is what it
would install on this kind of machine (Linux, x86-64, this Python). Run it after every change of
constraints.txt. A hash that the lock holds already for the same version is kept: torch, say, is another file
on PyPI than on PyTorch's own index, and either will do.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS, LOCK = ROOT / "constraints.txt", ROOT / "constraints.lock"
HEAD = "# Made from constraints.txt by .ci/lock_hashes.py; pip installs nothing whose SHA-256 is not here.\n"


def main() -> None:
    """Asks pip, merges what the lock holds, writes."""
    pins = dict(line.split("==") for line in PINS.read_text().splitlines() if line and line[0] != "#")
    hashes = {name: {*found} for name, found in known_hashes(pins).items()}
    for name, found in asked_hashes().items():
        hashes.setdefault(name, set()).add(found)
    lines = []
    for name, version in pins.items():
        if not hashes.get(normalised(name)):
            sys.exit(f"lock_hashes: pip reports no file for {name}=={version}.")
        each = "".join(f" \\\n    --hash=sha256:{digest}" for digest in sorted(hashes[normalised(name)]))
        lines.append(f"{name}=={version}{each}\n")
    LOCK.write_text(HEAD + "".join(lines))
    print(f"{LOCK.name}: {len(lines)} packages")


def asked_hashes() -> dict[str, str]:
    """SHA-256 of the file that pip would install of each package."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"),
                *("--no-build-isolation", "--quiet", "--report", str(report), "--requirement", str(PINS)),
            ],
            check=True,
        )
        entries = json.loads(report.read_text())["install"]
    return {
        normalised(entry["metadata"]["name"]): entry["download_info"]["archive_info"]["hashes"]["sha256"]
        for entry in entries
    }


def known_hashes(pins: dict[str, str]) -> dict[str, list[str]]:
    """The hashes that the lock holds of the same versions."""
    if not LOCK.exists():
        return {}
    wanted = {normalised(name): version for name, version in pins.items()}
    found = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)", LOCK.read_text(), re.M)
    return {
        normalised(name): re.findall(r"sha256:([0-9a-f]{64})", hashes)
        for name, version, hashes in found
        if wanted.get(normalised(name)) == version
    }


def normalised(name: str) -> str:
    """A package's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
