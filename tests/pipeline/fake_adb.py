#!/usr/bin/env python3
"""An adb whose device is a folder of this machine.

``device.json`` beside this file says what it is and how it fails: {"devices": {serial: state}, "properties":
{name: value}, "emulator": [command] or absent, "lost_at": part of a command at which the connection breaks,
"full_at": part of a file's name that does not fit}.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
DEVICE = json.loads((HERE / "device.json").read_text())
REMOTE, DISK = "/data/local/tmp", HERE / "disk"


def main(arguments: list[str]) -> int:
    with (HERE / "asked.txt").open("a") as asked:
        print(*arguments, file=asked)
    if arguments == ["devices"]:
        print("* daemon not running; starting now at tcp:5037\nList of devices attached")
        for serial, state in DEVICE["devices"].items():
            print(f"{serial}\t{state}")
        return 0
    assert arguments[0] == "-s"
    serial, what, *rest = arguments[1:]
    if DEVICE["devices"].get(serial) != "device":
        print(f"adb: device '{serial}' not found", file=sys.stderr)
        return 1
    if what == "push":
        local, remote = rest
        assert remote.startswith(f"{REMOTE}/")
        if DEVICE.get("full_at", "\0") in local:
            print(
                f"adb: error: failed to copy '{local}' to '{remote}': No space left on device",
                file=sys.stderr,
            )
            return 1
        shutil.copyfile(local, remote.replace(REMOTE, str(DISK)))
        print(f"{local}: 1 file pushed, 0 skipped.")
        return 0
    assert what == "shell"
    (command,) = rest
    if DEVICE.get("lost_at", "\0") in command:
        print("error: device offline", file=sys.stderr)
        return 1
    if command == "getprop":
        for name, value in DEVICE["properties"].items():
            print(f"[{name}]: [{value}]")
        return 0
    emulator = " ".join(DEVICE.get("emulator", []))
    command = command.replace(REMOTE, str(DISK)).replace(
        "./device_program", f"{emulator} ./device_program".strip()
    )
    status = subprocess.run(["sh", "-c", command]).returncode
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
