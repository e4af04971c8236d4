"""Model cards: a README.md for each folder of a release."""

from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from pipeline.choose import NEGLIGIBLE_KL, weigh
from pipeline.hub import base_model, hub_name, shared_metadata, shown
from pipeline.licences import result_licence, unjudged, unjudged_sentence
from pipeline.pages import readable_number, readable_percent, readable_size
from pipeline.recipe import Recipe

LIBRARIES = {
    "base": "transformers",
    "instruct": "transformers",
    "gguf": "llama-cpp-python",
    "mlc": "mlc-llm",
    "onnx": "transformers.js",
}
"""As the hub calls them: it shows code for these and counts downloads by them."""

TAGS = {
    "base": [],
    "instruct": ["conversational"],
    "gguf": ["conversational", "gguf", "llama.cpp", "ollama"],
    "mlc": ["conversational", "mlc-llm", "web-llm"],
    "onnx": ["conversational", "onnx", "onnxruntime-genai"],
}

CITATIONS = {
    "HuggingFaceTB/SmolLM2": """@article{allal2025smollm2,
  title={SmolLM2: When Smol Goes Big -- Data-Centric Training of a Small Language Model},
  author={Allal, Loubna Ben and others},
  journal={arXiv preprint arXiv:2502.02737},
  year={2025}
}""",
    "Qwen/Qwen2.5": """@article{qwen2024qwen25,
  title={Qwen2.5 Technical Report},
  author={{Qwen Team}},
  journal={arXiv preprint arXiv:2412.15115},
  year={2024}
}""",
}
"""What a teacher's family asks to be cited, by the beginning of its name on the hub."""

JAVASCRIPT_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
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
    not_judged = unjudged(recipe)
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

        files = of_this_folder(facts["fidelity"])
        precisions = [name for name in JAVASCRIPT_DTYPES if name in recipe.export.onnx]
        cards[folder] = template.render(
            metadata=metadata(recipe, facts, kind, folder).to_yaml().strip(),
            folder=folder,
            kind=kind,
            quantization=only,
            recipe=recipe,
            teacher_link=link(recipe.teacher.model),
            student_link=None if recipe.student.model is None else link(recipe.student.model),
            licence=result_licence(recipe),
            not_judged=unjudged_sentence(not_judged) if not_judged else None,
            text_sources=[shown(source) for source in recipe.data.text.sources],
            chat_sources=[shown(source) for source in recipe.data.chats.sources],
            facts=facts,
            fidelity=files,
            taken=weigh(files, facts["device"])["ship"] if len(files) > 1 else None,
            smallest=min(files, key=lambda entry: entry["bytes"])["file"] if files else None,
            negligible_kl=NEGLIGIBLE_KL,
            device=of_this_folder(facts["device"]),
            javascript_dtype=JAVASCRIPT_DTYPES[precisions[-1]] if precisions else "",
            folders={other: other_kind for other, (other_kind, _) in kinds.items()},
            teacher_citation=next(
                (entry for start, entry in CITATIONS.items() if (teacher or "").startswith(start)), None
            ),
        )
    return cards


def metadata(recipe: Recipe, facts: dict[str, Any], kind: str, folder: str) -> ModelCardData:
    """The metadata of a card as the hub reads it: licence, base model, data sets, results."""
    quantized = kind in ("gguf", "mlc", "onnx")
    base = f"{recipe.name}-Instruct" if quantized else base_model(recipe)
    shared = shared_metadata(recipe)
    optional: dict[str, Any] = {
        **{key: value for key, value in shared.items() if key != "tags"},
        "base_model": base,
        "quantized_by": "martlet" if quantized else None,
        "base_model_relation": ("quantized" if quantized else "finetune") if base else None,
    }
    return ModelCardData(
        library_name=LIBRARIES[kind],
        tags=[*shared["tags"], *TAGS[kind]],
        model_name=folder,
        eval_results=results(recipe, facts, kind, folder) or None,
        **{key: value for key, value in optional.items() if value is not None},
    )


def results(recipe: Recipe, facts: dict[str, Any], kind: str, folder: str) -> list[EvalResult]:
    """What was measured of a folder's own model or files, as the hub lists results: quality on held-out
    text or chats, and of each exported file how far it is from the model."""

    def result(data: str, metric: str, name: str, value: float | None) -> list[EvalResult]:
        if value is None:
            return []
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=data,
                dataset_name=data.replace("-", " ").capitalize() + " of the training sources",
                metric_type=metric,
                metric_name=name,
                metric_value=round(value, 4),
            )
        ]

    if kind == "base":
        # Measured after distillation: what was pre-trained further is another model.
        if recipe.pretrain is not None:
            return []
        held_out = facts["distillation"]["held_out"]
        cross_entropy, kl = held_out["student_cross_entropy_after"], held_out["kl_after"]
        data = "held-out-text"
    elif kind == "instruct":
        after = facts["instruct"]["after"]
        cross_entropy, kl = after["assistant_cross_entropy"], after["kl_to_teacher"]
        data = "held-out-chats"
    else:
        # The folder's last part but one tells MLC's quantizations apart.
        files = [
            entry
            for entry in facts["fidelity"]
            if entry["format"] == kind and (kind != "mlc" or folder.endswith(f"-{entry['quantization']}-MLC"))
        ]
        measures = {
            "mean_kl": ("kl_divergence", "mean KL(model || file), nats per token"),
            "same_top": ("same_top_token", "same most likely token as the model"),
            "perplexity_ratio": ("perplexity_ratio", "perplexity over the model's"),
        }
        return [
            found
            for entry in files
            for key, (metric, name) in measures.items()
            for found in result(
                "held-out-text-and-chats", metric, f"{entry['quantization']}: {name}", entry[key]
            )
        ]
    return [
        *result(data, "cross_entropy", "Cross-entropy, nats per token", cross_entropy),
        *result(data, "kl_divergence", "KL(teacher || student), nats per token", kl),
    ]


def link(model: str) -> str:
    """A model as a card names it, with its address where the hub has it."""
    name = hub_name(model)
    return f"[{name}](https://huggingface.co/{name})" if name else shown(model)
