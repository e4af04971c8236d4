"""TAID in a training loop of your own: ten lines around any two models with the same tokenizer.

python examples/plain_loop.py                                  # two small random models, seconds
python examples/plain_loop.py --teacher BIG --student SMALL    # folders or names of the hub
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from taid import AdaptiveInterpolation, taid


def random_model(layers: int, seed: int) -> LlamaForCausalLM:
    """A small Llama, so that the example runs anywhere."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


def main() -> list[float]:
    """Trains and returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher")
    parser.add_argument("--student")
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    load = AutoModelForCausalLM.from_pretrained
    teacher = load(chosen.teacher) if chosen.teacher else random_model(layers=4, seed=0)
    student = load(chosen.student) if chosen.student else random_model(layers=2, seed=1)
    teacher.eval().requires_grad_(False)

    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    interpolation = AdaptiveInterpolation(t_start=0.4, t_end=1.0)
    input_ids = torch.randint(0, 256, (4, 32))  # your batches
    mask = torch.ones_like(input_ids, dtype=torch.bool)  # which positions are learned
    losses = []
    for step in range(1, chosen.steps + 1):
        with torch.no_grad():
            teacher_logits = teacher(input_ids).logits
        loss = taid(student(input_ids).logits, teacher_logits, mask, interpolation.t)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        interpolation.update(loss.item(), step, chosen.steps)
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}, t {interpolation.t:.3f}")
    return losses


if __name__ == "__main__":
    main()
