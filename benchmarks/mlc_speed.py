"""Speed of the compiled MLC library (q4f32_1) against llama.cpp's q4_0, one process, one model, in turns.

Both have four bits a weight in groups of 32; llama.cpp was compiled for this very processor, the MLC library
for any x86-64 with AVX2.
"""

from collections.abc import Callable
from typing import Any

from benchmarks import common
from export.runtime import Runtime, open_runtime
from pipeline.bench_worker import CpuPressure

MLC, LLAMA = "MLC q4f32_1", "llama.cpp q4_0"
TARGETS = {"decode": 1.5, "prefill": 2.0}
"""How many times slower than llama.cpp the library may be."""


def prefill_of(runtime: Runtime, prompt: list[int]) -> Callable[[int], common.Sample]:
    """Times a prompt."""

    def run(number: int) -> common.Sample:
        runtime.reset()

        def work() -> int:
            runtime.prefill(prompt)
            return len(prompt)

        return common.timed(work)

    return run


def decode_of(runtime: Runtime, prompt: list[int], generated: int) -> Callable[[int], common.Sample]:
    """Times greedy tokens after a prompt, which is not timed."""

    def run(number: int) -> common.Sample:
        runtime.reset()
        token_id = int(runtime.prefill(prompt).argmax())

        def work() -> int:
            nonlocal token_id
            for _ in range(generated):
                token_id = int(runtime.decode(token_id).argmax())
            return generated

        return common.timed(work)

    return run


def main() -> None:
    """Command line: ``python -m benchmarks.mlc_speed``."""
    parser = common.arguments(__doc__.splitlines()[0], rounds=11)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--generated", type=int, default=48, help="tokens decoded in a round")
    options = parser.parse_args()
    prompt = common.prompt_ids(common.teacher_folder(options.store), options.prompt)
    context = options.prompt + options.generated + 2
    # TVM's pool must be made first, with its number of threads.
    runtimes = {
        MLC: open_runtime(common.exported_teacher(options.store, "mlc", "q4f32_1"), options.threads, context),
        LLAMA: open_runtime(common.exported_teacher(options.store, "gguf", "q4_0"), options.threads, context),
    }
    result: dict[str, Any] = {
        "machine": common.machine(options.threads, ("apache-tvm", "llama-cpp-python")),
        "llama_cpp": _instructions(),
        "prompt_tokens": options.prompt,
        "generated_tokens": options.generated,
    }
    pressure = CpuPressure()
    rows = []
    for phase, allowed in TARGETS.items():
        common.say(phase)
        variants = {
            name: prefill_of(runtime, prompt)
            if phase == "prefill"
            else decode_of(runtime, prompt[:64], options.generated)
            for name, runtime in runtimes.items()
        }
        samples = common.in_turns(variants, options.rounds)
        slower = {clock: common.speed_up(samples[LLAMA], samples[MLC], clock) for clock in ("wall", "cpu")}
        result[phase] = {
            "tokens_per_s": {name: common.rate(kept) for name, kept in samples.items()},
            "times_slower": slower,
            "allowed": allowed,
            "reached": slower["cpu"]["median"] <= allowed,
            "samples": common.as_dictionaries(samples),
        }
        rows.append(
            (
                phase,
                *[common.mean_and_deviation(result[phase]["tokens_per_s"][name]) for name in (MLC, LLAMA)],
                *[common.spread(slower[clock]) for clock in ("wall", "cpu")],
                allowed,
                "yes" if result[phase]["reached"] else "no",
            )
        )
    result["cpu_pressure"] = pressure.per_cent()
    common.table(
        f"SmolLM2-135M, {options.threads} thread, prompt of {options.prompt}, decoding after 64; "
        f"CPU pressure {result['cpu_pressure'] or 0:.0f} %",
        ("", f"{MLC} tok/s", f"{LLAMA} tok/s", "times slower", "the same, CPU time", "allowed", "reached"),
        rows,
    )
    common.write(options.output, "mlc_speed", result)


def _instructions() -> str:
    """What llama.cpp was compiled with."""
    import llama_cpp

    return llama_cpp.llama_print_system_info().decode().strip()


if __name__ == "__main__":
    main()
