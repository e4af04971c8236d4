"""Measures one exported file in a process of its own, so that memory and CPU time are that file's alone.

Usage: python -m pipeline.bench_worker REQUEST.json RESULT.json
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.runtime import runtime_class
from pipeline.artifacts import write_json
from pipeline.memory import forget_peak, memory


def measure(
    file: Path, prompt: list[int], generated_tokens: int, repetitions: int, threads: int
) -> dict[str, Any]:
    """Load time, TTFT, prefill and decode speed, CPU time and memory of one file.

    One unmeasured repetition warms up. A repetition empties the cache, runs the prompt (prefill; with the
    choice of the first token it is the TTFT) and then decodes greedily ``generated_tokens`` tokens one by
    one. The runtime's libraries are imported before the clock starts.

    Args:
        file: what ``export.runtime.open_runtime`` opens.
        prompt: token ids of the prompt.
        generated_tokens: tokens decoded after the first one.
        repetitions: measured ones, at least 1.
        threads: CPU threads of the runtime.

    Returns:
        Means over the repetitions: load_s, ttft_s in seconds; prefill_tokens_per_s and decode_tokens_per_s
        with their sample standard deviations prefill_std and decode_std; cpu_seconds_per_token of prompt and
        answer together, over all threads; rss_anon_bytes and rss_file_bytes at the end and peak_rss_bytes
        since before the load, all of the whole process, and rss_anon_before_load_bytes, what of it the
        interpreter and its libraries had before; cpu_pressure, the per cent of the measured time in which
        some task of the machine waited for a CPU (null where the kernel does not count that).

    Raises:
        ExportError: the runtime refuses the file or the tokens.
    """
    open_file = runtime_class(file)
    forget_peak()
    before = memory()
    started = time.perf_counter()
    runtime = open_file(file, threads, len(prompt) + generated_tokens)
    load_seconds = time.perf_counter() - started
    time_to_first_token, prefill, decode = [], [], []
    cpu_seconds, stalled, measured_seconds = 0.0, 0.0, 0.0
    counted = cpu_stall_seconds() is not None
    for repetition in range(repetitions + 1):
        runtime.reset()
        stalled_before = cpu_stall_seconds() or 0.0
        cpu_before = time.process_time()
        started = time.perf_counter()
        token_id = int(runtime.prefill(prompt).argmax())
        first = time.perf_counter()
        for _ in range(generated_tokens):
            token_id = int(runtime.decode(token_id).argmax())
        ended = time.perf_counter()
        if repetition == 0:
            continue
        cpu_seconds += time.process_time() - cpu_before
        stalled += (cpu_stall_seconds() or 0.0) - stalled_before
        measured_seconds += ended - started
        time_to_first_token.append(first - started)
        prefill.append(len(prompt) / (first - started))
        decode.append(generated_tokens / (ended - first))
    after = memory()
    result = {
        "runtime": runtime.name,
        "threads": threads,
        "load_s": load_seconds,
        "ttft_s": statistics.mean(time_to_first_token),
        "prefill_tokens_per_s": statistics.mean(prefill),
        "prefill_std": statistics.stdev(prefill) if len(prefill) > 1 else 0.0,
        "decode_tokens_per_s": statistics.mean(decode),
        "decode_std": statistics.stdev(decode) if len(decode) > 1 else 0.0,
        "cpu_seconds_per_token": cpu_seconds / (repetitions * (len(prompt) + generated_tokens)),
        "rss_anon_bytes": after["RssAnon"],
        "rss_file_bytes": after["RssFile"],
        "peak_rss_bytes": after["VmHWM"],
        "rss_anon_before_load_bytes": before["RssAnon"],
        "cpu_pressure": min(100.0, 100 * stalled / measured_seconds) if counted else None,
        "repetitions": repetitions,
        "prompt_tokens": len(prompt),
        "generated_tokens": generated_tokens,
    }
    runtime.close()
    return result


def cpu_stall_seconds() -> float | None:
    """Seconds since boot in which some task waited for a CPU (the ``some`` total of pressure stall
    information); None where the kernel keeps no such count."""
    try:
        lines = Path("/proc/pressure/cpu").read_text(encoding="ascii").splitlines()
        some = next(line for line in lines if line.startswith("some "))
        return int(some.rpartition("total=")[2]) / 1e6
    except (OSError, StopIteration, ValueError):
        return None


def main() -> int:
    """Reads the request (arguments of ``measure``), writes the result; exit code 2 and a sentence on stderr
    if the file fails to run."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    file = Path(request.pop("file"))
    # Runtimes are measured as they come, not with what martlet sets for training.
    os.environ.pop("OMP_WAIT_POLICY", None)
    try:
        write_json(Path(sys.argv[2]), measure(file, **request))
    except ExportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
