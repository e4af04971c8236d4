"""Gates: is every exported file still the model?"""

import errno
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from export.errors import ExportError
from export.gguf import quantize_gguf
from export.processes import run_logged
from pipeline.artifacts import Artifact, Store, memory_ran_out, space_ran_out, write_json
from pipeline.chat_template import render_with_mask
from pipeline.conversations import held_out_prompts
from pipeline.errors import GateFailed, UserError
from pipeline.exports import UNQUANTIZED, unquantized
from pipeline.models import load_tokenizer
from pipeline.progress import Progress
from pipeline.recipe import Recipe, Thresholds

STAGE = "fidelity"
VERSION = 7
REFERENCE_VERSION = 3
HELD_OUT_CHATS = 8
ANSWERS = "unquantized-answers"
ENDED_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

NOT_MEASURED: dict[str, Any] = dict.fromkeys(
    (
        "token_ids_equal",
        "stops_at_end_of_turn",
        "mean_kl",
        "median_kl",
        "p99_kl",
        "p999_kl",
        "max_kl",
        "same_top",
        "same_top_error",
        "perplexity_ratio",
        "perplexity_ratio_error",
        "top_probability_rms",
        "decode_kl",
        "tokens",
        "worst",
        "said",
    )
)
"""What a file's entry says of measurements when the file could not be run."""


def run(
    store: Store,
    recipe: Recipe,
    instruct: Artifact,
    exported: Artifact,
    text: Artifact,
    chats: Artifact,
    threads: int | None = None,
) -> Artifact:
    """Runs every file of an export over held-out text and chats, and compares with torch.

    Every quantized file is also compared with the unquantized file of its format (made for this where the
    recipe does not list it), so that a loss is blamed on the format or on the quantization.

    Args:
        store: where the result goes.
        recipe: its ``validate`` section says how.
        instruct: the model.
        exported: the files.
        text: held-out text.
        chats: held-out chats.
        threads: CPU threads of each process; None takes the recipe's.

    Returns:
        ``fidelity.json``: one entry a file, with its statistics, ``bits_per_weight``, ``hops`` (see
        ``hops_of``), ``floor_kl`` (see ``validate_worker.unquantized_answers``), with an importance matrix
        the statistics ``without_importance_matrix``, ``passed`` and ``failures``. A failed gate is a result
        like any other; ``require_passed`` turns it into an error. Statistics of a file that its runtime
        cannot run, or that are no finite numbers, are null.

    Raises:
        UserError: the reference model cannot be run.
    """

    def make(output: Path, work: Path) -> None:
        processors = threads or recipe.threads
        reference = reference_logits(store, recipe, instruct, text, chats, processors)
        common = {
            "reference": str(reference.path),
            "threads": processors,
            "timeout_s": recipe.validate_.timeout_s,
        }
        parameters = weights_of(instruct.path / "model")
        format = exported.stage.removeprefix("export_")
        before = _run_unquantized(store, recipe, instruct, exported, format, common, work)
        results = []
        prompts = held_out_prompts(chats.path / "held_out.jsonl")
        entries = json.loads((exported.path / "files.json").read_text(encoding="utf-8"))
        for number, entry in enumerate(entries):
            label = f"validate {entry['format']} {entry['quantization']}"
            store.report(Progress(label.replace(" ", ": ", 1), number, len(entries), "files"))
            is_unquantized = entry["quantization"] == UNQUANTIZED[format]
            request: dict[str, Any] = {
                "file": str(exported.path / entry["path"]),
                "unquantized": None if is_unquantized or not before else str(work / ANSWERS),
                "prompts": prompts,
                **common,
            }
            problem, measured = _worker(request, work, store, label)
            hops = hops_of(entry["quantization"], format, measured, before)
            measured = {key: value for key, value in measured.items() if key != "quantization"}
            thresholds = recipe.validate_.thresholds.get(entry["quantization"], recipe.validate_.default)
            name = Path(entry["path"]).name
            if problem is None:
                failures = missed_gates(name, measured, thresholds, hops)
            else:
                failures = [f"{name}: gate runs: the runtime fails, the threshold is no failure ({problem})."]
            results.append(
                {
                    "file": name,
                    **{key: entry[key] for key in ("format", "quantization", "bytes")},
                    **NOT_MEASURED,
                    **{key: _finite(value) for key, value in measured.items()},
                    "bits_per_weight": 8 * entry["bytes"] / parameters,
                    "hops": hops,
                    "floor_kl": _finite(before.get("floor_kl")),
                    "without_importance_matrix": _without_matrix(store, entry, before, common, work),
                    "passed": not failures,
                    "failures": failures,
                }
            )
        write_json(output / "fidelity.json", results)

    gates = recipe.slice("validate")["validate"]
    return store.get_or_make(
        f"{STAGE}_{exported.stage.removeprefix('export_')}",
        VERSION,
        # How long it may take changes no result.
        {"validate": {key: value for key, value in gates.items() if key != "timeout_s"}},
        {"instruct": instruct, "exported": exported, "text": text, "chats": chats},
        make,
    )


def reference_logits(
    store: Store, recipe: Recipe, instruct: Artifact, text: Artifact, chats: Artifact, threads: int
) -> Artifact:
    """The model's own answers, made once for all formats: see ``validate_worker.reference_answers``.

    Raises:
        UserError: the model cannot be run in torch.
    """

    def make(output: Path, work: Path) -> None:
        store.report("validate: running the model in torch for reference")
        rows = evaluation_rows(recipe, instruct, text, chats)
        model = str(instruct.path / "model")
        request = {
            "model": model,
            "rows": rows,
            "reference": str(output),
            "threads": threads,
            "timeout_s": recipe.validate_.timeout_s,
        }
        problem, _ = _worker(request, work, store, "validate reference")
        if problem is not None:
            raise UserError(f"{model}: the model cannot be run in torch ({problem}).")

    return store.get_or_make(
        "reference_logits",
        REFERENCE_VERSION,
        {"tokens": recipe.validate_.tokens, "held_out_chats": HELD_OUT_CHATS},
        {"instruct": instruct, "text": text, "chats": chats},
        make,
    )


def weights_of(model_dir: Path) -> int:
    """Number of a folder's weights; a tied head is stored, and counted, once."""
    count = 0
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def hops_of(
    quantization: str, format: str, measured: dict[str, Any], before: dict[str, Any]
) -> list[dict[str, Any]]:
    """How much is lost on each step from the model in torch to a file.

    Args:
        quantization: the file's.
        format: the file's.
        measured: result of ``validate_worker.judge``; empty where the file could not be run.
        before: result of ``validate_worker.unquantized_answers``; empty likewise.

    Returns:
        [{hop, mean_kl, p99_kl, same_top, perplexity_ratio}]: the format's own step ("model to f16") and
        quantization's ("f16 to q4_k_m"). KLs of steps do not add up exactly.
    """
    steps = []
    unquantized = UNQUANTIZED[format]
    if before:
        steps.append((f"model to {unquantized}", before["hop"]))
    if measured.get("quantization"):
        steps.append((f"{unquantized} to {quantization}", measured["quantization"]))
    return [{"hop": hop, **_brief(statistics)} for hop, statistics in steps]


def _brief(statistics: dict[str, Any]) -> dict[str, Any]:
    return {key: _finite(statistics[key]) for key in ("mean_kl", "p99_kl", "same_top", "perplexity_ratio")}


def _run_unquantized(
    store: Store,
    recipe: Recipe,
    instruct: Artifact,
    exported: Artifact,
    format: str,
    common: dict[str, Any],
    work: Path,
) -> dict[str, Any]:
    """Result of ``validate_worker.unquantized_answers``, whose logits are left in ``work``, with the
    ``file``; empty if it cannot be made or run, which the gates of the quantized files then say."""
    for name in (ANSWERS, "unquantized"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / ANSWERS).mkdir()
    try:
        file = unquantized(store, recipe, instruct, exported, format, work / "unquantized")
    except ExportError as error:
        _raise_if_not_the_files_fault(str(error), work)
        store.report(f"validate: no {UNQUANTIZED[format]} file to compare with ({error})")
        return {}
    problem, result = _worker(
        {"file": str(file), "answers": str(work / ANSWERS), **common},
        work,
        store,
        f"validate {format} {UNQUANTIZED[format]}",
    )
    if problem is not None:
        store.report(f"validate: {UNQUANTIZED[format]} cannot be run ({problem})")
        return {}
    return {**result, "file": str(file)}


def _without_matrix(
    store: Store, entry: dict[str, Any], before: dict[str, Any], common: dict[str, Any], work: Path
) -> dict[str, Any] | None:
    """What the same quantization is worth without its importance matrix; None where it has none."""
    if not entry.get("importance_matrix") or not before:
        return None
    quantization = entry["quantization"]
    store.report(f"validate: {quantization} without the importance matrix, to tell what the matrix gains")
    file = work / "without-importance-matrix.gguf"
    file.unlink(missing_ok=True)
    quantize_gguf(Path(before["file"]), file, quantization, threads=common["threads"])
    problem, measured = _worker(
        {"file": str(file), "logits_only": True, **common},
        work,
        store,
        f"validate gguf {quantization} without matrix",
    )
    file.unlink()
    return None if problem is not None else _brief(measured)


def missed_gates(
    name: str, measured: dict[str, Any], thresholds: Thresholds, hops: Sequence[dict[str, Any]] = ()
) -> list[str]:
    """A sentence for each gate that a file misses, naming file, gate, value and threshold.

    Args:
        name: the file's name.
        measured: result of ``validate_worker.judge``.
        thresholds: the recipe's for this quantization.
        hops: of ``hops_of``; a loss is blamed on the step that lost most.
    """
    failures = []
    worst = max(hops, key=lambda step: math.inf if step["mean_kl"] is None else step["mean_kl"], default=None)
    blame = "" if worst is None or len(hops) < 2 else f" (most is lost from {worst['hop']})"

    def missed(gate: str, sentence: str) -> None:
        failures.append(f"{name}: gate {gate}: {sentence}.")

    if not measured["token_ids_equal"]:
        missed(
            "token_ids",
            f"{measured['token_ids_differ']} of {measured['conversations']} fixed conversations become other "
            f"token ids than in the model's tokenizer and template, the threshold is 0 "
            f"(first: {measured['token_ids_differ_in'][0]})",
        )
    if not measured["bos_equal"]:
        missed(
            "bos",
            f"a conversation begins with {measured['leading_bos']} BOS tokens, the model's with "
            f"{measured['reference_leading_bos']}",
        )
    if measured["completion_ids"] not in (None, measured["reference_completion_ids"]):
        missed(
            "completion",
            f"plain text to be continued becomes the token ids {measured['completion_ids']}, in the model "
            f"{measured['reference_completion_ids']}",
        )
    if not measured["stops_at_end_of_turn"]:
        missed(
            "end_of_turn",
            f"generation ends at the token ids {measured['end_of_turn_ids']} and so at another place in "
            f"{measured['stops_differ']} of {measured['answers']} fixed answers, the threshold is 0; the "
            f"model ends a turn with {measured['reference_end_of_turn_ids']}",
        )
    if not measured["eos_equal"]:
        missed(
            "eos",
            f"the file names {measured['eos_token_id']} as its end of sequence, the model ends with "
            f"{measured['reference_end_of_turn_ids']}",
        )
    for gate in ("vocabulary_size", "context_length"):
        if measured[gate] != measured[f"reference_{gate}"]:
            missed(gate, f"{measured[gate]} tokens, the model has {measured[f'reference_{gate}']}")
    if measured["generation_differs"]:
        more = len(measured["generation_differs"]) - 1
        missed(
            "generation",
            f"{measured['generation_differs'][0]}, the threshold is no difference"
            + (f" ({more} more)" if more else ""),
        )
    at_most = {
        "mean_kl": thresholds.mean_kl,
        "p99_kl": thresholds.p99_kl,
        "perplexity_ratio": thresholds.perplexity_ratio,
        "decode_kl": thresholds.mean_kl,
    }
    # Written so that a value that is no number fails.
    for gate, threshold in at_most.items():
        if threshold is not None and not measured[gate] <= threshold:
            blamed = "" if gate == "decode_kl" else blame
            missed(gate, f"{measured[gate]:.4g}, the threshold is at most {threshold:.4g}{blamed}")
    if not measured["same_top"] >= thresholds.same_top:
        missed(
            "same_top",
            f"{measured['same_top']:.4g}, the threshold is at least {thresholds.same_top:.4g}{blame}",
        )
    return failures


def require_passed(artifacts: list[Artifact]) -> None:
    """Ends the run when a file missed a gate.

    Raises:
        GateFailed: with the sentences of all failures.
    """
    failures = [failure for artifact in artifacts for failure in failures_of(artifact)]
    if failures:
        more = f" ({len(failures) - 1} more gates failed.)" if len(failures) > 1 else ""
        raise GateFailed(failures[0] + more)


def failures_of(fidelity: Artifact) -> list[str]:
    """A sentence for each gate that a file of this format missed."""
    entries = json.loads((fidelity.path / "fidelity.json").read_text(encoding="utf-8"))
    return [failure for entry in entries for failure in entry["failures"]]


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


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; the gates have judged them before."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _worker(
    request: dict[str, Any], folder: Path, store: Store, label: str
) -> tuple[str | None, dict[str, Any]]:
    """Runs ``pipeline.validate_worker``: (what went wrong or None, its result).

    Raises:
        UserError: the process took too long or was ended from outside, which says nothing of the file.
    """
    request_file, result_file = folder / "request.json", folder / "result.json"
    result_file.unlink(missing_ok=True)
    write_json(request_file, request)
    finished = run_logged(
        [sys.executable, "-m", "pipeline.validate_worker", str(request_file), str(result_file)],
        store.log_file(label),
    )
    if finished.returncode == 0:
        return None, json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else {}
    name = Path(request.get("file", request.get("model", ""))).name
    if finished.returncode == -signal.SIGALRM:
        raise UserError(
            f"{name}: its gates took longer than validate.timeout_s, {request['timeout_s']:g} s; raise it, "
            "or lower validate.tokens."
        )
    if -finished.returncode in ENDED_FROM_OUTSIDE:
        # A stored result would be believed by every later run.
        raise UserError(
            f"{name}: the process that measures it was ended from outside by "
            f"{signal.Signals(-finished.returncode).name} (by the kernel, where memory is short); start the "
            "same command again."
        )
    _raise_if_not_the_files_fault(finished.output, folder)
    store.report(f"{label}: {finished.shown()}")
    return finished.reason(), {}


def _raise_if_not_the_files_fault(said: str, folder: Path) -> None:
    """A failure for lack of space or memory, or by a signal from outside, says nothing of the file, and a
    stored result would be believed by every later run.

    Raises:
        OSError: the disk is full.
        MemoryError: memory ran out.
        UserError: the process was ended from outside.
    """
    if space_ran_out(folder, said):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    if memory_ran_out(said):
        raise MemoryError(said.rstrip().rpartition("\n")[2])
    if any(f"ended by {number.name}" in said for number in ENDED_FROM_OUTSIDE):
        raise UserError(f"validate: {said} Start the same command again.")
