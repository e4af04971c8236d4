"""How each exported file runs on a CPU: one runtime, one process, real text as prompt."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.artifacts import Artifact, Store, write_json
from pipeline.errors import UserError
from pipeline.recipe import Recipe

VERSION = 1


def run(store: Store, recipe: Recipe, exported: Artifact, text: Artifact) -> Artifact:
    """Measures every file of an export.

    Returns:
        ``device.json``: one entry a file. ``reliable`` is false where other tasks competed for the CPU
        more than ``bench.max_cpu_pressure`` allows.

    Raises:
        UserError: a file cannot be run.
    """
    section = recipe.bench

    def make(output: Path, work: Path) -> None:
        prompt = np.load(text.path / "held_out.npy").reshape(-1)[: section.prompt_tokens].tolist()
        results = []
        for entry in json.loads((exported.path / "files.json").read_text(encoding="utf-8")):
            store.report(
                f"bench: {entry['format']} {entry['quantization']}, {section.repetitions} repetitions"
            )
            with tempfile.TemporaryDirectory(dir=work) as folder:
                request, result = Path(folder) / "request.json", Path(folder) / "result.json"
                write_json(
                    request,
                    {
                        "file": str(exported.path / entry["path"]),
                        "prompt": prompt,
                        "generated_tokens": section.generated_tokens,
                        "repetitions": section.repetitions,
                        "threads": section.threads,
                    },
                )
                threads = str(section.threads)
                finished = subprocess.run(
                    [sys.executable, "-m", "pipeline.bench_worker", str(request), str(result)],
                    capture_output=True,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": threads, "TVM_NUM_THREADS": threads},
                )
                if finished.returncode != 0:
                    lines = [line for line in finished.stderr.splitlines() if line.strip()]
                    reason = lines[-1] if lines else f"status {finished.returncode}"
                    raise UserError(f"{Path(entry['path']).name}: cannot be measured ({reason}).")
                measured = json.loads(result.read_text(encoding="utf-8"))
            results.append(
                {
                    "file": Path(entry["path"]).name,
                    **{key: entry[key] for key in ("format", "quantization", "bytes")},
                    **measured,
                    "reliable": measured["cpu_pressure"] <= section.max_cpu_pressure,
                }
            )
        write_json(output / "device.json", results)

    return store.get_or_make(
        f"device_{exported.stage.removeprefix('export_')}",
        VERSION,
        recipe.slice("bench"),
        {"exported": exported, "text": text},
        make,
    )
