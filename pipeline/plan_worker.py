"""Counts parameters and FLOPs and simulates the memory of a distillation step on tensors that hold nothing.

The models are built from their configurations under PyTorch's ``FakeTensorMode``: every operation of the
step runs on shapes alone. PyTorch's own trackers watch it: ``FlopCounterMode`` and, for memory,
``FSDPMemTracker`` with a process group that only pretends to have other ranks (``MemTracker`` for one
device). It runs in a process of its own, because such a process group cannot be taken back.

Usage: python -m pipeline.plan_worker REQUEST.json RESULT.json
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.artifacts import write_json
from taid.fused import HeadOptions, fused_cross_entropy, fused_taid
from taid.heads import head_options, head_weight, trim
from taid.student import drop_layers, freeze_embeddings
from taid.teacher import DTYPES


class ShapesAlone(FakeTensorMode):
    """Tensors that hold nothing; whoever asks one for its value is told one, or true."""

    def dispatch(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation on shapes."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return super().dispatch(func, types, args, kwargs or {})


class TrainingStep(nn.Module):
    """The loss of one micro-batch as ``taid.DistillationTrainer`` forms it.

    The teacher runs along (``teacher`` is a model), is read from a cache (``cached_head`` is its head), or
    takes no part in the step (neither: cross-entropy).
    """

    def __init__(
        self, student: Any, teacher: Any | None, cached_head: Tensor | None, vocabulary_size: int
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.vocabulary_size = vocabulary_size
        self.cached_head: Tensor | None
        self.register_buffer("cached_head", cached_head)

    def forward(self, input_ids: Tensor, cached_hidden: Tensor | None = None) -> Tensor:
        """The loss of ``input_ids`` ``[B, T]``; ``cached_hidden`` ``[B, T, H]`` comes with a cached head."""
        teacher_hidden, teacher_weight, teacher_options = cached_hidden, self.cached_head, HeadOptions()
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = hidden_states(self.teacher, input_ids)[:, :-1]
            teacher_weight, teacher_options = head_weight(self.teacher), head_options(self.teacher)
        elif teacher_hidden is not None:
            teacher_hidden = teacher_hidden[:, :-1]
        student_hidden = hidden_states(self.student, input_ids)[:, :-1]
        weight, options = trim(head_weight(self.student), head_options(self.student), self.vocabulary_size)
        if teacher_hidden is None or teacher_weight is None:
            return fused_cross_entropy(student_hidden, weight, input_ids[:, 1:], student_head=options)
        teacher_weight, teacher_options = trim(teacher_weight, teacher_options, self.vocabulary_size)
        return fused_taid(
            student_hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            0.5,
            student_head=options,
            teacher_head=teacher_options,
        )


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """Final hidden states through the whole model, as the trainer takes them where the model is sharded."""
    captured: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(
        lambda module, arguments, output: captured.append(output.last_hidden_state)
    )
    model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    handle.remove()
    return captured[0]


def build(values: dict[str, Any], dtype: torch.dtype, attention: str, layers: int | None = None) -> Any:
    """A model of a configuration, of which ``layers`` remain; its tensors hold nothing."""
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if layers is not None:
        drop_layers(model, list(range(layers)))
    return model


def count_flops(request: dict[str, Any]) -> dict[str, Any]:
    """Parameters and FLOPs of a token, by operation, as PyTorch's counter has them (two for a multiply-add;
    attention over the whole square of the sequence).

    Returns:
        ``teacher`` {parameters, forward_flops (body), head_flops} and ``student`` {parameters,
        trainable_parameters, step_flops (forward and backward, its head included)}, FLOPs a token.
    """
    length, vocabulary = request["sequence_length"], request["vocabulary_size"]
    ids = torch.zeros(1, length, dtype=torch.long)
    # Attention as plain matrix products: the counter knows those on any device.
    teacher = build(request["teacher"], torch.float32, "eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = teacher.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    body = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden @ head_weight(teacher)[:vocabulary].T
    head = counter.get_total_flops()
    student = build(request["student"], torch.float32, "eager", request["student_layers"])
    if request["freeze_embeddings"]:
        freeze_embeddings(student)
    step = TrainingStep(student, None, None, vocabulary)
    # The fused loss adds to the head's gradient in place, which the counter does not know by itself.
    known = {torch.ops.aten.addmm_: in_place_product_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        step(ids).backward()
    return {
        "teacher": {
            "parameters": parameters_of(teacher.parameters()),
            "forward_flops": body / length,
            "head_flops": head / length,
        },
        "student": {
            "parameters": parameters_of(student.parameters()),
            "trainable_parameters": parameters_of(p for p in student.parameters() if p.requires_grad),
            "step_flops": counter.get_total_flops() / length,
        },
    }


def in_place_product_flops(
    total: torch.Size,
    left: torch.Size,
    right: torch.Size,
    out_shape: torch.Size | None = None,
    **options: Any,
) -> int:
    """FLOPs of ``total.addmm_(left, right)`` from the shapes."""
    return 2 * left[0] * left[1] * right[1]


def frozen_as_buffers(model: nn.Module) -> None:
    """Parameters that are not trained become buffers: ``MemTracker`` knows frozen tensors in no other way."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def parameters_of(parameters: Iterable[Tensor]) -> int:
    """Numbers in some parameters."""
    return sum(parameter.numel() for parameter in parameters)


def simulate_memory(request: dict[str, Any], mesh: DeviceMesh | None) -> dict[str, Any]:
    """The largest memory of one device over an optimizer step, with what it consists of at that moment.

    With a mesh of devices, student and teacher are sharded layer by layer over them (FSDP2). In ``bf16`` the
    student's master weights, gradients and optimizer states are float32 and its computation bfloat16; the
    teacher is bfloat16. In ``fp32`` everything is float32.

    Returns:
        ``bytes`` and ``parts``, {kind: bytes}.
    """
    low = request["precision"] == "bf16"
    teacher_type = torch.bfloat16 if low else torch.float32
    student = build(request["student"], torch.float32, "sdpa", request["student_layers"])
    if request["freeze_embeddings"]:
        freeze_embeddings(student)
    teacher, head, cached = None, None, None
    width = AutoConfig.for_model(**request["teacher"]).get_text_config().hidden_size
    batch = (request["batch_size"], request["sequence_length"])
    if request["cache"] == "none":
        teacher = build(request["teacher"], teacher_type, "sdpa").eval().requires_grad_(False)
    elif request["cache"] == "hidden":
        head = torch.empty(request["vocabulary_size"], width, dtype=teacher_type)
        cached = torch.empty(*batch, width, dtype=DTYPES[request["cache_dtype"]])
    step: Any = TrainingStep(student, teacher, head, request["vocabulary_size"])
    if mesh is not None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32)
        for model in filter(None, (teacher, student)):
            for layer in model.get_decoder().layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        fully_shard(step, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), foreach=False)
    ids = torch.zeros(batch, dtype=torch.long)

    def train(micro_batches: int, between: Callable[[], None]) -> None:
        for number in range(micro_batches):
            if number:
                between()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                loss = step(ids, cached)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # Unwatched first: it makes the optimizer's states, and what distributed tensors work out about shapes
    # once would be taken for memory of the step.
    train(1, lambda: None)
    tracker: Any
    if mesh is not None:
        tracker = FSDPMemTracker(step, optimizer)
        tracker.track_inputs((ids, cached))
    else:
        frozen_as_buffers(step)
        tracker = MemTracker()
        tracker.track_external(step, optimizer, *[tensor for tensor in (ids, cached) if tensor is not None])
    with tracker:
        # From the second micro-batch on, the gradients of the one before are there, too.
        train(min(request["gradient_accumulation"], 2), tracker.reset_mod_stats)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    parts = {str(getattr(kind, "value", kind)).lower(): int(size) for kind, size in snapshot.items()}
    total = parts.pop("total")
    return {"bytes": total, "parts": {kind: size for kind, size in parts.items() if size}}


def main() -> int:
    """Reads the request, writes the result."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    mesh = None
    if request["devices"] > 1:
        torch.distributed.init_process_group("fake", rank=0, world_size=request["devices"], store=FakeStore())
        mesh = init_device_mesh("cpu", (request["devices"],))
    with ShapesAlone():
        result = {**count_flops(request), "memory": simulate_memory(request, mesh)}
    write_json(Path(sys.argv[2]), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
