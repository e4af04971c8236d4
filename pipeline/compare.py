"""Comparison study: what each objective makes of the same student, text, steps and seeds.

The stages are the line's own, so what another study or ``martlet ship`` has made is not made again, and a
study that was stopped goes on where it stopped.
"""

import json
import math
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import altair
import numpy as np
import torch
from pydantic import ValidationError
from rapidfuzz.distance import LCSseq

from pipeline import distill, hidden_states, prepare, student, teacher
from pipeline.artifacts import Artifact, Store, write_json, write_text
from pipeline.errors import UserError
from pipeline.models import load_model, load_tokenizer, position_ids
from pipeline.pages import BLUE, objectives_picture, page_environment, svg
from pipeline.recipe import Distill, Recipe
from pipeline.release import change_report, read_report
from pipeline.report import TITLES as REPORT_TITLES
from pipeline.report import ranked

SCHEMA = "martlet-comparison-1"
STAGE = "measure"
VERSION = 1
OBJECTIVES = (*get_args(Distill.model_fields["objective"].annotation), "taid_without_adaptation")
"""What ``--objectives`` may name: the recipe's objectives, and TAID on the linear schedule alone."""
SCHEDULE_KEYS = ("t_start", "t_end", "alpha", "beta", "adaptive", "signal")
HEAD_TOKENS = 10
TAIL_SHARE = 0.2
"""The TAID paper's measure: mass of the ten most likely tokens, and of the 80th to 100th percentile."""
MASS_TOKENS = 2_048
PROMPTS = 32
PROMPT_TOKENS = 32
GENERATED_TOKENS = 32
MEASURES = {
    "cross_entropy": "cross-entropy",
    "kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "same_top": "same top token",
    "head_mass": "head mass",
    "tail_mass": "tail mass",
    "rouge_l": "ROUGE-L",
    "tokens_per_second": "training tok/s",
    "peak_memory_bytes": "peak memory",
}
"""The columns of the table: key and heading."""
IN_REPORT = ("kl", "reverse_kl", "cross_entropy", "same_top", "rouge_l")
"""The columns that a release's report shows."""
TITLES = {
    "kl": REPORT_TITLES["objectives"],
    "loss": "Training loss of each step, first seed. Each objective has its own axis: they measure different "
    "things",
    "t": "TAID's interpolation t of each step, first seed: 0 is the student itself, 1 the teacher",
}


@dataclass(frozen=True)
class Contender:
    """One line of the comparison.

    Attributes:
        label: its name in the table.
        objective: what is trained.
        changes: keys of the recipe's ``distill`` section that differ.
    """

    label: str
    objective: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def contenders(
    recipe: Recipe, objectives: Sequence[str], schedules: Sequence[str], tokens: int | None
) -> list[Contender]:
    """The lines of a comparison.

    Args:
        recipe: the recipe that they share.
        objectives: members of ``OBJECTIVES``.
        schedules: TAID with other settings, each ``KEY=VALUE,...`` of ``SCHEDULE_KEYS``; ``alpha=C/N`` is C
            over the number of optimizer steps.
        tokens: training tokens of a run; None: the recipe's.

    Raises:
        UserError: a name or a setting is unknown, impossible or given twice.
    """
    found = []
    for name in objectives:
        if name not in OBJECTIVES:
            raise UserError(f"--objectives: there is no {name!r}; choose from {', '.join(OBJECTIVES)}.")
        if name == "taid_without_adaptation":
            found.append(Contender("taid without adaptation", "taid", {"adaptive": False}))
        else:
            found.append(Contender(name, name))
    steps = optimizer_steps(recipe, tokens)
    for text in schedules:
        changes = schedule_changes(text, steps)
        label = "taid: " + ", ".join(part.strip().replace("=", " ") for part in text.split(","))
        try:
            Distill.model_validate({**recipe.distill.model_dump(), **changes})
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            reason = problem["msg"].removeprefix("Value error, ")
            raise UserError(f"--schedule {text}: {key + ': ' if key else ''}{reason}.") from None
        found.append(Contender(label, "taid", changes))
    labels = [entry.label for entry in found]
    if len(set(labels)) != len(labels):
        raise UserError("--objectives, --schedule: an entry is listed twice.")
    if not found:
        raise UserError("--objectives: name at least one.")
    return found


def schedule_changes(text: str, steps: int) -> dict[str, Any]:
    """``KEY=VALUE,...`` as values of the recipe's ``distill`` section.

    Raises:
        UserError: a key is none of ``SCHEDULE_KEYS``, or a part is not KEY=VALUE.
    """
    changes: dict[str, Any] = {}
    for part in text.split(","):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or key not in SCHEDULE_KEYS:
            raise UserError(
                f"--schedule {text}: {part.strip()!r} is not KEY=VALUE with a key of "
                f"{', '.join(SCHEDULE_KEYS)}."
            )
        if key == "alpha" and value.endswith("/N"):
            try:
                changes[key] = float(value.removesuffix("/N")) / steps
            except ValueError:
                raise UserError(f"--schedule {text}: {value!r} is neither a number nor C/N.") from None
        else:
            changes[key] = value
    return changes


def optimizer_steps(recipe: Recipe, tokens: int | None) -> int:
    """Optimizer steps of a run over so many training tokens, rounded to whole steps; None: the recipe's.

    Raises:
        UserError: there is less than one step in them.
    """
    section = recipe.distill
    if tokens is None:
        return math.ceil(section.epochs * steps_an_epoch(recipe))
    step_tokens = section.batch_size * section.gradient_accumulation * recipe.data.text.sequence_length
    steps = round(tokens / step_tokens)
    if steps < 1:
        raise UserError(
            f"--tokens: {tokens} tokens are less than one optimizer step of {step_tokens:,} tokens."
        )
    return steps


def steps_an_epoch(recipe: Recipe) -> int:
    """Optimizer steps of one pass over the training text, as the Trainer counts them."""
    text = recipe.data.text
    blocks = math.ceil(text.train_tokens / text.sequence_length)
    batches = math.ceil(blocks / recipe.distill.batch_size)
    return math.ceil(batches / recipe.distill.gradient_accumulation)


def run_epochs(recipe: Recipe, tokens: int | None) -> float:
    """``distill.epochs`` that makes a run of ``optimizer_steps``."""
    if tokens is None:
        return recipe.distill.epochs
    steps, an_epoch = optimizer_steps(recipe, tokens), steps_an_epoch(recipe)
    epochs = steps / an_epoch
    # The Trainer rounds up, and a division that rounded up would give it one step too many.
    while math.ceil(epochs * an_epoch) > steps:
        epochs = math.nextafter(epochs, 0)
    return epochs


def run(
    store: Store,
    recipe: Recipe,
    entries: Sequence[Contender],
    seeds: Sequence[int],
    tokens: int | None = None,
) -> dict[str, Any]:
    """Trains and measures every contender with every seed.

    Teacher, text, initial student and the teacher's hidden states are made once, with the recipe's own seed;
    a run's seed decides the order of the text, and which part of it is read where ``tokens`` is less than
    the recipe's.

    Returns:
        Everything that the page shows, as JSON values; ``comparison.json`` is this.

    Raises:
        UserError: something that the recipe names is wrong, or a training diverges.
    """
    teacher_model = teacher.run(store, recipe)
    text = prepare.run(store, recipe, teacher_model)
    initial = student.run(store, recipe, teacher_model, text)
    cache = None
    if recipe.teacher.cache != "none":
        cache = hidden_states.run(store, recipe, teacher_model, text, initial)
    trusted = recipe.teacher.trust_remote_code
    reference = read(measure(store, text, teacher_model, "teacher", trusted), "measure.json")
    before = read(measure(store, text, initial, "initial student"), "measure.json")
    epochs = run_epochs(recipe, tokens)
    results: list[dict[str, Any]] = [
        {"label": entry.label, "objective": entry.objective, "settings": dict(entry.changes), "runs": []}
        for entry in entries
    ]
    evaluation: dict[str, Any] = {}
    total = len(entries) * len(seeds)
    # Seed by seed, so that a study that is stopped has compared something.
    for number, seed in enumerate(seeds):
        for place, (entry, result) in enumerate(zip(entries, results, strict=True), start=1):
            store.report(
                f"compare: run {number * len(entries) + place} of {total}: {entry.label}, seed {seed}"
            )
            section = recipe.distill.model_validate(
                {**recipe.distill.model_dump(), **entry.changes, "epochs": epochs}
            )
            plan = recipe.model_copy(update={"seed": seed, "distill": section})
            trained = distill.run(store, plan, teacher_model, initial, text, cache, entry.objective)
            evaluation = read(trained, "evaluation.json")
            measured = read(measure(store, text, trained, entry.label), "measure.json")
            result["runs"].append(
                {
                    "seed": seed,
                    **evaluation["after"],
                    "head_mass": measured["head_mass"],
                    "tail_mass": measured["tail_mass"],
                    "rouge_l": mean_rouge_l(measured["continuations"], reference["continuations"]),
                    "tokens_per_second": evaluation["tokens_per_second"],
                    "peak_memory_bytes": evaluation["peak_memory_bytes"],
                    "seconds": evaluation["seconds"],
                    "digest": trained.digest,
                    "curve": read(trained, "curve.json"),
                }
            )
    for result in results:
        result |= summary(result["runs"])
        result["kl_difference"] = paired_difference(result["runs"], results[0]["runs"], "kl")
    return {
        "schema": SCHEMA,
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "seeds": list(seeds),
        "tokens": evaluation["tokens"],
        "steps": evaluation["steps"],
        "held_out_tokens": evaluation["held_out_tokens"],
        "mass_tokens": reference["mass_tokens"],
        "prompts": len(reference["continuations"]),
        "prompt_tokens": reference["prompt_tokens"],
        "generated_tokens": GENERATED_TOKENS,
        "teacher": {
            "cross_entropy": evaluation["teacher_cross_entropy"],
            "head_mass": reference["head_mass"],
            "tail_mass": reference["tail_mass"],
        },
        "before": {
            **evaluation["before"],
            "head_mass": before["head_mass"],
            "tail_mass": before["tail_mass"],
            "rouge_l": mean_rouge_l(before["continuations"], reference["continuations"]),
        },
        "student": read(initial, "student.json"),
        "contenders": results,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": teacher_model.manifest()["packages"],
    }


def measure(
    store: Store, text: Artifact, model: Artifact, label: str, trust_remote_code: bool = False
) -> Artifact:
    """Measures a model alone: its distribution's head and tail, and its greedy continuations.

    Args:
        store: where the result goes.
        text: packed tokens; the held-out ones are used.
        model: an artifact with a ``model/`` folder.
        label: its name in progress lines.
        trust_remote_code: run the code that the model's folder carries.

    Returns:
        ``measure.json``: ``head_mass`` and ``tail_mass``, means over ``mass_tokens`` positions of the first
        held-out blocks; ``continuations``, greedy texts after ``prompt_tokens`` tokens of held-out blocks.
    """

    def make(output: Path, work: Path) -> None:
        store.report(f"compare: measuring head, tail and continuations of {label}")
        folder = model.path / "model"
        loaded = load_model(folder, trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        blocks = np.load(text.path / "held_out.npy")
        documents = np.load(text.path / "documents_held_out.npy")
        count = max(1, MASS_TOKENS // blocks.shape[1])
        mass = probability_mass(loaded, blocks[:count], position_ids(documents[:count]))
        prompts = prompts_of(blocks, documents)
        with torch.inference_mode():
            generated = loaded.generate(
                torch.from_numpy(prompts).long(),
                attention_mask=torch.ones(prompts.shape, dtype=torch.long),
                max_new_tokens=GENERATED_TOKENS,
                do_sample=False,
            )
        continuations = tokenizer.batch_decode(generated[:, prompts.shape[1] :], skip_special_tokens=True)
        values = {**mass, "prompt_tokens": prompts.shape[1], "continuations": continuations}
        write_json(output / "measure.json", values)

    parameters = {
        "head_tokens": HEAD_TOKENS,
        "tail_share": TAIL_SHARE,
        "mass_tokens": MASS_TOKENS,
        "prompts": PROMPTS,
        "prompt_tokens": PROMPT_TOKENS,
        "generated_tokens": GENERATED_TOKENS,
    }
    return store.get_or_make(STAGE, VERSION, parameters, {"model": model, "text": text}, make)


@torch.inference_mode()
def probability_mass(model: Any, blocks: np.ndarray, positions: np.ndarray) -> dict[str, Any]:
    """Mass that a model gives to the head and to the tail of its own distribution, each position ranked anew.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` token ids.
        positions: ``[N, T]``, starting at 0 with each document; no document's first token counts.

    Returns:
        ``head_mass`` of the ``HEAD_TOKENS`` most likely tokens and ``tail_mass`` of the least likely
        ``TAIL_SHARE`` of the vocabulary, means over ``mass_tokens`` positions.
    """
    head = tail = 0.0
    count = 0
    for ids, places in zip(blocks, positions, strict=True):
        logits = model(
            input_ids=torch.from_numpy(ids).long()[None],
            position_ids=torch.from_numpy(places).long()[None],
            use_cache=False,
        ).logits[0, :-1]
        p = logits[torch.from_numpy(places[1:] != 0)].float().softmax(-1)
        head += float(p.topk(min(HEAD_TOKENS, p.shape[-1]), sorted=False).values.double().sum())
        least = int(p.shape[-1] * TAIL_SHARE)
        tail += float(p.topk(least, largest=False, sorted=False).values.double().sum())
        count += len(p)
    return {"head_mass": head / max(count, 1), "tail_mass": tail / max(count, 1), "mass_tokens": count}


def prompts_of(blocks: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Beginnings ``[P, L]`` of the first ``PROMPTS`` blocks whose beginning is of one document.

    When every beginning has a boundary, those of the first blocks as they are.
    """
    length = min(PROMPT_TOKENS, blocks.shape[1] // 2)
    whole = (documents[:, :length] == documents[:, :1]).all(axis=1)
    chosen = blocks[whole] if whole.any() else blocks
    return chosen[:PROMPTS, :length]


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, in lower case, without punctuation.

    Two texts without any word are equal: 1.
    """
    words = [re.findall(r"\w+", text.lower()) for text in (candidate, reference)]
    if not words[0] or not words[1]:
        return float(not words[0] and not words[1])
    return 2 * LCSseq.similarity(*words) / (len(words[0]) + len(words[1]))


def mean_rouge_l(candidates: Sequence[str], references: Sequence[str]) -> float:
    """Mean of ``rouge_l`` over pairs."""
    return statistics.mean(map(rouge_l, candidates, references))


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """``mean`` and ``spread`` (sample standard deviation; None for one seed) of every measure."""
    values = {key: [run[key] for run in runs if run[key] is not None] for key in MEASURES}
    return {
        "mean": {key: statistics.mean(found) if found else None for key, found in values.items()},
        "spread": {key: statistics.stdev(found) if len(found) > 1 else None for key, found in values.items()},
    }


def paired_difference(
    runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], key: str
) -> dict[str, float | None]:
    """``mean`` of a measure's difference to other runs, seed by seed, and its ``standard_error`` (None for
    one seed): what two objectives differ by beyond what they share of the seeds' noise."""
    differences = [run[key] - other[key] for run, other in zip(runs, others, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {"mean": statistics.mean(differences), "standard_error": error}


def read(artifact: Artifact, file: str) -> Any:
    """A JSON file of an artifact."""
    return json.loads((artifact.path / file).read_text(encoding="utf-8"))


def write(facts: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes ``comparison.json`` and ``comparison.html``; each appears when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", facts)
    write_text(folder / "comparison.html", render(facts))
    return folder / "comparison.json", folder / "comparison.html"


def require_same_start(recipe: Recipe, release: Path) -> None:
    """A release's report shows only comparisons that begin where its own student began.

    Raises:
        UserError: there is no release, or it was made from another teacher, text, student or seed.
    """
    made_with = read_report(release)["recipe"]
    asked = recipe.model_dump(mode="json", by_alias=True)
    for recipe_values in (made_with, asked):
        recipe_values["student"].pop("licence", None)  # changes no weight, and earlier releases have none
    for section, key in (("teacher", "model"), ("teacher", "revision"), ("data", "text")):
        if made_with[section][key] != asked[section][key]:
            raise UserError(f"--release: {release} was made with another {section}.{key} than the recipe's.")
    for key in ("student", "seed"):
        if made_with[key] != asked[key]:
            raise UserError(f"--release: {release} was made with another {key} than the recipe's.")


def show_in_report(facts: dict[str, Any], release: Path) -> None:
    """Takes a comparison, without its curves, into a release's report (key ``study``).

    Args:
        facts: result of ``run``.
        release: release folder.
    """
    keys = ("label", "objective", "settings", "mean", "spread", "kl_difference")
    study = {
        **{key: facts[key] for key in ("seeds", "tokens", "steps", "held_out_tokens", "before", "teacher")},
        "measures": {key: MEASURES[key] for key in IN_REPORT},
        "contenders": [
            {
                **{key: entry[key] for key in keys},
                "runs": [{"seed": run["seed"], "kl": run["kl"]} for run in entry["runs"]],
            }
            for entry in facts["contenders"]
        ],
    }
    change_report(release, lambda report: report.update(study=study))


def render(facts: dict[str, Any]) -> str:
    """The page of a comparison, one HTML file without script and without any request."""
    contenders = ranked(facts)
    return (
        page_environment()
        .get_template("comparison.html.jinja")
        .render(
            facts=facts,
            ranked=contenders,
            measures=MEASURES,
            charts=charts(contenders),
            titles=TITLES,
        )
    )


def charts(contenders: list[dict[str, Any]]) -> dict[str, Any]:
    """The pictures of a comparison by name, as SVG; a picture without points is left out."""
    labels = [entry["label"] for entry in contenders]
    found = {"kl": objectives_picture(contenders, TITLES["kl"])}
    points = [
        {"run": entry["label"], **{key: point.get(key) for key in ("tokens", "loss", "t")}}
        for entry in contenders
        for point in entry["runs"][0]["curve"]
    ]
    losses = [point for point in points if point["loss"] is not None]
    for name, columns in (("loss", 4), ("loss_narrow", 2)) if losses else ():
        panels = (
            altair.Chart(altair.Data(values=losses))
            .mark_line(strokeWidth=2, color=BLUE)
            .encode(
                x=altair.X("tokens:Q", title=None, axis=altair.Axis(format="~s", tickCount=3)),
                y=altair.Y(
                    "loss:Q", title=None, scale=altair.Scale(zero=False), axis=altair.Axis(tickCount=3)
                ),
            )
            .properties(width=150 if columns == 4 else 130, height=80)
            .facet(
                facet=altair.Facet(
                    "run:N",
                    sort=labels,
                    title=None,
                    header=altair.Header(labelColor="currentColor", labelFontSize=12),
                ),
                columns=columns,
            )
            .resolve_scale(y="independent")
        )
        found[name] = svg(panels, TITLES["loss"])
    moving = [point for point in points if point["t"] is not None]
    if moving:
        names = [label for label in labels if any(point["run"] == label for point in moving)]
        dashes = [[1, 0], [5, 3], [1, 3], [8, 3], [8, 3, 1, 3], [3, 2], [10, 6], [2, 6]]
        encoding: dict[str, Any] = {
            "scale": altair.Scale(domain=names, range=[dashes[i % len(dashes)] for i in range(len(names))]),
            "legend": altair.Legend(title=None, orient="top", columns=1, labelLimit=320, symbolSize=300),
        }
        curve = (
            altair.Chart(altair.Data(values=moving))
            .mark_line(strokeWidth=2)
            .encode(
                x=altair.X("tokens:Q", title="training tokens", axis=altair.Axis(format="~s", tickCount=5)),
                y=altair.Y("t:Q", scale=altair.Scale(domain=[0, 1]), axis=altair.Axis(tickCount=5)),
                color=altair.Color(
                    "run:N",
                    scale=altair.Scale(domain=names, scheme="category10"),
                    legend=encoding["legend"],
                ),
                strokeDash=altair.StrokeDash("run:N", **encoding),
            )
            .properties(width=320, height=230)
        )
        found["t"] = svg(curve, TITLES["t"])
    return found
