"""The bill of materials of a release, in CycloneDX's JSON (https://cyclonedx.org), by its own library."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from pipeline.artifacts import sha256_of_json
from pipeline.hub import shown
from pipeline.licences import UNKNOWN, result_licence
from pipeline.recipe import Recipe

FILE_NAME = "ml-bom.cdx.json"
NAMESPACE = uuid.UUID("5b3f0e5c-52f1-4c0e-9d5e-6d6172746c65")


def bill_of_materials(
    recipe: Recipe, inputs: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A CycloneDX 1.6 document: the model, the teacher, a given student and the data it was made from with
    their licences, the packages that made it, and the files of the release.

    Args:
        recipe: the recipe.
        inputs: ``provenance.inputs``'s.
        files: {name: {"sha256", "bytes"}} of the files to list. The same files of the same inputs give the
            same bytes: no time stamp, and a serial number that follows from them.
    """
    model = _component("model", ComponentType.MACHINE_LEARNING_MODEL, recipe.name, result_licence(recipe))
    models = [
        _component(
            role,
            ComponentType.MACHINE_LEARNING_MODEL,
            shown(inputs[role]["model"]),
            inputs[role]["licence"],
            version=inputs[role]["revision"],
            hashes=inputs[role]["files"],
            properties={"martlet:digest": inputs[role]["sha256"]},
        )
        for role in ("teacher", "student")
        if role in inputs
    ]
    data = [
        _component(
            f"data-{role}",
            ComponentType.DATA,
            ", ".join(shown(source) for source in entry["sources"]),
            entry["licence"],
            hashes=entry["files"],
            properties={"martlet:digest": entry["sha256"]},
        )
        for role, entry in inputs["data"].items()
    ]
    packages = [
        Component(
            name=name,
            version=entry["version"],
            type=ComponentType.LIBRARY,
            bom_ref=f"package-{name}",
            purl=PackageURL("pypi", name=name.lower().replace("_", "-"), version=entry["version"]),
            properties=[Property(name="martlet:files-sha256", value=entry["sha256"])],
        )
        for name, entry in inputs["packages"].items()
    ]
    released = [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"file-{name}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=entry["sha256"])],
        )
        for name, entry in files.items()
    ]
    code = Component(
        name="martlet",
        version=inputs["code"]["version"],
        type=ComponentType.APPLICATION,
        bom_ref="martlet",
        properties=[Property(name="martlet:code-sha256", value=inputs["code"]["sha256"])],
    )
    bom = Bom(
        metadata=BomMetaData(component=model),
        components=[*models, *data, code, *packages, *released],
        serial_number=uuid.uuid5(NAMESPACE, sha256_of_json([inputs, files])),
    )
    bom.register_dependency(model, [*models, *data, code])
    bom.register_dependency(code, packages)
    for file in released:
        bom.register_dependency(file, [model])
    document = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    # The library stamps the time, which is no part of what the release is.
    document["metadata"].pop("timestamp", None)
    return document


def file_digests(document: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file that a bill of materials lists."""
    return {
        component["name"]: component["hashes"][0]["content"]
        for component in document["components"]
        if component["type"] == "file"
    }


def _component(
    reference: str,
    kind: ComponentType,
    name: str,
    licence: str,
    version: str | None = None,
    hashes: Mapping[str, str] | None = None,
    properties: Mapping[str, str] | None = None,
) -> Component:
    files = [
        Component(
            name=file,
            type=ComponentType.FILE,
            bom_ref=f"{reference}-{file}",
            # What packages carry is identified by their version, a property, not a hash.
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)] if len(digest) == 64 else [],
            properties=[] if len(digest) == 64 else [Property(name="martlet:version", value=digest)],
        )
        for file, digest in (hashes or {}).items()
    ]
    return Component(
        name=name,
        version=version,
        type=kind,
        bom_ref=reference,
        licenses=[LicenseFactory().make_from_string(licence)] if licence != UNKNOWN else [],
        components=files,
        properties=[Property(name=key, value=value) for key, value in (properties or {}).items()],
    )
