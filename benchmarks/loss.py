"""The loss alone, forward and backward: whole logits, TRL's chunked divergence, and ours; and how each grows.

Hidden states are random numbers of the width of Qwen2.5-0.5B; the student's head is trained. Memory is that
above hidden states, heads and the gradients that every variant has to return.

- At the vocabulary of Qwen2.5 (151936): time and peak memory at 2048 tokens.
- Growth: with tokens and with the vocabulary for all variants, with the chunk size for ours.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.baselines import full_logit_taid, trl_forward_kl
from pipeline.bench_worker import CpuPressure
from taid import fused_forward_kl, fused_taid

WIDTH = 896
VOCABULARY = 151936
TOKENS = 2048
PROJECTED_TOKENS = 8192
T = 0.7
SEED = 0
FULL, TRL, OURS, OURS_KL = "full logits", "TRL", "ours", "ours, forward KL"
GROWTH_VOCABULARY = 32768
GROWTH_TOKENS = 512
TOKEN_COUNTS = (256, 512, 1024, 2048)
VOCABULARIES = (16384, 32768, 65536, 151936)
CHUNKS = (16, 32, 64, 128, 256, 512)


class Problem:
    """Hidden states and heads.

    Attributes:
        student_hidden, teacher_hidden: ``[1, tokens, WIDTH]``.
        student_weight, teacher_weight: ``[vocabulary, WIDTH]``.
        mask: ``[1, tokens]``, all set.
    """

    def __init__(self, tokens: int, vocabulary: int):
        generator = torch.Generator().manual_seed(SEED)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).mul_(WIDTH**-0.25)

        self.student_hidden = random(1, tokens, WIDTH).requires_grad_()
        self.student_weight = random(vocabulary, WIDTH).requires_grad_()
        self.teacher_hidden = random(1, tokens, WIDTH)
        self.teacher_weight = random(vocabulary, WIDTH)
        self.mask = torch.ones(1, tokens)

    def run(self, variant: str, chunk_size: int | None = None) -> int:
        """Loss and gradients.

        Returns:
            The tokens.
        """
        heads = (self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight)
        chunk = {} if chunk_size is None else {"chunk_size": chunk_size}
        if variant == FULL:
            loss = full_logit_taid(
                self.student_hidden @ self.student_weight.T,
                self.teacher_hidden @ self.teacher_weight.T,
                self.mask,
                T,
            )
        elif variant == TRL:
            loss = trl_forward_kl(*heads, self.mask)
        elif variant == OURS_KL:
            loss = fused_forward_kl(*heads, **chunk)
        else:
            loss = fused_taid(*heads, T, **chunk)
        loss.backward()
        self.student_hidden.grad = self.student_weight.grad = None
        return self.mask.numel()


def measure(variant: str, tokens: int, vocabulary: int, chunk_size: int | None = None) -> dict[str, int]:
    """Peak memory in bytes; called in a process of its own."""
    # One small problem first: what the library itself allocates once is not the loss's.
    Problem(8, 64).run(variant)
    problem = Problem(tokens, vocabulary)
    peak = common.PeakMemory()
    problem.run(variant, chunk_size)
    gradients = 4 * WIDTH * (tokens + vocabulary)
    return {"bytes": max(0, peak.bytes() - gradients)}


def memory_of(threads: int, **request: Any) -> int:
    """``measure`` in a process of its own."""
    common.say(f"memory of {request}")
    return common.measured_memory("benchmarks.loss", request, threads)["bytes"]


def times_of(problem: Problem, variants: dict[str, tuple[str, int | None]], rounds: int) -> common.Samples:
    """Time of several variants on one problem, in turns; chunk size beside each variant's name."""

    def run(variant: str, chunk_size: int | None) -> Any:
        return lambda number: common.timed(lambda: problem.run(variant, chunk_size))

    return common.in_turns({name: run(*each) for name, each in variants.items()}, rounds)


def at_qwens_vocabulary(options: Any) -> dict[str, Any]:
    """Time and memory at 151936 tokens of vocabulary."""
    memory = {
        variant: memory_of(options.threads, variant=variant, tokens=TOKENS, vocabulary=VOCABULARY)
        for variant in (FULL, TRL, OURS)
    }
    pressure = CpuPressure()
    variants: dict[str, tuple[str, int | None]] = {name: (name, None) for name in (FULL, TRL, OURS, OURS_KL)}
    samples = times_of(Problem(TOKENS // 4, VOCABULARY), variants, options.rounds)
    # Whole logits grow with the tokens, chunks do not; hidden states' gradients are already left out.
    projected = {FULL: memory[FULL] * PROJECTED_TOKENS // TOKENS, OURS: memory[OURS]}
    result = {
        "vocabulary": VOCABULARY,
        "memory_tokens": TOKENS,
        "time_tokens": TOKENS // 4,
        "peak_bytes": memory,
        "projected_tokens": PROJECTED_TOKENS,
        "projected_bytes": projected,
        "memory_over_full_logits": memory[OURS] / memory[FULL],
        "memory_over_trl": memory[OURS] / memory[TRL],
        "tokens_per_s": {name: common.rate(kept) for name, kept in samples.items()},
        "speed_up_over_trl": _both_clocks(samples, OURS, TRL),
        "speed_up_over_trl_same_objective": _both_clocks(samples, OURS_KL, TRL),
        "speed_up_over_full_logits": _both_clocks(samples, OURS, FULL),
        "cpu_pressure": pressure.per_cent(),
        "samples": common.as_dictionaries(samples),
    }
    common.table(
        f"Loss, forward and backward, vocabulary {VOCABULARY}, width {WIDTH}; memory at {TOKENS} tokens, "
        f"time at {TOKENS // 4}; CPU pressure {result['cpu_pressure'] or 0:.0f} %",
        (
            "variant",
            "peak MB",
            f"MB at {PROJECTED_TOKENS}, projected",
            "tokens/s",
            "times TRL",
            "the same, CPU time",
        ),
        [
            (
                name,
                memory[name] / 1e6 if name in memory else None,
                projected[name] / 1e6 if name in projected else None,
                common.mean_and_deviation(result["tokens_per_s"][name]),
                *[common.spread(_both_clocks(samples, name, TRL)[clock]) for clock in ("wall", "cpu")],
            )
            for name in samples
        ],
    )
    print(
        f"peak memory of ours: {memory[OURS] / memory[FULL]:.3f} of full logits', "
        f"{memory[OURS] / memory[TRL]:.3f} of TRL's"
    )
    return result


def growth(options: Any) -> list[dict[str, Any]]:
    """One row a point: what grows (tokens, vocabulary, chunk), its value, variant, seconds, bytes."""
    rows = []

    def point(
        axis: str, value: int, problem: Problem, tokens: int, vocabulary: int, chunk: int | None
    ) -> None:
        names = (OURS,) if axis == "chunk size" else (FULL, TRL, OURS)
        samples = times_of(problem, {name: (name, chunk) for name in names}, max(2, options.rounds // 2))
        for name in names:
            request = {"variant": name, "tokens": tokens, "vocabulary": vocabulary, "chunk_size": chunk}
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "variant": name,
                    "seconds": min(sample.wall for sample in samples[name]),
                    "cpu_seconds": min(sample.cpu for sample in samples[name]),
                    "bytes": memory_of(options.threads, **request),
                }
            )

    for tokens in TOKEN_COUNTS:
        point("tokens", tokens, Problem(tokens, GROWTH_VOCABULARY), tokens, GROWTH_VOCABULARY, None)
    for vocabulary in VOCABULARIES:
        point("vocabulary", vocabulary, Problem(GROWTH_TOKENS, vocabulary), GROWTH_TOKENS, vocabulary, None)
    problem = Problem(GROWTH_TOKENS, VOCABULARY)
    for chunk in CHUNKS:
        point("chunk size", chunk, problem, GROWTH_TOKENS, VOCABULARY, chunk)
    common.table(
        f"Growth (vocabulary {GROWTH_VOCABULARY} and {GROWTH_TOKENS} tokens where they do not vary; "
        f"chunk size at vocabulary {VOCABULARY}); the fastest of the rounds",
        ("what grows", "to", "variant", "s", "CPU s", "peak MB"),
        [
            (r["axis"], r["value"], r["variant"], r["seconds"], r["cpu_seconds"], r["bytes"] / 1e6)
            for r in rows
        ],
    )
    return rows


def chart(rows: list[dict[str, Any]]) -> Any:
    """Time above memory, one column for each thing that grows."""
    import altair

    columns = []
    for axis in ("tokens", "vocabulary", "chunk size"):
        points = [{**row, "MB": row["bytes"] / 1e6} for row in rows if row["axis"] == axis]
        panels = []
        for field, title in (("cpu_seconds", "seconds of CPU"), ("MB", "peak memory, MB")):
            panels.append(
                altair.Chart(altair.Data(values=points), width=240, height=160)
                .mark_line(point=True)
                .encode(
                    x=altair.X(
                        "value:Q",
                        title=axis,
                        scale=altair.Scale(type="log", base=2),
                        axis=altair.Axis(values=sorted({point["value"] for point in points})),
                    ),
                    y=altair.Y(f"{field}:Q", title=title, scale=altair.Scale(type="log", base=10)),
                    color=altair.Color("variant:N", title=None, sort=[FULL, TRL, OURS]),
                )
            )
        columns.append(altair.vconcat(*panels))
    return altair.hconcat(*columns)


def _both_clocks(samples: common.Samples, ours: str, theirs: str) -> dict[str, dict[str, float]]:
    return {clock: common.speed_up(samples[ours], samples[theirs], clock) for clock in ("wall", "cpu")}


def main() -> None:
    """Command line: ``python -m benchmarks.loss``."""
    options = common.arguments(__doc__.splitlines()[0], rounds=5).parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "machine": common.machine(options.threads, ("torch", "trl")),
        "seed": SEED,
        "width": WIDTH,
        "at_qwens_vocabulary": at_qwens_vocabulary(options),
        "growth": growth(options),
    }
    common.write_chart(options.output, "loss_growth", chart(result["growth"]))
    common.write(options.output, "loss", result)


if __name__ == "__main__":
    main()
