"""TAID: Temporally Adaptive Interpolated Distillation (Shing et al., ICLR 2025, arXiv 2501.16937)."""

from taid.errors import TaidError
from taid.fused import (
    HeadOptions,
    fused_adaptive_kl,
    fused_cross_entropy,
    fused_decoupled_kd,
    fused_forward_kl,
    fused_jensen_shannon,
    fused_reverse_kl,
    fused_skew_forward_kl,
    fused_skew_reverse_kl,
    fused_taid,
    fused_total_variation,
)
from taid.objectives import (
    adaptive_kl,
    cross_entropy,
    curriculum_reversal,
    curriculum_temperature,
    decoupled_kd,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    total_variation,
)
from taid.schedule import AdaptiveInterpolation
from taid.student import block_influence, drop_layers, freeze_embeddings, prune_by_influence
from taid.teacher import CachedTeacher, LiveTeacher, Teacher, model_digest, write_hidden_state_cache
from taid.trainer import (
    OBJECTIVES,
    DistillationTrainer,
    TokenBlockDataset,
    evaluate_distillation,
    last_complete_checkpoint,
)
from taid.vocabulary import shared_vocabulary_size

__all__ = [
    "OBJECTIVES",
    "AdaptiveInterpolation",
    "CachedTeacher",
    "DistillationTrainer",
    "HeadOptions",
    "LiveTeacher",
    "TaidError",
    "Teacher",
    "TokenBlockDataset",
    "adaptive_kl",
    "block_influence",
    "cross_entropy",
    "curriculum_reversal",
    "curriculum_temperature",
    "decoupled_kd",
    "drop_layers",
    "evaluate_distillation",
    "forward_kl",
    "freeze_embeddings",
    "fused_adaptive_kl",
    "fused_cross_entropy",
    "fused_decoupled_kd",
    "fused_forward_kl",
    "fused_jensen_shannon",
    "fused_reverse_kl",
    "fused_skew_forward_kl",
    "fused_skew_reverse_kl",
    "fused_taid",
    "fused_total_variation",
    "jensen_shannon",
    "last_complete_checkpoint",
    "model_digest",
    "prune_by_influence",
    "reverse_kl",
    "shared_vocabulary_size",
    "skew_forward_kl",
    "skew_reverse_kl",
    "taid",
    "total_variation",
    "write_hidden_state_cache",
]
