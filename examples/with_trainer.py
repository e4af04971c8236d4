"""Distillation with checkpoints, evaluation and logging: the Trainer, used as it is. Nothing is subclassed.

python examples/with_trainer.py --output distilled
"""

import argparse
import copy

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from taid import (
    AdaptiveInterpolation,
    DistillationTrainer,
    LiveTeacher,
    TokenBlockDataset,
    evaluate_distillation,
    prune_by_influence,
)


def main() -> tuple[float, float]:
    """Prunes a student out of a teacher and distils; returns KL(teacher || student) before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="distilled", help="folder of checkpoints and the student")
    chosen = parser.parse_args()

    # Your model and your tokens: `AutoModelForCausalLM.from_pretrained(...)`, packed blocks [N, T].
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    config = LlamaConfig(num_hidden_layers=4, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config)
    generator = np.random.default_rng(0)
    calibration, train, held_out = (generator.integers(0, 256, (count, 32)) for count in (8, 256, 8))

    student, influences, dropped = prune_by_influence(copy.deepcopy(teacher), calibration, layers=3)
    print(f"influence of the layers: {[round(i, 3) for i in influences]}; dropped: {dropped}")

    live = LiveTeacher(teacher)
    before = evaluate_distillation(student, live, held_out)["kl_teacher_student"]
    trainer = DistillationTrainer(
        model=student,
        args=TrainingArguments(
            output_dir=chosen.output,
            learning_rate=1e-3,
            per_device_train_batch_size=8,
            num_train_epochs=4,
            logging_steps=16,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=TokenBlockDataset(train),
        teacher=live,
        objective="taid",
        interpolation=AdaptiveInterpolation(t_start=0.4),
    )
    trainer.train()
    trainer.save_model(chosen.output)
    after = evaluate_distillation(student, live, held_out)["kl_teacher_student"]
    print(f"KL(teacher || student) on held-out blocks: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
