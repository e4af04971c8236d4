"""How each exported file runs on a CPU: one runtime, one process, real text as prompt."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from export.processes import run_logged
from pipeline import cgroups
from pipeline.artifacts import Artifact, Store, locked, write_json
from pipeline.bench_worker import CpuPressure
from pipeline.errors import UserError
from pipeline.profiles import Profile, load_profile
from pipeline.progress import Progress
from pipeline.recipe import Recipe

STAGE = "device"
VERSION = 6
SWEPT = (
    "threads",
    "prefill_tokens_per_s",
    "prefill_std",
    "decode_tokens_per_s",
    "decode_std",
    "processors_busy",
    "reliable",
)
"""What is kept of a measurement with another number of threads."""

MOMENT_S = 2.0
"""Seconds over which the machine is watched before a file is run within a profile."""


def run(store: Store, recipe: Recipe, exported: Artifact, text: Artifact) -> Artifact:
    """Measures every file of an export.

    Returns:
        ``device.json``: one entry a file, the keys of ``bench_worker.measure`` with file, format,
        quantization and bytes; cold_start (of ``measure_cold_start``, or null), thread_sweep (a list of
        the keys SWEPT), depths (of ``measure_depths``) and profiles. ``reliable``, of the file and
        of each of these, is false where tasks waited for the CPU more than ``bench.max_cpu_pressure`` allows,
        or the kernel cannot tell.

    Raises:
        UserError: a file cannot be run, or the held-out text is shorter than the prompt.
    """
    section = recipe.bench
    profiles = [load_profile(Path(path)) for path in section.profiles]

    @alone_on_this_machine(store)
    def make(output: Path, work: Path) -> None:
        held_out = np.load(text.path / "held_out.npy").reshape(-1)
        longest = max([section.prompt_tokens, *(profile.prompt_tokens for profile in profiles)])
        if len(held_out) < longest:
            raise UserError(
                f"bench.prompt_tokens: {longest} are asked for, but the held-out text has only "
                f"{len(held_out)} tokens; raise data.text.held_out_tokens or ask for fewer."
            )
        prompt = held_out[: section.prompt_tokens].tolist()
        results = []
        entries = json.loads((exported.path / "files.json").read_text(encoding="utf-8"))
        for number, entry in enumerate(entries):
            label = f"{entry['format']} {entry['quantization']}"
            what = f"bench: {label}, {section.repetitions} repetitions"
            store.report(Progress(what, number, len(entries), "files"))
            file = {"file": str(exported.path / entry["path"])}
            log = store.log_file(f"bench {label}")
            speed = {
                "prompt": prompt,
                "generated_tokens": section.generated_tokens,
                "repetitions": section.repetitions,
                "settle_s": section.settle_s,
            }

            def ask(kind: str, threads: int, file: Any = file, log: Path = log, **values: Any) -> Any:
                request = {**file, "kind": kind, "threads": threads, "timeout_s": section.timeout_s, **values}
                return _measure(request, work, log)

            def judged(found: dict[str, Any], key: str = "cpu_pressure") -> dict[str, Any]:
                return {**found, "reliable": is_reliable(found[key], section.max_cpu_pressure)}

            measured = judged(ask("speed", section.threads, **speed))
            sweep = []
            for threads in section.thread_sweep:
                at_threads = judged(ask("speed", threads, **speed))
                sweep.append({key: at_threads[key] for key in SWEPT})
            depths: list[dict[str, Any]] = []
            if section.depths:
                filling = {"text": held_out[: max(1, *section.depths)].tolist(), "depths": section.depths}
                counts = {key: speed[key] for key in ("generated_tokens", "repetitions", "settle_s")}
                depths = [judged(found) for found in ask("depths", section.threads, **filling, **counts)]
            cold = judged(ask("cold_start", section.threads, prompt=prompt)) if section.cold_start else None
            under = []
            for profile in profiles:
                # Before, not within: what waits for the budget's own share of a processor counts, too.
                quiet = judged({"cpu_pressure_before": pressure_of_a_moment()}, "cpu_pressure_before")
                request = {**file, "timeout_s": section.timeout_s}
                under.append(_under_profile(profile, request, held_out.tolist(), work, log) | quiet)
            results.append(
                {
                    "file": Path(entry["path"]).name,
                    **{key: entry[key] for key in ("format", "quantization", "bytes")},
                    **measured,
                    "cold_start": cold,
                    "thread_sweep": sweep,
                    "depths": depths,
                    "profiles": under,
                }
            )
        write_json(output / "device.json", results)

    return store.get_or_make(
        f"{STAGE}_{exported.stage.removeprefix('export_')}",
        VERSION,
        # What the profiles say, not where they lie.
        {
            "bench": recipe.slice("bench")["bench"]
            | {"profiles": [profile.model_dump() for profile in profiles]}
        },
        {"exported": exported, "text": text},
        make,
    )


@contextlib.contextmanager
def alone_on_this_machine(store: Store) -> Iterator[None]:
    """Waits until no other run of this user measures on this machine: two would measure each other."""
    path = Path(tempfile.gettempdir()) / f"martlet-benchmark-{os.getuid()}.lock"
    with locked(path, "waiting: another run is measuring on this machine", store.report):
        yield


def pressure_of_a_moment() -> float | None:
    """Per cent of ``MOMENT_S`` seconds from now in which some task of the machine waited for a processor."""
    pressure = CpuPressure()
    time.sleep(MOMENT_S)
    return pressure.per_cent()


def is_reliable(cpu_pressure: float | None, max_cpu_pressure: float) -> bool:
    """Whether timings can be trusted: tasks waited for a CPU in at most so many per cent of the time; what
    the kernel does not count (None) cannot be trusted."""
    return cpu_pressure is not None and cpu_pressure <= max_cpu_pressure


def _under_profile(
    profile: Profile, request: dict[str, Any], text: list[int], work: Path, log: Path
) -> dict[str, Any]:
    """Runs a file within a profile's budget, from a cold page cache.

    Returns:
        {profile, memory_mb, processors, status, reason, first_token_s, decode_tokens_per_s}: status is
        passed, failed or skipped, reason a sentence for the latter two; measurements that there are none of
        are null.
    """
    entry: dict[str, Any] = {
        "profile": profile.name,
        "memory_mb": profile.memory_mb,
        "processors": profile.processors,
        "status": "passed",
        "reason": None,
        "first_token_s": None,
        "decode_tokens_per_s": None,
    }
    try:
        with cgroups.limited(profile.memory_mb << 20, profile.processors) as joined:
            measured = _measure(
                {
                    **request,
                    "kind": "budget",
                    "threads": profile.threads,
                    "prompt": text[: profile.prompt_tokens],
                    "generated_tokens": profile.generated_tokens,
                    "join": [str(path) for path in joined],
                },
                work,
                log,
            )
    except cgroups.Unavailable as problem:
        return entry | {"status": "skipped", "reason": f"This machine makes no control groups ({problem})."}
    except Killed:
        return entry | {
            "status": "failed",
            "reason": f"It needs more than {profile.memory_mb} MB and was killed.",
        }
    except TooSlow:
        return entry | {
            "status": "failed",
            "reason": f"It was not done after {request['timeout_s']:g} s (bench.timeout_s).",
        }
    reasons = []
    if measured["decode_tokens_per_s"] < profile.min_decode_tokens_per_s:
        reasons.append(
            f"It decodes {measured['decode_tokens_per_s']:.2f} tokens/s, at least "
            f"{profile.min_decode_tokens_per_s:g} are asked for."
        )
    if profile.max_first_token_s is not None and measured["first_token_s"] > profile.max_first_token_s:
        reasons.append(
            f"Its first token comes after {measured['first_token_s']:.1f} s, at most "
            f"{profile.max_first_token_s:g} are allowed."
        )
    return (
        entry | measured | {"status": "failed" if reasons else "passed", "reason": " ".join(reasons) or None}
    )


class Killed(UserError):
    """The kernel ended a measurement that took more memory than there was."""


class TooSlow(UserError):
    """A measurement was ended because it took longer than it may."""


def _measure(request: dict[str, Any], work: Path, log: Path) -> dict[str, Any]:
    """Runs ``pipeline.bench_worker``.

    Raises:
        Killed: it was ended by the kernel, for want of memory.
        TooSlow: it took longer than ``timeout_s``.
        UserError: it failed.
    """
    request_file, result_file = work / "request.json", work / "result.json"
    write_json(request_file, request)
    threads = str(request["threads"])
    finished = run_logged(
        [sys.executable, "-m", "pipeline.bench_worker", str(request_file), str(result_file)],
        log,
        {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "TVM_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": "1",  # read_bandwidth brings its own threads
        },
    )
    if finished.returncode == 0:
        return json.loads(result_file.read_text(encoding="utf-8"))
    if finished.returncode == -signal.SIGALRM:
        raise TooSlow(
            f"{Path(request['file']).name}: took longer than bench.timeout_s, {request['timeout_s']:g} s; "
            "raise it or measure less."
        )
    # An out-of-memory kill leaves no words; some runtimes see a failed allocation and abort instead.
    kind = Killed if finished.returncode == -signal.SIGKILL else UserError
    error = kind(f"{Path(request['file']).name}: cannot be measured ({finished.reason()}).")
    error.add_note(finished.shown())
    raise error
