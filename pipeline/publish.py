"""Publishing a release: one repository a model folder, on the Hugging Face hub or in a folder."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import GateFailed, UserError
from pipeline.release import CARD, verify, verify_inputs

TOKEN = "HF_TOKEN"
"""Environment variable of the hub's token, its only source: never an option, which shells remember."""


@dataclass(frozen=True)
class Repository:
    """A model folder and where it goes.

    Attributes:
        folder: the folder in the release.
        name: ``NAMESPACE/FOLDER`` on the hub, the folder's name elsewhere. As in TinySwallow's family
            the model itself is NAME, the tuned one NAME-Instruct, and exports end in -GGUF, -MLC, -ONNX.
        files: how many it has.
        bytes: how large they are.
    """

    folder: Path
    name: str
    files: int
    bytes: int


def plan(release: Path, namespace: str | None = None) -> list[Repository]:
    """The repositories of a release, after checking that all of it may be published.

    Args:
        release: the release's folder.
        namespace: user or organization on the hub; None for a folder.

    Raises:
        UserError: it is no release, or the hub would refuse a name.
        GateFailed: a file is not as the manifest says, an origin is not recorded, or a file failed a gate.
    """
    problems = verify(release) + verify_inputs(release)
    if problems:
        raise GateFailed(f"{problems[0].rstrip('.')}; nothing was published.")
    facts = _facts(release / "report.json")
    for entry in facts["fidelity"]:
        if not entry["passed"]:
            raise GateFailed(
                f"{release / 'report.json'}: {entry['file']} failed a gate; nothing was published."
            )
    repositories = []
    for folder in (release / entry["folder"] for entry in facts["folders"]):
        name = folder.name if namespace is None else f"{namespace}/{folder.name}"
        if namespace is not None:
            _check_name(name)
        files = [path for path in folder.rglob("*") if path.is_file()]
        if not files:
            raise GateFailed(f"{folder}: is empty; nothing was published.")
        repositories.append(Repository(folder, name, len(files), sum(path.stat().st_size for path in files)))
    return repositories


def to_hub(
    repositories: list[Repository],
    private: bool,
    report: Callable[[str], None],
    endpoint: str | None = None,
) -> list[str]:
    """Uploads each repository in one commit, which removes what it held besides, such as a quantization that
    was dropped. What an interrupted upload has brought over is not sent again, and a repository that holds
    the same files already gets no commit. Cards name the release's own models with the namespace there.

    Args:
        repositories: ``plan``'s.
        private: whether repositories that are made are private.
        report: receives one line for each.
        endpoint: address of the hub; huggingface.co by default.

    Returns:
        The repositories' addresses.

    Raises:
        UserError: there is no token, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    token = os.environ.get(TOKEN)
    if not token:
        raise UserError(
            f"publishing on the hub needs a token that may write; set {TOKEN} in the environment."
        )
    api = HfApi(endpoint=endpoint, token=token)
    addresses = []
    names = {repository.folder.name: repository.name for repository in repositories}
    for repository in repositories:
        report(f"{repository.name}: {repository.files} files, {repository.bytes / 1e6:.1f} MB")
        try:
            created = api.create_repo(repository.name, private=private, exist_ok=True)
            with tempfile.TemporaryDirectory() as temporary:
                linked = shutil.copytree(
                    repository.folder.resolve(), Path(temporary) / "linked", copy_function=os.symlink
                )
                _name_base_model(Path(linked) / CARD, names)
                api.upload_folder(
                    repo_id=repository.name,
                    folder_path=linked,
                    commit_message=f"{repository.folder.name}, made by martlet",
                    delete_patterns="*",  # of what is there and not in the folder
                )
        except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{repository.name}: the hub does not take it ({_without(token, error)}); the same command "
                "goes on where this one stopped."
            ) from None
        addresses.append(str(created))
    return addresses


def _name_base_model(link: Path, names: dict[str, str]) -> None:
    """Replaces a link to a card by the card with its ``base_model``, where that is of the same release, as
    the hub names it."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(link)
    base = card.data.base_model
    if base in names:
        card.data.base_model = names[base]
        link.unlink()
        card.save(link)


def to_folder(repositories: list[Repository], target: Path, report: Callable[[str], None]) -> list[str]:
    """Copies each repository into a folder of its name, which replaces an earlier one when it is whole.

    Raises:
        UserError: the target cannot be written.
    """
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for repository in repositories:
            report(f"{repository.name}: {repository.files} files, {repository.bytes / 1e6:.1f} MB")
            final = target / repository.name
            with tempfile.TemporaryDirectory(dir=target, prefix=".publish-") as temporary:
                copied = shutil.copytree(repository.folder, Path(temporary) / "new")
                if final.exists():
                    final.rename(Path(temporary) / "old")
                Path(copied).rename(final)
            written.append(str(final))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give another folder.") from None
    return written


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        names = [entry["folder"] for entry in facts["folders"]]
        whole = all({"file", "passed"} <= set(entry) for entry in facts["fidelity"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        names, whole = [], False
    if not names or not whole or any(Path(name).name != name for name in names):
        raise UserError(f"{path}: is no report of a release; give a release folder.")
    return facts


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"--namespace: the hub has no repository named {name!r}; give a user's name."
        ) from None


def _without(secret: str, error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines[0] if lines else type(cause).__name__).replace(secret, "...")[:300].rstrip(".")
