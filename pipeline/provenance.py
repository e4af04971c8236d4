"""What a release was made from, each with its SHA-256: models, data, recipe, code and packages."""

import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, sha256_of_file, sha256_of_json
from pipeline.recipe import Recipe

OWN_PACKAGES = ("taid", "export", "pipeline", "flows")
OWN_FILES = (".py", ".jinja", ".json", ".cmake")
INSTALLER_FILES = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
"""Of a package's metadata: what its installation wrote, different from machine to machine."""


def inputs(recipe: Recipe, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """The inputs of a release as ``manifest.json`` lists them.

    Files of the teacher, of a given student and of the data have their own SHA-256; text and prompts that
    packages carry have the package's version, which the list of packages gives a SHA-256. Data sets of a hub
    are named; what was taken of them is in the SHA-256 of their part, as of all data.
    """

    def model(role: str) -> dict[str, Any]:
        section = getattr(recipe, role)
        return {
            "model": section.model,
            "revision": section.revision,
            "licence": section.licence,
            "files": artifacts[role].manifest()["parameters"].get("files", {}),
            "sha256": artifacts[role].digest,
        }

    def data(role: str) -> dict[str, Any]:
        section = getattr(recipe.data, role)
        files = artifacts[role].manifest()["parameters"].get("sources", {})
        return {
            "sources": list(section.sources),
            "licence": section.licence,
            "files": files,
            "sha256": sha256_of_json([list(section.sources), files, artifacts[role].digest]),
        }

    return {
        "recipe": {"sha256": sha256_of_json(recipe.model_dump(mode="json", by_alias=True))},
        "teacher": model("teacher"),
        **({"student": model("student")} if recipe.student.model is not None else {}),
        "data": {role: data(role) for role in ("text", "chats")},
        "code": {"version": importlib.metadata.version("martlet"), "sha256": _own_code()},
        "packages": dict(_installed_packages()),
    }


def incomplete(recorded: Any) -> list[str]:
    """A sentence for each part of a manifest's inputs that is missing or has no SHA-256."""
    if not isinstance(recorded, dict):
        return ["manifest.json: does not say what the release was made from (no `inputs`)."]
    problems = []
    parts = ("recipe", "teacher", "code", *(["student"] if "student" in recorded else []))
    digests: dict[str, Any] = {part: recorded.get(part) for part in parts}
    data, packages = recorded.get("data"), recorded.get("packages")
    for role in ("text", "chats"):
        digests[f"data.{role}"] = data.get(role) if isinstance(data, dict) else None
    if not isinstance(packages, dict) or not packages:
        problems.append("manifest.json: inputs.packages: is missing.")
    else:
        digests |= {f"packages.{name}": entry for name, entry in packages.items()}
    for name, entry in digests.items():
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or len(digest) != 64:
            problems.append(f"manifest.json: inputs.{name}: has no SHA-256.")
    return problems


def changed_files(recorded: Mapping[str, Any]) -> list[str]:
    """A sentence for each file of models and data that is still where the recipe found it, but has changed.
    What is gone is no problem: a release travels without its inputs."""
    problems = []
    candidates = [
        (Path(recorded[role]["model"]) / name, digest)
        for role in ("teacher", "student")
        if role in recorded
        for name, digest in recorded[role]["files"].items()
    ]
    for role in ("text", "chats"):
        section = recorded["data"][role]
        for name, digest in section["files"].items():
            place, _, inside = name.partition("/")
            if inside and place.isdigit() and int(place) < len(section["sources"]):
                source = Path(section["sources"][int(place)])
                candidates.append((source if source.is_file() else source / inside, digest))
    for path, digest in candidates:
        if path.is_absolute() and path.is_file() and sha256_of_file(path) != digest:
            problems.append(f"{path}: has changed since the release was made from it.")
    return problems


@functools.cache
def _own_code() -> str:
    root = Path(__file__).parents[1]
    digests = {
        path.relative_to(root).as_posix(): sha256_of_file(path)
        for package in OWN_PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.is_file() and path.suffix in OWN_FILES
    }
    return sha256_of_json(digests)


@functools.cache
def _installed_packages() -> dict[str, dict[str, str]]:
    """Version of every installed package, and one SHA-256 over those of its files as they were published."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if not name or name.lower() == "martlet":
            continue
        files = {
            str(file): f"{file.hash.mode}={file.hash.value}"
            for file in distribution.files or []
            if file.hash is not None and file.name not in INSTALLER_FILES and ".." not in file.parts
        }
        found[name] = {"version": distribution.version, "sha256": sha256_of_json(files)}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
