"""What a recipe will take, before anything runs: parameters, FLOPs, tokens, hours, memory, cache, disk.

Nothing is downloaded but a configuration, and no weight exists: the models are built on tensors that hold
nothing (``pipeline.plan_worker``).
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from pipeline.artifacts import write_json
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.teacher import packaged_gguf

PUBLISHED = Path(__file__).with_name("published_configurations.json")
"""Configurations of models whose recipes are here, as their makers published them: planning needs no hub."""
BITS = {
    "f16": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.6,
    "q5_k_m": 5.7,
    "q4_k_m": 4.9,
    "q4_0": 4.6,
    "q0f32": 32.0,
    "q4f32_1": 5.0,
    "q4f16_1": 4.5,
    "fp32": 32.0,
    "fp16": 16.0,
    "int8": 9.0,
    "int4": 5.5,
}
"""About how many bits of a file stand for a parameter; for the sum of disk alone."""
CHECKPOINTS = 3
"""Two are kept while a third is written."""


def run(
    recipe: Recipe,
    devices: int = 1,
    precision: str | None = None,
    tokens_per_second: float | None = None,
    tflops: float | None = None,
    device_memory: float | None = None,
) -> dict[str, Any]:
    """Plans a recipe's distillation.

    Args:
        recipe: the recipe.
        devices: accelerators (or processes) that share the work.
        precision: ``bf16`` (float32 master weights) or ``fp32``; None: bf16 for several devices or where
            there is a GPU.
        tokens_per_second: training tokens of all devices together.
        tflops: sustained 10^12 FLOP/s of one device; another way to state the throughput.
        device_memory: GB (10^9 bytes) of one device, to say whether a step fits.

    Returns:
        ``teacher``, ``student``, ``tokens``, ``flops``, ``hours`` (None without a stated throughput),
        ``memory`` of one device, ``cache`` and ``disk``, as JSON values.

    Raises:
        UserError: a configuration cannot be had, the models do not fit together, or the teacher brings code
            of its own, which planning does not run.
    """
    if recipe.teacher.trust_remote_code:
        raise UserError("teacher.trust_remote_code: a teacher with code of its own cannot be planned.")
    if precision is None:
        precision = "bf16" if devices > 1 or torch.cuda.is_available() else "fp32"
    teacher = configuration(recipe.teacher.model, recipe.teacher.revision, "teacher.model")
    pruned = recipe.student.prune
    if pruned is None:
        assert recipe.student.model is not None
        student = configuration(recipe.student.model, recipe.student.revision, "student.model")
    else:
        student = teacher
        if pruned.layers > teacher.get_text_config().num_hidden_layers:
            raise UserError(
                f"student.prune.layers: {pruned.layers} layers cannot remain of the teacher's "
                f"{teacher.get_text_config().num_hidden_layers}."
            )
    rows = [config.get_text_config().vocab_size for config in (teacher, student)]
    section, text = recipe.distill, recipe.data.text
    simulated = _simulate(
        {
            "teacher": teacher.to_dict(),
            "student": student.to_dict(),
            "student_layers": None if pruned is None else pruned.layers,
            "vocabulary_size": min(rows),
            "sequence_length": text.sequence_length,
            "batch_size": section.batch_size,
            "gradient_accumulation": section.gradient_accumulation,
            "freeze_embeddings": section.freeze_embeddings,
            "devices": devices,
            "precision": precision,
            "cache": recipe.teacher.cache,
            "cache_dtype": recipe.teacher.cache_dtype,
        }
    )
    blocks = -(-text.train_tokens // text.sequence_length)
    held_out = -(-text.held_out_tokens // text.sequence_length) * text.sequence_length
    train = blocks * text.sequence_length
    trained = int(train * section.epochs)
    step_tokens = section.batch_size * section.gradient_accumulation * devices * text.sequence_length
    flops_of_teacher, flops_of_student = simulated["teacher"], simulated["student"]["step_flops"]
    body, head = flops_of_teacher["forward_flops"], flops_of_teacher["head_flops"]
    # What the teacher computes once for each token of the text, and in every step: its head turns cached
    # states into logits each time, sampled logits are read as they are.
    once, every = {"none": (0.0, body + head), "hidden": (body, head), "sampled": (body + head, 0.0)}[
        recipe.teacher.cache
    ]
    total = once * (train + held_out) + (every + flops_of_student) * trained
    hours = None
    if tflops is not None:
        hours = total / (tflops * 1e12 * devices) / 3600
    elif tokens_per_second is not None:
        hours = trained / tokens_per_second / 3600
    width = teacher.get_text_config().hidden_size
    element = 4 if recipe.teacher.cache_dtype == "float32" else 2
    # Of sampled tokens: id, log-probability, and the position's threshold. Held-out text keeps hidden states.
    id_bytes = 2 if min(rows) <= 2**16 else 4
    sampled = recipe.teacher.cache_samples * (id_bytes + 4) + 4
    per_token = {"none": 0, "hidden": width * element, "sampled": sampled}[recipe.teacher.cache]
    cache_bytes = per_token * train + (width * element if per_token else 0) * held_out
    disk = _disk(recipe, simulated, train, held_out, cache_bytes, _weight_bytes(recipe, teacher))
    memory = {**simulated["memory"], "devices": devices, "precision": precision}
    if device_memory is not None:
        memory |= {"device_bytes": int(device_memory * 1e9)}
        memory["fits"] = memory["bytes"] <= memory["device_bytes"]
    return {
        "recipe": recipe.name,
        "teacher": {"model": recipe.teacher.model, "vocabulary": rows[0], **simulated["teacher"]},
        "student": {
            "model": recipe.student.model or f"{recipe.teacher.model} with {pruned.layers} layers",  # type: ignore[union-attr]
            "vocabulary": rows[1],
            **simulated["student"],
        },
        "vocabulary": min(rows),
        "tokens": {
            "train": train,
            "epochs": section.epochs,
            "trained": trained,
            "held_out": held_out,
            "step": step_tokens,
            "steps": math.ceil(trained / step_tokens),
        },
        "flops": {"teacher_once": once, "step": every + flops_of_student, "total": total},
        "throughput": {"tokens_per_second": tokens_per_second, "tflops": tflops},
        "hours": hours,
        "memory": memory,
        "cache": {
            "kind": recipe.teacher.cache,
            "bytes_per_token": per_token,
            "bytes": cache_bytes,
            "hidden_bytes_per_token": width * element,
        },
        "disk": {**disk, "total": sum(disk.values())},
    }


def configuration(model: str, revision: str | None, key: str) -> PretrainedConfig:
    """The configuration of a model: of a folder, of a package's GGUF, a published one, or the hub's.

    Raises:
        UserError: there is none.
    """
    gguf = packaged_gguf(model)
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    try:
        if gguf is not None:
            return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if model in published and revision is None:
            return AutoConfig.for_model(**published[model])
        return AutoConfig.from_pretrained(model, revision=revision or "main")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{key}: no configuration of {model} can be had ({reason}).") from error


def _weight_bytes(recipe: Recipe, teacher: PretrainedConfig) -> int:
    """Bytes of a parameter in the teacher's files: a GGUF is stored dequantized, others as they are."""
    if recipe.teacher.model.startswith("package:") or teacher.dtype in (None, torch.float32):
        return 4
    return 2


def _disk(
    recipe: Recipe,
    simulated: dict[str, Any],
    train: int,
    held_out: int,
    cache_bytes: int,
    teacher_bytes: int,
) -> dict[str, int]:
    """Bytes of what the store and the release will hold, by kind. Chats and reports are small beside it."""
    parameters = simulated["student"]["parameters"]
    models = 3 + (recipe.pretrain is not None) + recipe.distill.control
    formats = [*recipe.export.gguf, *recipe.export.mlc, *recipe.export.onnx]
    if recipe.export.gguf:
        formats.append("f16")
    exported = sum(int(parameters * BITS.get(name, 16.0) / 8) for name in formats)
    calibration = recipe.data.text.calibration_tokens
    return {
        "teacher": simulated["teacher"]["parameters"] * teacher_bytes,
        "text": (train + held_out + calibration) * 8,
        "cache": cache_bytes,
        "students": models * parameters * 4,
        "checkpoints": CHECKPOINTS * (parameters * 4 + simulated["student"]["trainable_parameters"] * 8),
        # In the store and, a second time, in the release.
        "exports": 2 * exported,
        "release": 2 * parameters * 4,
    }


def _simulate(request: dict[str, Any]) -> dict[str, Any]:
    """Runs ``pipeline.plan_worker``.

    Raises:
        UserError: it fails; the sentence carries its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        request_file, result_file = Path(folder) / "request.json", Path(folder) / "result.json"
        write_json(request_file, request)
        worker = subprocess.run(
            [sys.executable, "-m", "pipeline.plan_worker", str(request_file), str(result_file)],
            capture_output=True,
            text=True,
            # Shapes need no second thread, and an accelerator would only be woken.
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        if worker.returncode:
            lines = [line for line in worker.stderr.splitlines() if line.strip()]
            raise UserError(
                f"plan: the step cannot be simulated ({(lines or ['no message'])[-1].strip().rstrip('.')})."
            )
        result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        return result
