"""What the benchmarks share: paired rounds, their statistics, a table and a JSON file, pictures."""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Store, write_json
from pipeline.bench_worker import memory

RECIPE = Path("recipes/smollm2-135m-to-99m.yaml")
"""Whose teacher the benchmarks run on."""


@dataclass(frozen=True)
class Sample:
    """One run of one variant in one round: what it did and what that took.

    Attributes:
        work: tokens or whatever else the variant counts.
        wall: seconds of the clock.
        cpu: seconds of processor time of all threads.
    """

    work: float
    wall: float
    cpu: float


Samples = dict[str, list[Sample]]


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has: where its files go, threads, rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark-results"), help="folder of the results"
    )
    parser.add_argument("--store", type=Path, default=Path("store"), help="store in which the teacher lies")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every variant")
    parser.add_argument("--rounds", type=int, default=rounds, help="paired rounds that count")
    return parser


def teacher_folder(store: Path) -> Path:
    """The default recipe's teacher (SmolLM2-135M-Instruct) as a Hugging Face folder."""
    # Imported late: the processes that measure memory need none of it.
    from pipeline import teacher
    from pipeline.recipe import load_recipe

    return teacher.run(Store(store), load_recipe(RECIPE)).path / "model"


def exported_teacher(store: Path, format: str, quantization: str) -> Path:
    """That teacher in a format, what ``export.runtime.open_runtime`` opens; exported once."""
    from pipeline import exports, teacher
    from pipeline.recipe import load_recipe

    recipe = load_recipe(RECIPE)
    section = recipe.export.model_copy(update={format: [quantization]})
    recipe = recipe.model_copy(update={"name": "SmolLM2-135M", "export": section})
    artifact = exports.run(Store(store), recipe, teacher.run(Store(store), recipe), format)
    (file,) = json.loads((artifact.path / "files.json").read_text(encoding="utf-8"))
    return artifact.path / file["path"]


def prompt_ids(folder: Path, count: int) -> list[int]:
    """Token ids of the beginning of Python's language reference."""
    import pydoc_data.topics

    from pipeline.models import load_tokenizer

    text = "\n\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics)[:40])
    return load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"][:count]


def timed(work: Callable[[], float]) -> Sample:
    """Runs ``work``, which returns how much it did, in this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    done = work()
    return Sample(done, time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(variants: Mapping[str, Callable[[int], Sample]], rounds: int, warm_up: int = 1) -> Samples:
    """Runs every variant once a round, each round beginning with another one, so that whatever else the
    machine does hits all of them alike.

    Args:
        variants: called with the round's number; a warm-up round has a number too, but is not kept.
        rounds: that are kept.
        warm_up: rounds before them.
    """
    samples: Samples = {name: [] for name in variants}
    names = list(variants)
    for number in range(-warm_up, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            sample = variants[name](number)
            if number >= 0:
                samples[name].append(sample)
        say(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up")
    return samples


def rate(samples: Sequence[Sample], clock: str = "wall") -> dict[str, float]:
    """Work a second over all rounds: mean, sample standard deviation, of the clock or the processor."""
    rates = [sample.work / getattr(sample, clock) for sample in samples]
    return {"mean": statistics.mean(rates), "std": statistics.stdev(rates) if len(rates) > 1 else 0.0}


def speed_up(ours: Sequence[Sample], theirs: Sequence[Sample], clock: str = "wall") -> dict[str, float]:
    """How many times faster ours is, round by round: median, and the quarter and three-quarter points."""
    ratios = [
        (mine.work / getattr(mine, clock)) / (other.work / getattr(other, clock))
        for mine, other in zip(ours, theirs, strict=True)
    ]
    if len(ratios) == 1:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def as_dictionaries(samples: Samples) -> dict[str, list[dict[str, float]]]:
    """Every single measurement, for the JSON file."""
    return {name: [asdict(sample) for sample in kept] for name, kept in samples.items()}


def machine(threads: int, packages: Iterable[str]) -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": model, "processors": os.cpu_count(), "threads": threads, "packages": versions}


def measured_memory(module: str, request: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Calls ``module.measure(**request)`` in a process of its own and returns what it returns: peaks of one
    variant must not hide behind another's.

    Raises:
        RuntimeError: the process failed.
    """
    code = (
        "import json, sys; from importlib import import_module; "
        f"print(json.dumps(import_module({module!r}).measure(**json.loads(sys.argv[1]))))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TVM_NUM_THREADS": str(threads),
            # Freed blocks go back to the system at once, so that resident memory is memory in use.
            "MALLOC_MMAP_THRESHOLD_": "1048576",
            "MALLOC_TRIM_THRESHOLD_": "1048576",
        },
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{module}.measure({dict(request)}) ended with status {finished.returncode}.")
    return json.loads(finished.stdout.splitlines()[-1])


class PeakMemory:
    """Growth of this process's resident memory above what it was when this was made."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        now = memory()
        self._before = now["RssAnon"] + now["RssFile"]

    def bytes(self) -> int:
        """The most it has been since."""
        return max(0, memory()["VmHWM"] - self._before)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows under a title; floats with three significant digits, first column to the left."""
    texts = [list(columns), *[[_text(cell) for cell in row] for row in rows]]
    widths = [max(len(row[place]) for row in texts) for place in range(len(columns))]
    print(f"\n{title}")
    for number, row in enumerate(texts):
        cells = [row[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    sys.stdout.flush()


def spread(ratio: Mapping[str, float]) -> str:
    """A paired ratio with its middle half, such as ``3.21 (3.18 to 3.25)``."""
    return f"{ratio['median']:.3g} ({ratio['low']:.3g} to {ratio['high']:.3g})"


def mean_and_deviation(value: Mapping[str, float]) -> str:
    """Such as ``120 ± 3``."""
    return f"{value['mean']:.3g} ± {value['std']:.2g}"


def write(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Writes ``NAME.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", dict(result))
    print(f"written: {folder / name}.json")


def write_chart(folder: Path, name: str, chart: Any) -> None:
    """Writes an altair chart as ``NAME.svg``."""
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(chart.to_dict()), encoding="utf-8")
    print(f"written: {folder / name}.svg")


def say(line: str) -> None:
    """One line of progress on standard error."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return "-" if cell is None else str(cell)
