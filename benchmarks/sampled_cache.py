"""How far an objective's estimate from sampled probabilities is from the exact one, on the default recipe's
teacher and pruned student: the gradient that reaches the student's final hidden states, over held-out text.

- One draw: its distance from the exact gradient, over that gradient's norm.
- The mean of all draws: what remains of that distance. Noise falls with the root of the number of draws, a
  bias does not.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from pipeline import prepare, student, teacher
from pipeline.artifacts import Store
from pipeline.distill import text_blocks
from pipeline.models import load_model
from pipeline.recipe import load_recipe
from taid import LiveTeacher, fused_sampled_objective, sample_probabilities
from taid.sampled import record_type
from taid.trainer import OBJECTIVES

SAMPLES = (8, 32, 128)
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("forward_kl", {}),
    ("taid", {"t": 0.4}),
    ("taid", {"t": 0.7}),
    ("taid", {"t": 1.0}),
    ("jensen_shannon", {}),
    ("skew_forward_kl", {}),
    ("skew_reverse_kl", {}),
    ("total_variation", {}),
)


def final_states(options: argparse.Namespace) -> dict[str, Tensor]:
    """Final hidden states ``[tokens, H]`` of teacher and student over held-out text, and their heads."""
    store, recipe = Store(options.store), load_recipe(common.RECIPE)
    teacher_artifact = teacher.run(store, recipe)
    text = prepare.run(store, recipe, teacher_artifact)
    student_artifact = student.run(store, recipe, teacher_artifact, text)
    blocks, positions = text_blocks(text.path)
    count = -(-options.tokens // blocks["held_out"].shape[1])
    ids, places = (torch.from_numpy(split["held_out"][:count]).long() for split in (blocks, positions))
    found = {}
    for who, artifact in (("teacher", teacher_artifact), ("student", student_artifact)):
        live = LiveTeacher(load_model(artifact.path / "model"))
        found[f"{who}_hidden"] = live.hidden_states(ids, position_ids=places).flatten(0, 1)[: options.tokens]
        found[f"{who}_head_weight"] = live.head_weight.detach()
    return found


def gradient_of(objective: Any, hidden: Tensor, **arguments: Any) -> Tensor:
    """The objective's gradient by the student's hidden states ``[tokens, H]``, float64."""
    leaf = hidden.detach().clone().requires_grad_()
    objective(student_hidden=leaf, **arguments).backward()
    assert leaf.grad is not None
    return leaf.grad.double()


def errors(states: dict[str, Tensor], draws: int) -> list[dict[str, Any]]:
    """One row for each objective and number of samples."""
    log_p = (states["teacher_hidden"] @ states["teacher_head_weight"].T).float().log_softmax(-1)
    hidden, weight = states["student_hidden"], states["student_head_weight"]
    others = {name: tensor for name, tensor in states.items() if name != "student_hidden"}
    tokens, vocabulary = log_p.shape
    rows = []
    for samples in SAMPLES:
        offsets = [torch.from_numpy(np.random.default_rng([0, draw]).random(tokens)) for draw in range(draws)]
        kept = [sample_probabilities(log_p, samples, offset) for offset in offsets]
        for name, values in CASES:
            exact = gradient_of(OBJECTIVES[name], hidden, **others, **values)
            drawn = [
                gradient_of(
                    partial(fused_sampled_objective, name, sampled=sampled),
                    hidden,
                    student_head_weight=weight,
                    **values,
                )
                for sampled in kept
            ]
            norm = exact.norm()
            one = torch.stack([(gradient - exact).norm() / norm for gradient in drawn])
            mean = (torch.stack(drawn).mean(0) - exact).norm() / norm
            rows.append(
                {
                    "objective": name + "".join(f", {key} {value}" for key, value in values.items()),
                    "samples": samples,
                    "bytes_per_token": record_type(samples, vocabulary).itemsize,
                    "error_of_one_draw": float(one.mean()),
                    "error_of_the_mean": float(mean),
                    "error_of_the_mean_without_bias": float(one.square().mean().sqrt()) / draws**0.5,
                }
            )
            common.say(f"{samples} samples, {rows[-1]['objective']}")
    return rows


def main() -> None:
    """Prints a table and writes ``sampled_cache.json``."""
    parser = common.arguments("Error of objectives that are learned from sampled probabilities.", 8)
    parser.add_argument("--tokens", type=int, default=256, help="held-out tokens")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = errors(final_states(options), options.rounds)
    common.table(
        f"Gradient from sampled probabilities against the exact one, {options.tokens} held-out tokens, "
        f"{options.rounds} draws",
        ("objective", "samples", "bytes a token", "one draw", "mean of draws", "the same, if unbiased"),
        [tuple(row.values()) for row in rows],
    )
    packages = ("torch", "transformers")
    result = {"tokens": options.tokens, "draws": options.rounds, "rows": rows}
    common.write(
        options.output, "sampled_cache", {**result, "machine": common.machine(options.threads, packages)}
    )


if __name__ == "__main__":
    main()
