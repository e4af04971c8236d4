"""Decode speed through martlet's runtimes against the same library driven by as little as possible.

- llama.cpp: a C program of 80 lines (``minimal_llama.c``), compiled here;
- ONNX Runtime: a loop over ``InferenceSession.run_with_iobinding`` with everything bound once and logits left
  where they are; and, to lay beside it, the C++ loop of ONNX Runtime GenAI;
- MLC: a loop over the Relax machine with all arguments saved in it once.

All continue the same prompt greedily; the tokens must be the same, else nothing would be compared.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from export.onnx_runtime import NUMPY_TYPES
from export.runtime import Runtime, open_runtime
from pipeline.bench_worker import CpuPressure

PROMPT_TOKENS = 64
ALLOWED = 0.03
"""Overhead that the project allows itself."""

Decode = Callable[[list[int], int], tuple[common.Sample, list[int]]]
"""(prompt, tokens to generate after the first) -> (time of decoding them, their ids)."""


def through_harness(runtime: Runtime) -> Decode:
    """As ``pipeline.bench_worker`` decodes."""

    def decode(prompt: list[int], generated: int) -> tuple[common.Sample, list[int]]:
        runtime.reset()
        token_id = int(runtime.prefill(prompt).argmax())
        new_ids: list[int] = []

        def loop() -> int:
            nonlocal token_id
            for _ in range(generated):
                token_id = int(runtime.decode(token_id).argmax())
                new_ids.append(token_id)
            return generated

        return common.timed(loop), new_ids

    return decode


class MinimalLlama:
    """The C program, kept running: one line in, one line out."""

    def __init__(self, file: Path, threads: int, context: int, work: Path):
        import llama_cpp

        package = Path(llama_cpp.__file__).parent
        libraries, program = package / "lib", work / "minimal_llama"
        source = Path(__file__).with_name("minimal_llama.c")
        subprocess.run(
            [
                *("cc", "-O2", "-o", program, source),
                *(f"-I{package.parent / 'include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"),
                *("-lllama", "-lggml", "-lggml-base", "-lm"),
            ],
            check=True,
        )
        self._process = subprocess.Popen(
            [program, file, str(threads), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def decode(self, prompt: list[int], generated: int) -> tuple[common.Sample, list[int]]:
        """See ``Decode``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(generated, len(prompt), *prompt, file=self._process.stdin, flush=True)
        wall, cpu, *ids = self._process.stdout.readline().split()
        return common.Sample(generated, float(wall), float(cpu)), [int(token_id) for token_id in ids]

    def close(self) -> None:
        """Ends the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def minimal_onnx(file: Path, threads: int, context: int) -> Decode:
    """Everything bound once: caches in place, one input id, logits on ONNX Runtime's side."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    value_of = onnxruntime.OrtValue.ortvalue_from_numpy
    binding = session.io_binding()
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            shape = [1, value.shape[1], context, value.shape[3]]
            cache = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, NUMPY_TYPES[value.type])
            binding.bind_ortvalue_input(value.name, cache)
            binding.bind_ortvalue_output(value.name.replace("past_key_values.", "present."), cache)
    names = {value.name for value in session.get_inputs()}
    # The graph reads the length of the past from the mask.
    masks = [value_of(np.ones((1, length), np.int64)) for length in range(1, context + 1)]

    def run(ids: Sequence[int], used: int) -> int:
        total = used + len(ids)
        binding.bind_ortvalue_input("input_ids", value_of(np.array([ids], np.int64)))
        binding.bind_ortvalue_input("attention_mask", masks[total - 1])
        if "position_ids" in names:
            binding.bind_ortvalue_input(
                "position_ids", value_of(np.arange(used, total, dtype=np.int64)[None])
            )
        session.run_with_iobinding(binding)
        return int(binding.get_outputs()[-1].numpy()[0, -1].argmax())

    def decode(prompt: list[int], generated: int) -> tuple[common.Sample, list[int]]:
        binding.bind_output("logits")  # ONNX Runtime keeps its memory for as long as the shape stays
        token_id = run(prompt, 0)
        binding.bind_output("logits")
        new_ids: list[int] = []

        def loop() -> int:
            nonlocal token_id
            for place in range(generated):
                token_id = run([token_id], len(prompt) + place)
                new_ids.append(token_id)
            return generated

        return common.timed(loop), new_ids

    return decode


def genai_loop(folder: Path, threads: int) -> Decode:
    """ONNX Runtime GenAI's own generator."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    settings = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": settings}}}))
    model = onnxruntime_genai.Model(config)

    def decode(prompt: list[int], generated: int) -> tuple[common.Sample, list[int]]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + generated + 2
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        generator.generate_next_token()
        new_ids: list[int] = []

        def loop() -> int:
            for _ in range(generated):
                generator.generate_next_token()
                new_ids.append(int(generator.get_next_tokens()[0]))
            return generated

        return common.timed(loop), new_ids

    return decode


def minimal_mlc(folder: Path, threads: int, context: int) -> Decode:
    """The library in a Relax machine of its own, ``forward_one`` with all arguments saved."""
    import tvm
    from tvm import relax
    from tvm.contrib import tvmjs

    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    device = tvm.cpu()
    (library,) = (folder / "libs").glob("*-x86_64-cpu.so")
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), device)
    facts = json.loads(str(machine["_metadata"]()))
    weights, _ = tvmjs.load_tensor_cache(str(folder), device)
    a = facts["architecture"]
    shape = (context, a["key_value_heads"], a["head_dim"])
    caches = [tvm.runtime.empty(shape, "float32", device) for _ in range(2 * a["layers"])]
    shared = [*caches, *[weights[name] for name in facts["parameters"]]]
    token, position = tvm.runtime.empty((1,), "int32", device), tvm.runtime.empty((1,), "int64", device)
    machine.save_function("forward_one", "decode_saved", token, position, *shared)
    decode_saved = machine["decode_saved"]

    def decode(prompt: list[int], generated: int) -> tuple[common.Sample, list[int]]:
        start = tvm.runtime.tensor(np.array([0], np.int64), device)
        ids = tvm.runtime.tensor(np.array(prompt, np.int32), device)
        logits = machine["forward_last"](ids, start, *shared)
        token_id = int(logits.numpy()[-1].argmax())
        new_ids: list[int] = []

        def loop() -> int:
            nonlocal token_id
            for place in range(generated):
                token.copyfrom(np.array([token_id], np.int32))
                position.copyfrom(np.array([len(prompt) + place], np.int64))
                token_id = int(decode_saved().numpy()[0].argmax())
                new_ids.append(token_id)
            return generated

        return common.timed(loop), new_ids

    return decode


@contextlib.contextmanager
def decoders_of(file: Path, threads: int, context: int) -> Iterator[dict[str, Decode]]:
    """The harness first, then the least that drives the same library, then others; all on one file."""
    runtime = open_runtime(file, threads, context)
    decoders: dict[str, Decode] = {"harness": through_harness(runtime)}
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as ended:
        ended.callback(runtime.close)
        if file.suffix == ".gguf":
            program = MinimalLlama(file, threads, context, Path(work))
            ended.callback(program.close)
            decoders["C program"] = program.decode
        elif file.suffix == ".onnx":
            decoders["bound once"] = minimal_onnx(file, threads, context)
            decoders["GenAI"] = genai_loop(file.parent.parent, threads)
        else:
            decoders["saved call"] = minimal_mlc(file, threads, context)
        yield decoders


def compare(name: str, decoders: dict[str, Decode], prompt: list[int], options: Any) -> dict[str, Any]:
    """Runs one library's decoders in turns.

    Raises:
        RuntimeError: they do not give the same tokens.
    """
    answers: dict[str, list[int]] = {}

    def variant(decoder: str) -> Callable[[int], common.Sample]:
        def run(number: int) -> common.Sample:
            sample, answers[decoder] = decoders[decoder](prompt, options.generated)
            return sample

        return run

    common.say(name)
    pressure = CpuPressure()
    samples = common.in_turns({decoder: variant(decoder) for decoder in decoders}, options.rounds)
    harness, minimal, *_ = decoders
    if answers[harness] != answers[minimal]:
        raise RuntimeError(f"{name}: {harness} and {minimal} do not generate the same tokens.")
    overhead = {
        other: {
            clock: {
                key: value - 1
                for key, value in common.speed_up(samples[other], samples[harness], clock).items()
            }
            for clock in ("wall", "cpu")
        }
        for other in list(decoders)[1:]
    }
    return {
        "tokens_per_s": {decoder: common.rate(kept) for decoder, kept in samples.items()},
        "overhead": overhead,
        "within_the_limit": overhead[minimal]["cpu"]["median"] <= ALLOWED,
        "cpu_pressure": pressure.per_cent(),
        "same_tokens": {decoder: answers[decoder] == answers[harness] for decoder in decoders},
        "samples": common.as_dictionaries(samples),
    }


def main() -> None:
    """Command line: ``python -m benchmarks.harness_overhead``."""
    parser = common.arguments(__doc__.splitlines()[0], rounds=15)
    parser.add_argument("--generated", type=int, default=48, help="tokens decoded in a round")
    options = parser.parse_args()
    context = PROMPT_TOKENS + options.generated + 2
    prompt = common.prompt_ids(common.teacher_folder(options.store), PROMPT_TOKENS)
    packages = ("llama-cpp-python", "onnxruntime", "onnxruntime-genai", "apache-tvm")
    result: dict[str, Any] = {
        "machine": common.machine(options.threads, packages),
        "prompt_tokens": PROMPT_TOKENS,
        "generated_tokens": options.generated,
        "allowed_overhead": ALLOWED,
    }
    files = {
        "llama.cpp": common.exported_teacher(options.store, "gguf", "q4_0"),
        "ONNX Runtime": common.exported_teacher(options.store, "onnx", "int4"),
        "MLC": common.exported_teacher(options.store, "mlc", "q4f32_1"),
    }
    for name, file in files.items():
        with decoders_of(file, options.threads, context) as decoders:
            result[name] = compare(name, decoders, prompt, options)
    rows = []
    for name in files:
        part = result[name]
        for decoder, speed in part["tokens_per_s"].items():
            over = part["overhead"].get(decoder)
            cells = [_per_cent(over[clock]) if over else None for clock in ("wall", "cpu")]
            # The second is the least driver, by which the limit goes; what else there is stands beside it.
            judged = decoder == list(part["tokens_per_s"])[1]
            cells.append(("yes" if part["within_the_limit"] else "no") if judged else None)
            rows.append(
                (f"{name}, {decoder}", common.mean_and_deviation(speed), *cells, part["cpu_pressure"])
            )
    common.table(
        f"Decoding {options.generated} tokens after {PROMPT_TOKENS}, {options.threads} thread: the harness's "
        "overhead over each other driver",
        ("driver", "tokens/s", "overhead", "overhead, CPU time", f"within {ALLOWED:.0%}", "CPU pressure %"),
        rows,
    )
    common.write(options.output, "harness_overhead", result)


def _per_cent(value: dict[str, float]) -> str:
    return f"{value['median']:+.1%} ({value['low']:+.1%} to {value['high']:+.1%})"


if __name__ == "__main__":
    main()
