"""Measures one exported file in a process of its own, so that memory and CPU time are that file's alone.

Usage: python -m pipeline.bench_worker REQUEST.json RESULT.json
"""

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.runtime import runtime_class
from pipeline.artifacts import write_json
from pipeline.bandwidth import bytes_read_per_token, read_bandwidth
from pipeline.energy import EnergyCounter, energy_per_token
from pipeline.memory import forget_peak, memory, proportional_set_size


def measure(
    file: Path,
    prompt: list[int],
    generated_tokens: int,
    repetitions: int,
    threads: int,
    settle_s: float = 0.0,
) -> dict[str, Any]:
    """Load time, TTFT, prefill and decode speed, CPU time and memory of one file.

    One unmeasured repetition warms up, then the process rests, so that what the load stirred up (clocks,
    temperature, pages being written back) settles. A repetition empties the cache, runs the prompt (prefill;
    with the choice of the first token it is the TTFT) and then decodes greedily ``generated_tokens`` tokens
    one by one. The runtime's libraries are imported before the clock starts.

    Args:
        file: what ``export.runtime.open_runtime`` opens.
        prompt: token ids of the prompt.
        generated_tokens: tokens decoded after the first one.
        repetitions: measured ones, at least 1.
        threads: CPU threads of the runtime.
        settle_s: seconds of rest after the warm-up.

    Returns:
        Means over the repetitions: load_s, ttft_s in seconds; prefill_tokens_per_s and decode_tokens_per_s
        with their sample standard deviations prefill_std and decode_std; cpu_seconds_per_token of prompt and
        answer together, over all threads, and processors_busy, how many of them that kept busy at a time (the
        threads that really worked); backend, of ``export.backend.Backend.as_dictionary``; rss_anon_bytes and
        rss_file_bytes at the end and peak_rss_bytes
        since before the load, all of the whole process, and rss_anon_before_load_bytes, what of it the
        interpreter and its libraries had before; cpu_pressure, the per cent of the measured time in which
        some task of the machine waited for a CPU, and cpu_pressure_before, the same of the ten seconds before
        the load (null where the kernel does not count that); energy, of ``pipeline.energy.energy_per_token``,
        prompt and answer together; pss_bytes,
        where pages shared with other processes count by their share; bytes_read_per_token, the weights of
        it; memory_bytes_per_s, what so many threads can read from memory, measured after the model is closed;
        bandwidth_utilisation, the first times the decode speed over the second.

    Raises:
        ExportError: the runtime refuses the file or the tokens.
    """
    open_file = runtime_class(file)
    pressure_before = recent_cpu_pressure()
    forget_peak()
    before = memory()
    started = time.perf_counter()
    runtime = open_file(file, threads, len(prompt) + generated_tokens)
    load_seconds = time.perf_counter() - started
    time_to_first_token, prefill, decode = [], [], []
    cpu_seconds, stalled, measured_seconds = 0.0, 0.0, 0.0
    counted = cpu_stall_seconds() is not None
    energy = EnergyCounter()
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
            time.sleep(settle_s)
            energy = EnergyCounter()
            continue
        cpu_seconds += time.process_time() - cpu_before
        stalled += (cpu_stall_seconds() or 0.0) - stalled_before
        measured_seconds += ended - started
        time_to_first_token.append(first - started)
        prefill.append(len(prompt) / (first - started))
        decode.append(generated_tokens / (ended - first))
    joules = energy.joules()
    after = memory()
    shared = proportional_set_size()
    tokens = repetitions * (len(prompt) + generated_tokens)
    result: dict[str, Any] = {
        "runtime": runtime.name,
        "threads": threads,
        "load_s": load_seconds,
        "ttft_s": statistics.mean(time_to_first_token),
        "prefill_tokens_per_s": statistics.mean(prefill),
        "prefill_std": statistics.stdev(prefill) if len(prefill) > 1 else 0.0,
        "decode_tokens_per_s": statistics.mean(decode),
        "decode_std": statistics.stdev(decode) if len(decode) > 1 else 0.0,
        "cpu_seconds_per_token": cpu_seconds / tokens,
        "energy": energy_per_token(joules, cpu_seconds, tokens),
        "processors_busy": cpu_seconds / measured_seconds,
        "backend": runtime.backend.as_dictionary(),
        "pss_bytes": shared,
        "rss_anon_bytes": after["RssAnon"],
        "rss_file_bytes": after["RssFile"],
        "peak_rss_bytes": after["VmHWM"],
        "rss_anon_before_load_bytes": before["RssAnon"],
        "cpu_pressure_before": pressure_before,
        "cpu_pressure": min(100.0, 100 * stalled / measured_seconds) if counted else None,
        "repetitions": repetitions,
        "prompt_tokens": len(prompt),
        "generated_tokens": generated_tokens,
    }
    runtime.close()
    moved = bytes_read_per_token(file)
    bandwidth = read_bandwidth(threads)
    result["bytes_read_per_token"] = moved
    result["memory_bytes_per_s"] = bandwidth
    result["bandwidth_utilisation"] = (
        None if moved is None else moved * result["decode_tokens_per_s"] / bandwidth
    )
    return result


def measure_depths(
    file: Path,
    text: list[int],
    depths: list[int],
    generated_tokens: int,
    repetitions: int,
    threads: int,
    settle_s: float = 0.0,
) -> list[dict[str, Any]]:
    """Decode speed with so many tokens in the cache already.

    Args:
        file, generated_tokens, repetitions, threads, settle_s: as of ``measure``.
        text: token ids that fill the cache, repeated where a depth asks for more.
        depths: tokens in the cache before decoding starts; at 0 a single one is there.

    Returns:
        For each depth {depth, decode_tokens_per_s, decode_std, cpu_pressure}, the last as of ``measure``.
    """
    runtime = runtime_class(file)(file, threads, max(1, *depths) + generated_tokens + 1)
    found = []
    for depth in depths:
        filling = (text * (depth // len(text) + 1))[: max(1, depth)]
        rates = []
        pressure = CpuPressure()
        for repetition in range(repetitions + 1):
            runtime.reset()
            token_id = int(runtime.prefill(filling).argmax())
            started = time.perf_counter()
            for _ in range(generated_tokens):
                token_id = int(runtime.decode(token_id).argmax())
            if repetition == 0:
                time.sleep(settle_s)
                pressure = CpuPressure()
            else:
                rates.append(generated_tokens / (time.perf_counter() - started))
        found.append(
            {
                "depth": depth,
                "decode_tokens_per_s": statistics.mean(rates),
                "decode_std": statistics.stdev(rates) if len(rates) > 1 else 0.0,
                "cpu_pressure": pressure.per_cent(),
            }
        )
    runtime.close()
    return found


def measure_cold_start(file: Path, prompt: list[int], threads: int) -> dict[str, Any]:
    """From opening a file that is not in the page cache to the first token.

    Returns:
        load_s and first_token_s, both from the start; read_bytes, what the process had the disk read for it
        (null where the kernel does not tell); cold, whether that is at least half of the file: some file
        systems keep their pages whatever one asks; cpu_pressure, as of ``measure``.
    """
    open_file = runtime_class(file)
    evict(file)
    size = sum(path.stat().st_size for path in files_of(file))
    before = disk_bytes()
    pressure = CpuPressure()
    started = time.perf_counter()
    runtime = open_file(file, threads, len(prompt) + 1)
    loaded = time.perf_counter()
    runtime.prefill(prompt).argmax()
    first = time.perf_counter()
    waited = pressure.per_cent()
    after = disk_bytes()
    runtime.close()
    read = None if before is None or after is None else after - before
    return {
        "load_s": loaded - started,
        "first_token_s": first - started,
        "read_bytes": read,
        "cold": read is not None and read >= size / 2,
        "cpu_pressure": waited,
    }


def measure_in_budget(file: Path, prompt: list[int], generated_tokens: int, threads: int) -> dict[str, Any]:
    """One round from a file that is not in the page cache, as in an application that was just opened.

    Returns:
        first_token_s, from opening the file on, and decode_tokens_per_s.
    """
    open_file = runtime_class(file)
    evict(file)
    started = time.perf_counter()
    runtime = open_file(file, threads, len(prompt) + generated_tokens)
    token_id = int(runtime.prefill(prompt).argmax())
    first = time.perf_counter()
    for _ in range(generated_tokens):
        token_id = int(runtime.decode(token_id).argmax())
    ended = time.perf_counter()
    runtime.close()
    return {"first_token_s": first - started, "decode_tokens_per_s": generated_tokens / (ended - first)}


def files_of(file: Path) -> list[Path]:
    """A model's files on disk: the file itself with its external data, or all of its folder."""
    if file.is_dir():
        return [path for path in sorted(file.rglob("*")) if path.is_file()]
    return [file, *sorted(file.parent.glob(f"{file.name}_data*"))]


def evict(file: Path) -> None:
    """Asks the kernel to drop a model's files from the page cache, as after a restart of the device."""
    for path in files_of(file):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only pages that are written back can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def disk_bytes() -> int | None:
    """Bytes that this process had storage read so far; None where the kernel does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
    except (OSError, StopIteration, ValueError):
        return None


class CpuPressure:
    """Per cent of the time since it was made in which some task of the machine waited for a processor."""

    def __init__(self) -> None:
        self._stalled, self._began = cpu_stall_seconds(), time.perf_counter()

    def per_cent(self) -> float | None:
        """None where the kernel does not count it."""
        stalled = cpu_stall_seconds()
        if stalled is None or self._stalled is None:
            return None
        return min(100.0, 100 * (stalled - self._stalled) / (time.perf_counter() - self._began))


def cpu_stall_seconds() -> float | None:
    """Seconds since boot in which some task waited for a CPU (the ``some`` total of pressure stall
    information); None where the kernel keeps no such count."""
    try:
        lines = Path("/proc/pressure/cpu").read_text(encoding="ascii").splitlines()
        some = next(line for line in lines if line.startswith("some "))
        return int(some.rpartition("total=")[2]) / 1e6
    except (OSError, StopIteration, ValueError):
        return None


def recent_cpu_pressure() -> float | None:
    """Per cent of the last ten seconds in which some task waited for a CPU; None where the kernel keeps no
    such count."""
    try:
        lines = Path("/proc/pressure/cpu").read_text(encoding="ascii").splitlines()
        some = next(line for line in lines if line.startswith("some "))
        return float(some.partition("avg10=")[2].split()[0])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def without_torch(file: Path) -> None:
    """Keeps torch out of this process, unless it is what runs the file: TVM and transformers import it
    wherever it is installed, which takes seconds, and memory that is not the file's."""
    if not (file / "config.json").is_file() or (file / "mlc-chat-config.json").is_file():
        sys.modules["torch"] = None  # type: ignore[assignment]


def main() -> int:
    """Reads the request (``kind``, ``timeout_s``, ``join``: control groups to enter, and the arguments of
    that measurement), writes the result; exit code 2 and a sentence on stderr if the file fails to run."""
    measurements: dict[str, Callable[..., Any]] = {
        "speed": measure,
        "depths": measure_depths,
        "cold_start": measure_cold_start,
        "budget": measure_in_budget,
    }
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    file = Path(request.pop("file"))
    measurement = measurements[request.pop("kind")]
    # Before the runtime is imported, so that its memory counts.
    for group in request.pop("join", []):
        Path(group).write_text(str(os.getpid()), encoding="ascii")
    without_torch(file)
    # A library that hangs hears no exception; the signal's default ends the process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request.pop("timeout_s"))
    # Runtimes are measured as they come, not with what martlet sets for training.
    os.environ.pop("OMP_WAIT_POLICY", None)
    try:
        write_json(Path(sys.argv[2]), measurement(file, **request))
    except ExportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
