"""One training step: TAID with padding and full logits, TRL's chunked divergence, and ours.

Teacher SmolLM2-135M-Instruct, student its first 20 layers, everything trained in float32 with AdamW. One
student and one optimizer serve all variants, so that they differ in nothing but the step:

- ``full logits, padded``: conversations padded to the fixed length, both models' whole logits in float32;
- ``TRL, packed``: TRL's chunked divergence at beta 0, on the same packed blocks as ours;
- ``ours, live``: ``DistillationTrainer``'s own loss on packed blocks, the teacher running alongside;
- ``ours, cached``: the same with the teacher's hidden states read from disk.

Useful tokens are those of conversations; padding does not count. The loss is taken at every one of them.
"""

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.baselines import full_logit_taid, trl_forward_kl
from pipeline.bench_worker import CpuPressure

FIXED_LENGTH = 512
"""Tokens to which the padding variant pads; no conversation is longer."""
STUDENT_LAYERS = 20
T = 0.7
"""The interpolation's t of every step."""
SEED = 0
FULL, TRL, LIVE, CACHED = "full logits, padded", "TRL, packed", "ours, live", "ours, cached"
VARIANTS = (FULL, TRL, LIVE, CACHED)


@dataclass
class Data:
    """Conversations and the blocks they are packed into.

    Attributes:
        conversations: token ids, each at most ``FIXED_LENGTH``.
        blocks: ``[N, FIXED_LENGTH]`` token ids.
        positions: ``[N, FIXED_LENGTH]``, starting at 0 with each conversation.
        mask: ``[N, FIXED_LENGTH]``, 0 where a block's end is padded.
    """

    conversations: list[list[int]]
    blocks: np.ndarray
    positions: np.ndarray
    mask: np.ndarray


def chats(tokenizer: Any, count: int) -> list[list[int]]:
    """Conversations of varying length: of one to six exchanges of chatterbot-corpus or reasoning-gym, and
    questions that a topic of Python's language reference answers; longer ones than ``FIXED_LENGTH`` are left
    out."""
    import reasoning_gym
    import yaml

    from pipeline.sources import documents, packaged_file

    rng = random.Random(SEED)
    exchanges: list[tuple[str, str]] = []
    corpus = packaged_file("chatterbot-corpus", "english/ai.yml")
    assert corpus is not None
    for file in sorted(corpus.parent.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) >= 2:
                exchanges.append((str(turns[0]), str(turns[1])))
    for name in ("basic_arithmetic", "leg_counting", "word_sorting", "calendar_arithmetic"):
        for entry in reasoning_gym.create_dataset(name, size=200, seed=SEED):
            exchanges.append((entry["question"], str(entry["answer"])))
    topics = list(documents("package:pydoc-topics", "text"))
    found: list[list[int]] = []
    while len(found) < count:
        if rng.random() < 0.5:
            topic = rng.choice(topics)
            turns = [("What does Python's reference say about " + topic.split("\n")[0] + "?", topic)]
        else:
            turns = rng.sample(exchanges, rng.randint(1, 6))
        messages = []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= FIXED_LENGTH:
            found.append(ids)
    return found


def pack(conversations: list[list[int]], pad: int) -> Data:
    """Packs conversations into as few blocks as best-fit decreasing finds."""
    space: list[int] = []
    content: list[list[list[int]]] = []
    for conversation in sorted(conversations, key=len, reverse=True):
        fitting = [number for number, left in enumerate(space) if left >= len(conversation)]
        number = min(fitting, key=lambda n: space[n]) if fitting else len(space)
        if number == len(space):
            space.append(FIXED_LENGTH)
            content.append([])
        space[number] -= len(conversation)
        content[number].append(conversation)
    order = list(range(len(content)))
    random.Random(SEED).shuffle(order)
    blocks = np.full((len(content), FIXED_LENGTH), pad, dtype=np.int64)
    positions, mask = np.zeros_like(blocks), np.zeros_like(blocks)
    for row, number in enumerate(order):
        place = 0
        for conversation in content[number]:
            end = place + len(conversation)
            blocks[row, place:end] = conversation
            positions[row, place:end] = np.arange(len(conversation))
            mask[row, place:end] = 1
            place = end
        positions[row, place:] = np.arange(FIXED_LENGTH - place)
    return Data(conversations, blocks, positions, mask)


class Bench:
    """Models, optimizer and data, and a step of each variant."""

    def __init__(self, folder: Path, work: Path, data: Data, blocks_a_step: int):
        from transformers import TrainingArguments

        from pipeline.models import load_model
        from taid import CachedTeacher, DistillationTrainer, LiveTeacher, drop_layers
        from taid.teacher import write_hidden_state_cache

        torch.manual_seed(SEED)
        self.data, self.blocks_a_step = data, blocks_a_step
        self.student = drop_layers(load_model(folder), list(range(STUDENT_LAYERS))).train()
        self.live = LiveTeacher(load_model(folder))
        sample = common.timed(
            lambda: (
                write_hidden_state_cache(
                    self.live.model, data.blocks, work / "cache", position_ids=data.positions
                )
                or data.blocks.size
            )
        )
        self.caching_tokens_per_s = sample.work / sample.wall
        self.cached = CachedTeacher(work / "cache", verify=False)
        self.trainer = DistillationTrainer(
            model=self.student,
            args=TrainingArguments(
                output_dir=str(work / "out"), use_cpu=True, report_to=[], disable_tqdm=True
            ),
            train_dataset=[],
            teacher=self.live,
        )
        assert self.trainer.interpolation is not None
        self.trainer.interpolation.t = T
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)

    def batch(self, number: int) -> dict[str, Tensor]:
        """The packed blocks of a round."""
        rows = (np.arange(self.blocks_a_step) + number * self.blocks_a_step) % len(self.data.blocks)
        return {
            "input_ids": torch.from_numpy(self.data.blocks[rows]),
            "position_ids": torch.from_numpy(self.data.positions[rows]),
            "loss_mask": torch.from_numpy(self.data.mask[rows]),
            "index": torch.from_numpy(rows),
        }

    def padded(self, number: int) -> tuple[Tensor, Tensor]:
        """Conversations of a round, padded, and their mask: about as many useful tokens as ``batch``."""
        wanted = self.data.mask.mean() * FIXED_LENGTH * self.blocks_a_step
        mean = sum(map(len, self.data.conversations)) / len(self.data.conversations)
        count = max(1, round(wanted / mean))
        chosen = [
            self.data.conversations[(number * count + place) % len(self.data.conversations)]
            for place in range(count)
        ]
        ids = torch.zeros(count, FIXED_LENGTH, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, conversation in enumerate(chosen):
            ids[row, : len(conversation)] = torch.tensor(conversation)
            mask[row, : len(conversation)] = 1
        return ids, mask

    def step(self, variant: str, number: int) -> int:
        """A whole optimizer step.

        Returns:
            Useful tokens.
        """
        if variant == FULL:
            ids, mask = self.padded(number)
            loss = self.full_loss(ids, mask)
            useful = int(mask.sum())
        else:
            batch = self.batch(number)
            useful = int(batch["loss_mask"].sum())
            if variant == TRL:
                loss = self.trl_loss(batch)
            else:
                self.trainer.teacher = self.cached if variant == CACHED else self.live
                loss = self.trainer.compute_loss(self.student, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return useful

    def full_loss(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Both models' logits of all positions."""
        with torch.no_grad():
            teacher_logits = self.live.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        student_logits = self.student(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return full_logit_taid(student_logits[:, :-1], teacher_logits[:, :-1], mask[:, 1:], T)

    def trl_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """TRL's loss, from the same hidden states as ours."""
        from taid.heads import final_hidden_states, head_weight
        from taid.trainer import prediction_targets

        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        _, mask = prediction_targets(batch)
        return trl_forward_kl(
            final_hidden_states(self.student, **inputs)[:, :-1],
            head_weight(self.student),
            self.live.hidden_states(**inputs)[:, :-1],
            self.live.head_weight,
            mask,
        )


def prepared(folder: Path, conversations: int, full: bool) -> Data:
    """The conversations, packed. ``full``: joined and cut to the fixed length, so that nothing is padded."""
    from pipeline.models import load_tokenizer

    tokenizer = load_tokenizer(folder)
    found = chats(tokenizer, conversations)
    if full:
        joined = [token for conversation in found for token in conversation]
        whole = len(joined) // FIXED_LENGTH
        found = [joined[row * FIXED_LENGTH : (row + 1) * FIXED_LENGTH] for row in range(whole)]
    return pack(found, tokenizer.pad_token_id or 0)


def measure(variant: str, folder: str, conversations: int, blocks_a_step: int) -> dict[str, int]:
    """Peak memory of a step above weights and optimizer, in bytes; called in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(folder), Path(work), prepared(Path(folder), conversations, False), blocks_a_step)
        bench.step(variant, 0)  # makes the optimizer's state
        peak = common.PeakMemory()
        bench.step(variant, 0)
        return {"bytes": peak.bytes()}


def run(options: Any) -> dict[str, Any]:
    """Both data sets in turn, then the memory of each variant."""
    torch.set_num_threads(options.threads)
    folder = common.teacher_folder(options.store)
    result: dict[str, Any] = {
        "machine": common.machine(options.threads, ("torch", "transformers", "trl")),
        "seed": SEED,
        "t": T,
        "fixed_length": FIXED_LENGTH,
    }
    for name, full in (("variable-length chats", False), ("no padding to save", True)):
        data = prepared(folder, options.conversations, full)
        lengths = [len(conversation) for conversation in data.conversations]
        with tempfile.TemporaryDirectory() as work:
            bench = Bench(folder, Path(work), data, options.blocks)
            variants = {variant: _timed_step(bench, variant) for variant in VARIANTS}
            pressure = CpuPressure()
            samples = common.in_turns(variants, options.rounds)
        part = {
            "conversations": len(lengths),
            "tokens": sum(lengths),
            "mean_length": float(np.mean(lengths)),
            "median_length": float(np.median(lengths)),
            "longest": max(lengths),
            "useful_share_padded": float(np.mean(lengths)) / FIXED_LENGTH,
            "useful_share_packed": float(data.mask.mean()),
            "useful_tokens_a_step": {
                variant: float(np.mean([s.work for s in kept])) for variant, kept in samples.items()
            },
            "caching_tokens_per_s": bench.caching_tokens_per_s,
            "cpu_pressure": pressure.per_cent(),
            "tokens_per_s": {variant: common.rate(kept) for variant, kept in samples.items()},
            "speed_up_over_full_logits": {
                variant: {
                    clock: common.speed_up(samples[variant], samples[FULL], clock)
                    for clock in ("wall", "cpu")
                }
                for variant in VARIANTS
            },
            "speed_up_over_trl": {
                clock: common.speed_up(samples[LIVE], samples[TRL], clock) for clock in ("wall", "cpu")
            },
            "samples": common.as_dictionaries(samples),
        }
        result[name] = part
        common.table(
            f"Training step, {name}: useful tokens are {part['useful_share_padded']:.0%} padded, "
            f"{part['useful_share_packed']:.0%} packed; CPU pressure {part['cpu_pressure'] or 0:.0f} %",
            ("variant", "useful tokens/s", "times full logits", "the same, CPU time"),
            [
                (
                    variant,
                    common.mean_and_deviation(part["tokens_per_s"][variant]),
                    *[
                        common.spread(part["speed_up_over_full_logits"][variant][clock])
                        for clock in ("wall", "cpu")
                    ],
                )
                for variant in VARIANTS
            ],
        )
        wall, cpu = (common.spread(part["speed_up_over_trl"][clock]) for clock in ("wall", "cpu"))
        print(f"ours, live, is {wall} times as fast as TRL ({cpu} in CPU time)")
    request = {
        "folder": str(folder),
        "conversations": options.conversations,
        "blocks_a_step": options.blocks,
    }
    result["peak_bytes"] = {}
    for variant in VARIANTS:
        common.say(f"memory of {variant}")
        measured = common.measured_memory("benchmarks.step", {"variant": variant, **request}, options.threads)
        result["peak_bytes"][variant] = measured["bytes"]
    common.table(
        "Peak memory of a step above weights and optimizer",
        ("variant", "MB"),
        [(variant, size / 1e6) for variant, size in result["peak_bytes"].items()],
    )
    return result


def _timed_step(bench: Bench, variant: str) -> Callable[[int], common.Sample]:
    return lambda number: common.timed(lambda: bench.step(variant, number))


def main() -> None:
    """Command line: ``python -m benchmarks.step``."""
    parser = common.arguments(__doc__.splitlines()[0], rounds=5)
    parser.add_argument("--conversations", type=int, default=96)
    parser.add_argument("--blocks", type=int, default=2, help="packed blocks of a step")
    options = parser.parse_args()
    common.write(options.output, "step", run(options))


if __name__ == "__main__":
    main()
