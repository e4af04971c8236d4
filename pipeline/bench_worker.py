"""Measures one exported file in a process of its own, so that memory and CPU time are that file's alone.

Usage: python -m pipeline.bench_worker REQUEST.json RESULT.json
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.runtime import open_runtime
from pipeline.artifacts import write_json


def measure(
    file: Path, prompt: list[int], generated_tokens: int, repetitions: int, threads: int
) -> dict[str, Any]:
    """Load time, TTFT, prefill and decode speed, CPU time and memory of one file.

    One unmeasured repetition warms up. A repetition empties the cache, runs the prompt (prefill; up to the
    first token it is also the TTFT) and then decodes greedily ``generated_tokens`` tokens one by one.
    """
    before = memory()
    started = time.perf_counter()
    runtime = open_runtime(file, threads, max(512, len(prompt) + generated_tokens + 8))
    load_seconds = time.perf_counter() - started
    time_to_first_token, prefill, decode = [], [], []
    cpu_seconds, tokens, stalled, measured_seconds = 0.0, 0, 0.0, 0.0
    for repetition in range(repetitions + 1):
        runtime.reset()
        cpu_started, stalled_started = time.process_time(), cpu_stall_seconds()
        started = time.perf_counter()
        logits = runtime.prefill(prompt)
        token_id = int(logits.argmax())
        first = time.perf_counter()
        for _ in range(generated_tokens):
            token_id = int(runtime.decode(token_id).argmax())
        ended = time.perf_counter()
        if repetition == 0:
            continue
        time_to_first_token.append(first - started)
        prefill.append(len(prompt) / (first - started))
        decode.append(generated_tokens / (ended - first))
        cpu_seconds += time.process_time() - cpu_started
        stalled += cpu_stall_seconds() - stalled_started
        measured_seconds += ended - started
        tokens += len(prompt) + generated_tokens
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
        "cpu_seconds_per_token": cpu_seconds / tokens,
        "rss_anon_bytes": after["RssAnon"],
        "rss_file_bytes": after["RssFile"],
        "peak_rss_bytes": after["VmHWM"],
        "rss_anon_before_load_bytes": before["RssAnon"],
        "cpu_pressure": 100 * stalled / measured_seconds,
        "repetitions": repetitions,
        "prompt_tokens": len(prompt),
        "generated_tokens": generated_tokens,
    }
    runtime.close()
    return result


def memory() -> dict[str, int]:
    """Bytes of this process by kind, from the kernel: anonymous, file-backed, and the peak of all."""
    values = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile", "VmHWM"):
            values[name] = int(rest.split()[0]) * 1024
    return values


def cpu_stall_seconds() -> float:
    """Seconds since boot in which some task waited for a CPU (pressure stall information); 0 where the
    kernel keeps no such count."""
    try:
        line = Path("/proc/pressure/cpu").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return 0.0
    return int(line.rpartition("total=")[2]) / 1e6


def main() -> int:
    """Reads the request, writes the result; exit code 2 and a sentence on stderr if the file fails to run."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    file = Path(request.pop("file"))
    try:
        write_json(Path(sys.argv[2]), measure(file, **request))
    except ExportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
