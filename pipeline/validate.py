"""Gates: is every exported file still the model?"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import Artifact, Store, write_json
from pipeline.chat_template import render_with_mask
from pipeline.errors import GateFailed, UserError
from pipeline.models import load_tokenizer
from pipeline.recipe import Recipe, Thresholds

VERSION = 1
HELD_OUT_CHATS = 8


def run(
    store: Store, recipe: Recipe, instruct: Artifact, exported: Artifact, text: Artifact, chats: Artifact
) -> Artifact:
    """Runs every file of an export over held-out text and chats, and compares with torch.

    Returns:
        ``fidelity.json``: one entry a file, with its statistics, ``passed`` and ``failures``. A failed gate
        is a result like any other; ``require_passed`` turns it into an error.

    Raises:
        UserError: the reference model cannot be run.
    """

    def make(output: Path, work: Path) -> None:
        rows = evaluation_rows(recipe, instruct, text, chats)
        entries = json.loads((exported.path / "files.json").read_text(encoding="utf-8"))
        results = []
        with tempfile.TemporaryDirectory(dir=work) as folder:
            store.report("validate: running the model in torch for reference")
            request = {"model": str(instruct.path / "model"), "rows": rows, "reference": folder}
            request |= {"file": None, "threads": recipe.threads}
            problem, _ = _worker(request, Path(folder))
            if problem is not None:
                raise UserError(f"{instruct.path / 'model'}: the model cannot be run in torch ({problem}).")
            for entry in entries:
                store.report(f"validate: {entry['format']} {entry['quantization']}")
                request |= {"file": str(exported.path / entry["path"])}
                problem, measured = _worker(request, Path(folder))
                thresholds = recipe.validate_.thresholds.get(entry["quantization"], recipe.validate_.default)
                name = Path(entry["path"]).name
                failures = (
                    [f"{name}: gate loads: {problem}"]
                    if problem is not None
                    else missed_gates(name, measured, thresholds)
                )
                results.append(
                    {
                        "file": name,
                        **{key: entry[key] for key in ("format", "quantization", "bytes")},
                        **measured,
                        "passed": not failures,
                        "failures": failures,
                    }
                )
        write_json(output / "fidelity.json", results)

    return store.get_or_make(
        f"fidelity_{exported.stage.removeprefix('export_')}",
        VERSION,
        recipe.slice("validate"),
        {"instruct": instruct, "exported": exported, "text": text, "chats": chats},
        make,
    )


def missed_gates(name: str, measured: dict[str, Any], thresholds: Thresholds) -> list[str]:
    """A sentence for each gate that a file misses, naming file, gate, value and threshold."""
    failures = []
    if not measured["token_ids_equal"]:
        failures.append(
            f"{name}: gate token_ids: {measured['token_ids_differ']} of {measured['conversations']} fixed "
            f"conversations become other token ids than in the model's tokenizer, threshold 0 "
            f"(first: {measured['token_ids_differ_in'][0]})."
        )
    if not measured["stops_at_end_of_turn"]:
        failures.append(
            f"{name}: gate end_of_turn: generation stops at {measured['end_of_turn_ids']}, but the model "
            f"ends a turn with {measured['reference_end_of_turn_ids']}."
        )
    if not measured["vocabulary_size_equal"]:
        failures.append(
            f"{name}: gate vocabulary: the file has {measured['vocabulary_size']} tokens, the model another "
            "number."
        )
    limits = (
        ("mean_kl", thresholds.mean_kl, "at most"),
        ("p99_kl", thresholds.p99_kl, "at most"),
        ("same_top", thresholds.same_top, "at least"),
        ("perplexity_ratio", thresholds.perplexity_ratio, "at most"),
    )
    for gate, threshold, relation in limits:
        if threshold is None:
            continue
        value = measured[gate]
        # Written so that a value that is no number fails.
        holds = value <= threshold if relation == "at most" else value >= threshold
        if not holds:
            failures.append(f"{name}: gate {gate}: {value:.4g}, the threshold is {relation} {threshold:.4g}.")
    return failures


def require_passed(artifacts: list[Artifact]) -> None:
    """Ends the run when a file missed a gate.

    Raises:
        GateFailed: with the sentences of all failures.
    """
    failures = [
        failure
        for artifact in artifacts
        for entry in json.loads((artifact.path / "fidelity.json").read_text(encoding="utf-8"))
        for failure in entry["failures"]
    ]
    if failures:
        more = f" ({len(failures) - 1} more gates failed.)" if len(failures) > 1 else ""
        raise GateFailed(failures[0] + more)


def evaluation_rows(recipe: Recipe, instruct: Artifact, text: Artifact, chats: Artifact) -> list[list[int]]:
    """Token ids to run: held-out blocks up to ``validate.tokens``, then rendered held-out chats."""
    blocks = np.load(text.path / "held_out.npy")
    wanted = -(-recipe.validate_.tokens // blocks.shape[1])
    rows = [[int(token_id) for token_id in block] for block in blocks[:wanted]]
    tokenizer = load_tokenizer(instruct.path / "model")
    with (chats.path / "held_out.jsonl").open(encoding="utf-8") as lines:
        for _, line in zip(range(HELD_OUT_CHATS), lines, strict=False):
            rows.append(render_with_mask(tokenizer, json.loads(line)["messages"])[0])
    return rows


def _worker(request: dict[str, Any], folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Runs ``pipeline.validate_worker``: (what went wrong or None, its result)."""
    request_file, result_file = folder / "request.json", folder / "result.json"
    write_json(request_file, request)
    result_file.unlink(missing_ok=True)
    finished = subprocess.run(
        [sys.executable, "-m", "pipeline.validate_worker", str(request_file), str(result_file)],
        capture_output=True,
        text=True,
    )
    if finished.returncode != 0:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        return (lines[-1] if lines else f"the process ended with status {finished.returncode}"), {}
    return None, json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else {}
