"""Signatures of releases, by a real ssh-keygen."""

import shutil
import subprocess
from pathlib import Path

import pytest
from release_artifacts import example_artifacts, example_recipe, example_stage_times

from pipeline import release, signing
from pipeline.artifacts import Store
from pipeline.errors import UserError

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    store, recipe = Store(tmp_path / "store", report=lambda line: None), example_recipe()
    artifacts = example_artifacts(store, recipe)
    return release.run(recipe, artifacts, tmp_path / "release", store, example_stage_times(artifacts))


def new_key(path: Path) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_key(tmp_path / "key")


@pytest.fixture
def allowed(tmp_path: Path, key: Path) -> Path:
    path = tmp_path / "allowed"
    path.write_text(f"me@example.org {key.with_suffix('.pub').read_text()}")
    return path


def test_a_signed_release(released: Path, key: Path, allowed: Path) -> None:
    """It stays a release, is still up to date for the next run, and OpenSSH itself accepts the signature."""
    assert signing.sign(released, key) == released / "manifest.json.sig"
    assert signing.signer(released, allowed) == "me@example.org"
    assert release.verify(released) == []
    command = ["ssh-keygen", "-Y", "verify", "-n", "martlet-release", "-I", "me@example.org"]
    where = ["-s", str(released / "manifest.json.sig"), "-f", str(allowed)]
    with (released / "manifest.json").open("rb") as manifest:
        subprocess.run([*command, *where], stdin=manifest, check=True)
    store, recipe = Store(released.parent / "store", report=lambda line: None), example_recipe()
    artifacts = example_artifacts(store, recipe)
    release.run(recipe, artifacts, released, store, example_stage_times(artifacts))
    assert signing.signer(released, allowed) == "me@example.org"


def test_every_changed_byte_of_the_manifest_is_found(released: Path, key: Path, allowed: Path) -> None:
    signing.sign(released, key)
    manifest = released / "manifest.json"
    sound = manifest.read_bytes()
    # Bytes of digests: the manifest stays one, and only the signature tells.
    for place in [sound.index(b'"sha256": "') + 12, sound.rindex(b'"sha256": "') + 12]:
        data = bytearray(sound)
        data[place] = ord("0") if data[place] != ord("0") else ord("1")
        manifest.write_bytes(data)
        with pytest.raises(UserError, match=r"is not the signature of this manifest\.json \(.*incorrect sig"):
            signing.signer(released, allowed)
    manifest.write_bytes(sound)
    assert signing.signer(released, allowed) == "me@example.org"


def test_what_is_not_signed_by_an_allowed_signer(
    released: Path, key: Path, allowed: Path, tmp_path: Path
) -> None:
    signature = released / "manifest.json.sig"
    with pytest.raises(
        UserError, match=r"manifest\.json\.sig: is missing or no signature; the release is not"
    ):
        signing.signer(released, allowed)
    signing.sign(released, new_key(tmp_path / "other"))
    with pytest.raises(UserError, match=r"was made by nobody that .*allowed names"):
        signing.signer(released, allowed)
    for nonsense in (b"", b"x", signature.read_bytes()[:-40]):
        signature.write_bytes(nonsense)
        with pytest.raises(UserError, match="was made by nobody that"):
            signing.signer(released, allowed)
    signature.write_bytes(bytes(signing.LARGEST_SIGNATURE + 1))
    with pytest.raises(UserError, match="is missing or no signature"):
        signing.signer(released, allowed)
    # A signature of the same bytes, by the same key, for another purpose.
    command = ["ssh-keygen", "-Y", "sign", "-n", "git", "-f", str(key)]
    with (released / "manifest.json").open("rb") as manifest:
        made = subprocess.run(command, stdin=manifest, capture_output=True, check=True)
    signature.write_bytes(made.stdout)
    with pytest.raises(UserError, match="namespace does not match"):
        signing.signer(released, allowed)
    with pytest.raises(UserError, match="nowhere: no such file; give OpenSSH's file of allowed signers"):
        signing.signer(released, tmp_path / "nowhere")


def test_what_cannot_be_signed(released: Path, key: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such file; give an SSH key"):
        signing.sign(released, tmp_path / "nowhere")
    (tmp_path / "text").write_text("no key")
    with pytest.raises(UserError, match=r"text: does not sign \("):
        signing.sign(released, tmp_path / "text")
    assert not (released / "manifest.json.sig").exists()
    (released / "report.html").write_text("changed")
    with pytest.raises(UserError, match=r"report\.html: is damaged .*; nothing was signed\."):
        signing.sign(released, key)


def test_without_openssh(released: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="ssh-keygen is not installed, which signs and checks releases"):
        signing.sign(released, key)
