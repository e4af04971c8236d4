"""Evaluation of a released file by lm-evaluation-harness: its own tasks, and two that need no hub.

``held_out_text`` and ``held_out_chats`` are the held-out documents and conversations of the run that a
release was laid out from, taken from its store, or any that are given. The model is run by the runtime of its
format, so that a GGUF file is judged as llama.cpp runs it, an MLC folder as TVM does.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from export.runtime import Runtime
from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.prepare import end_of_text
from pipeline.release import change_report, read_report
from pipeline.sources import conversations, documents

TEXT, CHATS = "held_out_text", "held_out_chats"
MOST_GENERATED = 256
"""Tokens of an answer where a task names no limit."""


class RuntimeModel(LM):
    """A runtime as lm-evaluation-harness asks for a model: likelihoods and greedy answers, one at a time.

    Args:
        runtime: an opened model file.
        report: told how far it is.
    """

    def __init__(self, runtime: Runtime, report: Callable[[str], None]):
        super().__init__()
        self.runtime, self.report = runtime, report
        ends = [runtime.eos_token_id, *runtime.end_of_turn_ids]
        self.beginning = next(end for end in ends if end is not None)
        """What stands before a text's first token, so that this can be predicted, too."""

    @property
    def tokenizer_name(self) -> str:
        """Names the template in the harness's own records."""
        return self.runtime.name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, by the file's own template."""
        return self.runtime.chat_text(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the continuation's log-likelihood, nats, and whether it is what
        greedy decoding would say."""
        answers = []
        for number, (context, continuation) in enumerate(self._arguments(requests)):
            spaces = context[len(context.rstrip()) :]
            context, continuation = context.rstrip(), spaces + continuation
            before = self.runtime.tokenize(context) if context else []
            after = self.runtime.tokenize(context + continuation)[len(before) :]
            answers.append(self._score(before or [self.beginning], after))
            self._tell("likelihoods", number + 1, len(requests))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each whole text, nats; longer ones than the context are read in windows."""
        answers = []
        for number, (text,) in enumerate(self._arguments(requests)):
            windows = get_rolling_token_windows(
                self.runtime.tokenize(text), self.beginning, self.runtime.context_length, 1
            )
            scores = [self._score(*make_disjoint_window(window)) for window in windows]
            answers.append(sum(score for score, _ in scores))
            self._tell("texts", number + 1, len(requests))
        return answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, up to a stop text, the end of the turn or ``max_gen_toks`` tokens."""
        answers = []
        for number, (prompt, wanted) in enumerate(self._arguments(requests)):
            if wanted.get("do_sample") and wanted.get("temperature", 1) > 0:
                raise UserError(
                    "--tasks: a task asks for sampled answers; martlet evaluates greedy ones only."
                )
            stops = wanted.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            most = int(wanted.get("max_gen_toks", MOST_GENERATED))
            answers.append(self._answer(self.runtime.tokenize(prompt), stops, most))
            self._tell("answers", number + 1, len(requests))
        return answers

    def _arguments(self, requests: list[Instance]) -> list[Any]:
        return [request.args for request in requests]

    def _tell(self, what: str, done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            self.report(f"evaluate: {done:,} of {total:,} {what}")

    def _score(self, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
        """Sum of log p(token | what stands before it) over ``after``; the oldest context is left out where
        both do not fit."""
        ids = [*before, *after][-(self.runtime.context_length + 1) :]
        count = min(len(after), len(ids) - 1)
        if count <= 0:
            return 0.0, True
        self.runtime.reset()
        logits = self.runtime.forward(ids[:-1])[-count:].astype(np.float64)
        targets = np.array(ids[-count:])
        highest = logits.max(axis=1)
        normalisers = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
        score = float((logits[np.arange(count), targets] - normalisers).sum())
        return score, bool((logits.argmax(axis=1) == targets).all())

    def _answer(self, prompt: list[int], stops: list[str], most: int) -> str:
        room = self.runtime.context_length - most
        if room < 1:
            raise UserError(
                f"--tasks: a task asks for answers of {most:,} tokens; the context has "
                f"{self.runtime.context_length:,}."
            )
        self.runtime.reset()
        logits = self.runtime.prefill(prompt[-room:] or [self.beginning])
        ids: list[int] = []
        while len(ids) < most:
            token_id = int(logits.argmax())
            if token_id in self.runtime.end_of_turn_ids:
                break
            ids.append(token_id)
            text = self.runtime.decode_text(ids)
            if any(stop in text for stop in stops):
                return text[: min(text.index(stop) for stop in stops if stop in text)]
            if len(ids) < most:
                logits = self.runtime.decode(token_id)
        return self.runtime.decode_text(ids)


def run(
    runtime: Runtime,
    tasks: Sequence[str],
    texts: Sequence[str],
    chats: Sequence[list[dict[str, str]]],
    limit: int | None,
    shots: int | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Runs tasks on a model.

    Args:
        runtime: the model.
        tasks: names of the harness's tasks and groups, ``held_out_text`` and ``held_out_chats``.
        texts: documents of ``held_out_text``.
        chats: conversations of ``held_out_chats``, each ending with the assistant, whose last turn is scored.
        limit: documents of a task at most.
        shots: examples in each prompt of the harness's own tasks; None: what each task says.
        report: told how far it is.

    Returns:
        ``results``: [{task, version, metric, value, standard_error, documents, shots, higher_is_better}],
        ``lm_eval`` its version, ``limit``, ``seconds``.

    Raises:
        UserError: there is no such task, its data cannot be had, or there is nothing held out.
    """
    for name, held_out in ((TEXT, texts), (CHATS, chats)):
        if name in tasks and not held_out:
            raise UserError(f"--tasks: there is nothing for {name}; give its data by --text or --chats.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bars()
    others = [name for name in tasks if name not in (TEXT, CHATS)]
    wanted: list[Any] = list(others)
    if TEXT in tasks:
        rows = [{"text": text} for text in texts]
        wanted.append(
            _task(TEXT, rows, output_type="loglikelihood_rolling", doc_to_target=itemgetter("text"))
        )
    if CHATS in tasks:
        rows = [_asked_and_answered(runtime, messages) for messages in chats]
        wanted.append(
            _task(
                CHATS,
                rows,
                output_type="loglikelihood",
                doc_to_text=itemgetter("asked"),
                doc_to_target=itemgetter("answered"),
                process_results=_bits_of_answer,
                metric_list=[{"metric": "bits_per_byte"}],
            )
        )
    started = time.monotonic()
    manager = TaskManager(include_defaults=bool(others))
    for name in others:
        if not manager.match_tasks([name]):
            raise UserError(
                f"--tasks: lm-evaluation-harness {version('lm-eval')} has no task {name!r}; `lm-eval ls "
                "tasks` lists them."
            )
    try:
        found = simple_evaluate(
            model=RuntimeModel(runtime, report),
            tasks=wanted,
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--tasks: {', '.join(tasks)}: cannot be run ({reason}).") from error
    return {
        "results": _rows(found),
        "lm_eval": version("lm-eval"),
        "limit": limit,
        "seconds": round(time.monotonic() - started, 1),
    }


def _task(name: str, rows: list[dict[str, str]], **settings: Any) -> dict[str, Any]:
    """A task of ours in the harness's terms."""
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1},
        **settings,
    }


def _asked_and_answered(runtime: Runtime, messages: list[dict[str, str]]) -> dict[str, str]:
    """A conversation up to the assistant's last turn, and that turn with its end."""
    asked = runtime.chat_text(messages[:-1], True)
    whole = runtime.chat_text(messages, False)
    if not whole.startswith(asked):
        raise UserError(
            f"--tasks: {CHATS}: the chat template changes earlier turns when a conversation goes on."
        )
    # White space that the template puts behind the end of turn is not the assistant's.
    return {"asked": asked, "answered": whole[len(asked) :].rstrip()}


def _bits_of_answer(document: dict[str, str], results: list[tuple[float, bool]]) -> dict[str, Any]:
    return {"bits_per_byte": (results[0][0], len(document["answered"].encode()))}


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The harness's results, one row a task and metric."""
    rows = []
    for task, measured in found["results"].items():
        for key, value in measured.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or not filtered or metric.endswith("_stderr"):
                continue
            error = measured.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "version": str(found["versions"].get(task, "")),
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float) else None,
                    "documents": found.get("n-samples", {}).get(task, {}).get("effective"),
                    "shots": found.get("n-shot", {}).get(task),
                    "higher_is_better": found.get("higher_is_better", {}).get(task, {}).get(metric),
                }
            )
    return rows


def release_of(model: Path) -> Path | None:
    """The release that a model lies in, or None."""
    return next((folder for folder in (model, *model.parents) if (folder / "manifest.json").is_file()), None)


def held_out_texts(release: Path, store: Path) -> list[str]:
    """The held-out documents of the run that a release was laid out from.

    Raises:
        UserError: the store no longer has them.
    """
    text = _artifact(release, store, "text")
    tokenizer = load_tokenizer(_artifact(release, store, "teacher") / "model")
    end = end_of_text(tokenizer)
    ids = np.load(text / "held_out.npy").ravel()
    numbers = np.load(text / "documents_held_out.npy").ravel()
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
    return [
        tokenizer.decode([int(i) for i in part if i != end])
        for part in np.split(ids, starts[1:])
        if len(part) > 1
    ]


def held_out_chats(release: Path, store: Path) -> list[list[dict[str, str]]]:
    """The held-out conversations of the run that a release was laid out from.

    Raises:
        UserError: the store no longer has them.
    """
    path = _artifact(release, store, "chats") / "held_out.jsonl"
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def _artifact(release: Path, store: Path, role: str) -> Path:
    entry = read_report(release)["lineage"][role]
    folder = store / entry["stage"] / entry["key"]
    if not folder.is_dir():
        raise UserError(
            f"{folder}: the store no longer has what {release} was made from; give --store, or the data by "
            "--text and --chats."
        )
    return folder


def held_out(
    tasks: Sequence[str], release: Path | None, store: Path, text: str | None, chats: str | None
) -> tuple[list[str], list[list[dict[str, str]]]]:
    """What ``held_out_text`` and ``held_out_chats`` are run over, as far as ``tasks`` name them.

    Args:
        tasks: what is asked for.
        release: the release that the model lies in, or None.
        store: where that was made.
        text, chats: sources as a recipe names them, in place of the run's own.

    Returns:
        Documents and conversations.

    Raises:
        UserError: a source cannot be read, or the store no longer has the run's own.
    """
    documents_: list[str] = []
    conversations_: list[list[dict[str, str]]] = []
    if TEXT in tasks and text is not None:
        documents_ = list(documents(text, "text"))
    elif TEXT in tasks and release is not None:
        documents_ = held_out_texts(release, store)
    if CHATS in tasks and chats is not None:
        conversations_ = list(conversations(chats))
    elif CHATS in tasks and release is not None:
        conversations_ = held_out_chats(release, store)
    return documents_, conversations_


def show_in_report(facts: dict[str, Any], model: Path, release: Path) -> None:
    """Takes results into a release's report (key ``evaluations``); those of the same file, task and metric
    are replaced.

    Args:
        facts: result of ``run``.
        model: the file or folder that was evaluated, in the release.
        release: the release.
    """
    file = model.relative_to(release).as_posix()
    rows = [
        {"file": file, "lm_eval": facts["lm_eval"], "limit": facts["limit"], **row}
        for row in facts["results"]
    ]

    def take(report: dict[str, Any]) -> None:
        new = {(row["file"], row["task"], row["metric"]) for row in rows}
        kept = [
            row
            for row in report.get("evaluations", [])
            if (row["file"], row["task"], row["metric"]) not in new
        ]
        report["evaluations"] = [*kept, *rows]

    change_report(release, take)
