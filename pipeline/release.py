"""The release folder: one folder a format, model cards, manifest, report.

Identical artifacts give identical bytes. Timings and whether a stage came from the store are in the two
reports alone, so of the manifest only their two entries can differ.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from export.errors import ExportError, one_line
from export.mlc import conversation_template
from export.ollama import LONGEST_CONTEXT, modelfile
from pipeline import cards, provenance, report, web
from pipeline.artifacts import (
    Artifact,
    Store,
    is_as_written,
    is_file_name,
    locked,
    sha256_of_file,
    sha256_of_json,
    space_ran_out,
    with_own_digest,
    write_json,
    write_text,
)
from pipeline.bill_of_materials import FILE_NAME as BILL_OF_MATERIALS
from pipeline.bill_of_materials import bill_of_materials, file_digests
from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.recipe import Recipe

SCHEMA = "martlet-manifest-1"
MANIFEST = "manifest.json"
SIGNATURE = f"{MANIFEST}.sig"
KEYS = ("schema", "identity", "name", "recipe", "packages", "inputs", "lineage", "files")
CARD = "README.md"
MODELFILE = "Modelfile"
VERSION = 7
"""Raised when the same artifacts give another release."""


def run(
    recipe: Recipe,
    artifacts: Mapping[str, Artifact],
    release_root: Path,
    store: Store,
    stage_times: list[dict[str, Any]],
) -> Path:
    """Lays the release out; an existing one that is already this release is left as it is.

    An earlier release of that name is replaced. If files in it were edited or added by hand, it is kept
    beside the new one as ``NAME.previous-1``, ``-2`` and so on.

    Args:
        recipe: the recipe.
        artifacts: all artifacts of the run by role (``instruct``, ``gguf``, ``fidelity_gguf``, ...).
        release_root: the folder to make. It appears by renaming, when everything in it is complete.
        store: tells what is being done.
        stage_times: [{name, seconds, cached}] for the report.

    Returns:
        ``release_root``, absolute.

    Raises:
        UserError: there is something of that name that is no release, the release cannot be written, or an
            artifact changed in the store after it was verified.
    """
    root = Path(release_root).resolve()
    content = sha256_of_json({role: artifact.digest for role, artifact in artifacts.items()})
    identity = sha256_of_json(
        [content, recipe.model_dump(mode="json", by_alias=True), SCHEMA, VERSION, web.digest()]
    )
    problems: list[str] = []
    try:
        with _only_one(root, store):
            _clear_leftovers(root)
            if root.exists() and (not root.is_dir() or any(root.iterdir())):
                manifest = read_manifest(root)
                if manifest is None:
                    raise UserError(
                        f"{root}: exists and is no release of martlet ({MANIFEST} is missing, damaged or "
                        "another program's); give another folder or remove it."
                    )
                problems = verify(root)
                if manifest.get("identity") == identity and not problems:
                    store.keep_for(root, artifacts.values())
                    store.report(f"release: {root} is up to date")
                    return root
            store.report(f"release: laying out {root}")
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root.parent, prefix=_unfinished(root)) as temporary:
                # Made with mode 0700; a release is for others to read.
                folder = Path(temporary) / "release"
                folder.mkdir()
                made_from = _copy_models(folder, recipe, artifacts)
                facts = report.collect(recipe, artifacts, stage_times)
                facts["folders"] = _folders(folder, made_from)
                copied = _files(folder, made_from, {})
                roles = {artifact.key: role for role, artifact in artifacts.items()}
                facts["files"] = [
                    {"file": name, "role": roles[entry["made_from"]["key"]], **_digest_and_size(entry)}
                    for name, entry in copied.items()
                ]
                for name, text in cards.model_cards(recipe, facts).items():
                    (folder / name / CARD).write_text(text, encoding="utf-8")
                if "gguf" in artifacts:
                    gguf = f"{recipe.name.lower()}-instruct-{recipe.export.gguf[-1]}.gguf"
                    text = _modelfile(artifacts["instruct"].path / "model", gguf)
                    (folder / f"{recipe.name}-Instruct-GGUF" / MODELFILE).write_text(text, encoding="utf-8")
                listings = {
                    format: json.loads((artifacts[format].path / "files.json").read_text(encoding="utf-8"))
                    for format in ("gguf", "mlc", "onnx")
                    if format in artifacts
                }
                if not web.lay_out(folder, f"{recipe.name}-Instruct", listings):
                    store.report(
                        "release: laid out without its web page, because web/dist is not built; install "
                        "Node.js 18 or later with npm and run make page"
                    )
                write_json(folder / "report.json", facts)
                (folder / "report.html").write_text(report.render(facts), encoding="utf-8")
                inputs = provenance.inputs(recipe, artifacts)
                listed = {name: _digest_and_size(entry) for name, entry in copied.items()}
                write_json(folder / BILL_OF_MATERIALS, bill_of_materials(recipe, inputs, listed))
                files = _files(folder, made_from, copied)
                manifest = _manifest(identity, recipe, artifacts, files, inputs)
                write_json(folder / MANIFEST, with_own_digest(manifest))
                # Reports and cards were written from what the artifacts say.
                store.require_undamaged(artifacts.values())
                store.keep_for(root, artifacts.values())
                edited = [problem for problem in problems if not problem.endswith("is missing.")]
                previous = _free_name(root) if edited else Path(temporary) / "previous"
                _swap_in(folder, root, previous)
                if edited:
                    store.report(
                        f"release: the earlier release was changed by hand ({edited[0]}) and is kept in "
                        f"{previous}"
                    )
    except OSError as error:
        if space_ran_out(root.parent, error):
            raise UserError(f"{root}: no space is left on the disk for the release; free space.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"{root}: the release cannot be written there ({error.strerror}); give another folder."
            ) from error
        raise
    return root


def verify(root: Path) -> list[str]:
    """A sentence for each file of a release that is missing, damaged, or not in its manifest.

    Raises:
        UserError: the folder has no readable manifest.
    """
    root = Path(root)
    manifest = require_manifest(root)
    problems = []
    if not is_as_written(manifest, KEYS):
        problems.append(f"{root / MANIFEST}: is damaged (its SHA-256 is not the one in it).")
    for name, entry in manifest["files"].items():
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            problems.append(f"{path}: lies outside the release.")
        elif not path.is_file():
            problems.append(f"{path}: is missing.")
        elif path.stat().st_size != entry["bytes"] or sha256_of_file(path) != entry["sha256"]:
            problems.append(f"{path}: is damaged (its SHA-256 is not the manifest's).")
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    for name in sorted(present - set(manifest["files"]) - {MANIFEST, SIGNATURE}):
        problems.append(f"{root / name}: is not in the manifest.")
    return [one_line(problem) for problem in problems]


def verify_inputs(root: Path) -> list[str]:
    """A sentence for each thing that is wrong with what a release says of its origin.

    Every input has a SHA-256; the recipe has the recorded one; local files of teacher and data that are still
    there have not changed; the bill of materials lists the files of the manifest.

    Raises:
        UserError: the folder has no readable manifest.
    """
    root = Path(root)
    manifest = require_manifest(root)
    inputs = manifest.get("inputs")
    problems = provenance.incomplete(inputs)
    if inputs is not None and not problems:
        if inputs["recipe"]["sha256"] != sha256_of_json(manifest.get("recipe")):
            problems.append(f"{root / MANIFEST}: recipe: is not the one that the release was made from.")
        try:
            problems += provenance.changed_files(inputs)
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            problems.append(f"{root / MANIFEST}: inputs: cannot be read ({error!r:.80}).")
    try:
        listed = file_digests(json.loads((root / BILL_OF_MATERIALS).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        problems.append(f"{root / BILL_OF_MATERIALS}: is missing or no bill of materials.")
        listed = {}
    recorded = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    for name, digest in listed.items():
        if recorded.get(name) != digest:
            problems.append(f"{root / BILL_OF_MATERIALS}: {name}: has another SHA-256 than in the manifest.")
    return [one_line(problem) for problem in problems]


def read_report(root: Path) -> dict[str, Any]:
    """What ``report.json`` of a release says.

    Raises:
        UserError: there is no release, or its report is not the one in its manifest.
    """
    path, manifest = Path(root) / "report.json", require_manifest(Path(root))
    try:
        damaged = sha256_of_file(path) != manifest["files"]["report.json"]["sha256"]
    except (OSError, KeyError):
        damaged = True
    if damaged:
        raise UserError(f"{path}: is missing or damaged; ship the release again.")
    return json.loads(path.read_text(encoding="utf-8"))


def unjudged_licences(root: Path) -> list[str]:
    """``key: licence`` of those that martlet's table did not know when the release was made; none where its
    report does not say."""
    try:
        facts = read_report(root)
    except (UserError, ValueError):
        return []
    licences = facts.get("licences") if isinstance(facts, dict) else None
    entries = licences.get("not_judged") if isinstance(licences, dict) else None
    return [str(entry) for entry in entries] if isinstance(entries, list) else []


def change_report(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Takes what was measured after a release was laid out into its two reports and its manifest.

    Args:
        root: the release.
        change: changes what ``report.json`` says, in place.

    Raises:
        UserError: as ``read_report``.
    """
    root = Path(root)
    facts = read_report(root)
    change(facts)
    page = report.render(facts)
    manifest = require_manifest(root)
    write_json(root / "report.json", facts)
    write_text(root / "report.html", page)
    for name in ("report.json", "report.html"):
        path = root / name
        manifest["files"][name] |= {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
    write_json(root / MANIFEST, with_own_digest(manifest))


def require_manifest(root: Path) -> dict[str, Any]:
    """What ``manifest.json`` of a release says.

    Raises:
        UserError: there is none that can be read.
    """
    manifest = read_manifest(root)
    if manifest is None:
        raise UserError(f"{root / MANIFEST}: is missing or no manifest of martlet; give a release folder.")
    return manifest


def read_manifest(root: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        listed = manifest["files"].items()
        valid = manifest["schema"] == SCHEMA and all(_is_file_entry(name, entry) for name, entry in listed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if valid else None


def _is_file_entry(name: str, entry: Any) -> bool:
    """Whether a manifest's line can be true of some file."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        and is_file_name(name)
    )


def _copy_models(folder: Path, recipe: Recipe, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Copies models and exports out of the store; returns which artifact each folder came from.

    They are copies, so that editing a release never damages the store."""
    base = artifacts.get("pretrain", artifacts["distill"])
    sources: list[tuple[str, Path, Artifact]] = [
        (recipe.name, base.path / "model", base),
        (f"{recipe.name}-Instruct", artifacts["instruct"].path / "model", artifacts["instruct"]),
    ]
    if "gguf" in artifacts:
        sources.append((f"{recipe.name}-Instruct-GGUF", artifacts["gguf"].path / "files", artifacts["gguf"]))
    if "mlc" in artifacts:
        for quantization in recipe.export.mlc:
            name = f"{recipe.name}-Instruct-{quantization}-MLC"
            sources.append((name, artifacts["mlc"].path / "files" / quantization, artifacts["mlc"]))
    if "onnx" in artifacts:
        sources.append((f"{recipe.name}-Instruct-ONNX", artifacts["onnx"].path / "files", artifacts["onnx"]))
    for name, source, artifact in sources:
        shutil.copytree(source, folder / name, copy_function=shutil.copyfile)
        recorded = artifact.manifest()["files"]
        for path in (folder / name).rglob("*"):
            if not path.is_file():
                continue
            stored = source / path.relative_to(folder / name)
            entry = recorded.get(stored.relative_to(artifact.path).as_posix())
            if entry is None or entry["sha256"] != sha256_of_file(path):
                raise UserError(
                    f"{stored}: is not what the stage {artifact.stage} wrote; start the same command again, "
                    "the store makes it anew."
                )
    return {name: artifact for name, _, artifact in sources}


def _folders(folder: Path, made_from: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """The model folders with the bytes and the number of their files, before cards are added."""
    entries = []
    for name, artifact in made_from.items():
        sizes = [path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()]
        kind = artifact.stage.removeprefix("export_")
        format = kind if kind in report.FORMATS else "safetensors"
        entries.append({"folder": name, "format": format, "bytes": sum(sizes), "files": len(sizes)})
    return entries


def _modelfile(model_dir: Path, gguf: str) -> str:
    """What Ollama needs beside a GGUF file; without a template where the model's cannot be said in Go's terms
    or the tokenizer cannot be read."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((model_dir / "generation_config.json").read_text(encoding="utf-8"))
    ends = generation.get("eos_token_id")
    conversation = None
    with contextlib.suppress(ExportError, UserError):
        tokenizer = load_tokenizer(model_dir)
        conversation = conversation_template(tokenizer, ends if isinstance(ends, list) else [ends])
    context_length = int(config.get("max_position_embeddings", LONGEST_CONTEXT))
    return modelfile(gguf, conversation, context_length, generation)


@contextlib.contextmanager
def _only_one(root: Path, store: Store) -> Iterator[None]:
    """Waits until no other run of this user lays this release out."""
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"martlet-release-{os.getuid()}-{name}.lock"
    with locked(path, f"waiting: another run is laying out {root}", store.report):
        yield


def _unfinished(root: Path) -> str:
    """What the name of the folder beside a release begins with in which the next one is made."""
    return f".{root.name}.martlet-"


def _clear_leftovers(root: Path) -> None:
    """Removes what killed runs left beside a release. Where one was killed between taking the name from the
    earlier release and giving it to its own, the earlier one gets it back."""
    folders = list(root.parent.iterdir()) if root.parent.is_dir() else []
    for folder in folders:
        if folder.name.startswith(_unfinished(root)) and folder.is_dir():
            if (folder / "previous").exists() and not root.exists():
                (folder / "previous").rename(root)
            shutil.rmtree(folder)


def _swap_in(folder: Path, root: Path, previous: Path) -> None:
    """Gives a finished folder its name; what had the name becomes ``previous``, or stays if that fails."""
    if not root.exists():
        folder.rename(root)
        return
    root.rename(previous)
    try:
        folder.rename(root)
    except BaseException:
        previous.rename(root)
        raise


def _free_name(root: Path) -> Path:
    number = 1
    while (kept := root.with_name(f"{root.name}.previous-{number}")).exists():
        number += 1
    return kept


def _manifest(
    identity: str,
    recipe: Recipe,
    artifacts: Mapping[str, Artifact],
    files: dict[str, dict[str, Any]],
    inputs: dict[str, Any],
) -> dict[str, Any]:
    lineage = {}
    for role, artifact in artifacts.items():
        manifest = artifact.manifest()
        lineage[role] = {
            key: manifest[key]
            for key in ("stage", "version", "key", "digest", "inputs", "parameters", "seed", "packages")
        }
    return {
        "schema": SCHEMA,
        "identity": identity,
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "packages": report.packages(artifacts),
        "inputs": inputs,
        "lineage": lineage,
        "files": files,
    }


def _digest_and_size(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("sha256", "bytes")}


def _files(
    folder: Path, made_from: Mapping[str, Artifact], known: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """SHA-256, size and origin of every file that is there; those that are known are not read again."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if name in known:
            files[name] = known[name]
            continue
        source = made_from.get(name.split("/", 1)[0])
        origin = (
            {"stage": "release"}
            if source is None or name.endswith((f"/{CARD}", f"/{MODELFILE}"))
            else {"stage": source.stage, "key": source.key, "digest": source.digest}
        )
        files[name] = {"sha256": sha256_of_file(path), "bytes": path.stat().st_size, "made_from": origin}
    return files
