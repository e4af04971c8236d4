"""Signed releases: OpenSSH's ``ssh-keygen -Y`` signs ``manifest.json``, which has the SHA-256 of every other
file, with a key that its owner may have already (in a file, an agent or a security token). Who may sign is
said in OpenSSH's file of allowed signers, one line each: ``NAME KEY-TYPE KEY``.
"""

import os
import shutil
import subprocess
from pathlib import Path

from pipeline.errors import UserError
from pipeline.release import MANIFEST, SIGNATURE, require_manifest, verify

PROGRAM = "ssh-keygen"
NAMESPACE = "martlet-release"
"""A signature of something else with the same key is none of a release."""
LARGEST_SIGNATURE = 2**16
"""Bytes."""


def sign(release: Path, key: Path) -> Path:
    """Signs a release that is as its manifest says.

    Args:
        release: release folder.
        key: private key, or the public one where an agent holds the private one.

    Returns:
        The signature, ``manifest.json.sig``.

    Raises:
        UserError: it is no release or damaged, or the key does not sign.
    """
    problems = verify(release)
    if problems:
        raise UserError(f"{problems[0].rstrip('.')}; nothing was signed.")
    if not key.is_file():
        raise UserError(f"{key}: no such file; give an SSH key.")
    signature = release / SIGNATURE
    # The signature of standard input goes to standard output, so that half of one is never a file.
    with (release / MANIFEST).open("rb") as manifest:
        done = _ssh_keygen("sign", "-n", NAMESPACE, "-f", str(key), given=manifest.read())
    if done.returncode != 0:
        raise UserError(f"{key}: does not sign ({_last_line(done.stderr)}).")
    unfinished = signature.with_name(f"{signature.name}.partial")
    unfinished.write_bytes(done.stdout)
    unfinished.replace(signature)
    return signature


def signer(release: Path, allowed: Path) -> str:
    """Who signed a release.

    Args:
        release: release folder.
        allowed: OpenSSH's file of allowed signers.

    Returns:
        The signer's name in that file.

    Raises:
        UserError: it is not signed, by nobody of that file, or it has changed since.
    """
    require_manifest(release)
    signature = release / SIGNATURE
    if not allowed.is_file():
        raise UserError(f"{allowed}: no such file; give OpenSSH's file of allowed signers.")
    if not signature.is_file() or signature.stat().st_size > LARGEST_SIGNATURE:
        raise UserError(f"{signature}: is missing or no signature; the release is not signed.")
    found = _ssh_keygen("find-principals", "-s", str(signature), "-f", str(allowed))
    names = found.stdout.decode("utf-8", "replace").split("\n")[0].split(",")
    if found.returncode != 0 or not names[0]:
        raise UserError(f"{signature}: was made by nobody that {allowed} names.")
    with (release / MANIFEST).open("rb") as manifest:
        which = ("-n", NAMESPACE, "-I", names[0], "-s", str(signature), "-f", str(allowed))
        checked = _ssh_keygen("verify", *which, given=manifest.read())
    if checked.returncode != 0:
        raise UserError(
            f"{signature}: is not the signature of this {MANIFEST} ({_last_line(checked.stderr)}); the "
            "release was changed after it was signed."
        )
    return names[0]


def _ssh_keygen(*arguments: str, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    program = shutil.which(PROGRAM)
    if program is None:
        raise UserError(f"{PROGRAM} is not installed, which signs and checks releases; install OpenSSH.")
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run([program, "-Y", *arguments], input=given, capture_output=True, env=environment)


def _last_line(said: bytes) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else "it said nothing"
