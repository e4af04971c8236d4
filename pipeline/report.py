"""The report: ``report.json`` and a page that needs nothing but itself."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import altair
import yaml
from markupsafe import Markup

from pipeline.artifacts import Artifact
from pipeline.energy import WATTS_HIGH, WATTS_LOW
from pipeline.licences import result_licence, unjudged, unjudged_sentence
from pipeline.pages import (
    BLUE,
    FORMATS,
    ORANGE,
    SMALLEST_KL,
    by_format,
    kl_axis,
    names_beside,
    objectives_picture,
    page_environment,
    readable_number,
    readable_percent,
    readable_size,
    size_axis,
    svg,
)
from pipeline.recipe import Recipe

SCHEMA = "martlet-report-1"
TITLES = {
    "loss": "Training loss of each step. Objectives measure different things: compare shapes, not heights",
    "held_out_kl": "KL to the teacher during training, on a part of the held-out text",
    "t": "TAID's interpolation t of each step: 0 is the student itself, 1 the teacher",
    "objectives": "KL(teacher ‖ student) on held-out text after training: a dot for each seed, a bar at the "
    "mean",
    "fidelity": "Mean KL to the model against size. Lower and further left is better; below 1e-5 it is drawn "
    "at 1e-5",
    "speed": "Decode speed against size. Higher and further left is better",
    "pareto": "Size, mean KL and decode speed: the larger a mark, the faster the file. The line joins those "
    "that no other beats in both size and KL",
}
"""What each picture shows: its caption, and the beginning of its text for screen readers."""


def collect(
    recipe: Recipe, artifacts: Mapping[str, Artifact], stage_times: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything the report says, as JSON values; ``report.json`` is this."""

    def read(role: str, file: str) -> Any:
        return json.loads((artifacts[role].path / file).read_text(encoding="utf-8"))

    def distillation(role: str) -> dict[str, Any]:
        measured = read(role, "evaluation.json")
        return {
            "objective": measured["objective"],
            "tokens": measured["tokens"],
            "steps": measured["steps"],
            "seconds": measured["seconds"],
            "tokens_per_second": measured["tokens_per_second"],
            "curve": read(role, "curve.json"),
            "held_out": {
                "tokens": measured["held_out_tokens"],
                "teacher_cross_entropy": measured["teacher_cross_entropy"],
                "student_cross_entropy_before": measured["before"]["cross_entropy"],
                "student_cross_entropy_after": measured["after"]["cross_entropy"],
                "kl_before": measured["before"]["kl"],
                "kl_after": measured["after"]["kl"],
                "reverse_kl_before": measured["before"]["reverse_kl"],
                "reverse_kl_after": measured["after"]["reverse_kl"],
                "same_top_before": measured["before"]["same_top"],
                "same_top_after": measured["after"]["same_top"],
            },
        }

    formats = [name for name in FORMATS if name in artifacts]
    files = [entry for name in formats for entry in read(name, "files.json")]
    return {
        "schema": SCHEMA,
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "student": read("student", "student.json"),
        "data": {"text": read("text", "statistics.json"), "chats": read("chats", "statistics.json")},
        "distillation": {
            **distillation("distill"),
            "control": distillation("control") if "control" in artifacts else None,
        },
        "instruct": {**read("instruct", "evaluation.json"), "curve": read("instruct", "curve.json")},
        "conversations": read("instruct", "conversations.json"),
        "fidelity": [entry for name in formats for entry in read(f"fidelity_{name}", "fidelity.json")],
        "importance_matrix": read("importance_matrix", "importance.json")
        if "importance_matrix" in artifacts
        else None,
        "merge": read("instruct", "evaluation.json")["merge"],
        "device": [entry for name in formats for entry in read(f"device_{name}", "device.json")],
        # Filled later, by martlet phone, compare and evaluate.
        "phones": [],
        "study": None,
        "evaluations": [],
        "tensor_types": {
            Path(entry["path"]).name: entry["tensor_types"] for entry in files if entry["tensor_types"]
        },
        "tensor_kinds": {
            Path(entry["path"]).name: entry["tensor_kinds"] for entry in files if entry.get("tensor_kinds")
        },
        "stages": stage_times,
        "machine": platform.machine(),
        "licences": {"result": result_licence(recipe), "not_judged": unjudged(recipe)},
        "lineage": lineage(artifacts),
        "packages": packages(artifacts),
    }


def lineage(artifacts: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    """What each artifact is and what it was made from: {role: {stage, key, digest, made_from, sources}}.

    ``made_from`` lists roles, ``sources`` the SHA-256 of files outside the store by name.
    """
    roles = {(artifact.stage, artifact.key): role for role, artifact in artifacts.items()}
    entries = {}
    for role, artifact in artifacts.items():
        manifest = artifact.manifest()
        inputs = manifest["input_artifacts"].values()
        parameters = manifest["parameters"]
        sources = parameters.get("sources") or parameters.get("files") or {}
        entries[role] = {
            "stage": artifact.stage,
            "key": artifact.key,
            "digest": artifact.digest,
            "made_from": [roles.get((entry["stage"], entry["key"]), entry["stage"]) for entry in inputs],
            "sources": sources if isinstance(sources, dict) else {},
        }
    return entries


def packages(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Versions of what made the tuned student, and of martlet."""
    return {**artifacts["instruct"].manifest()["packages"], "martlet": version("martlet")}


def render(facts: dict[str, Any]) -> str:
    """The page of a report, one HTML file without script and without any request."""
    study = facts.get("study")
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            facts=facts,
            study=study,
            ranked=ranked(study) if study else [],
            budgets=budgets(facts),
            failures=[sentence for entry in facts["fidelity"] for sentence in entry["failures"]],
            notes=notes(facts),
            reasons=reasons(facts),
            talks=talks(facts),
            charts=charts(facts),
            titles=TITLES,
            watts=(WATTS_LOW, WATTS_HIGH),
            recipe_yaml=yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True),
        )
    )


def notes(facts: dict[str, Any]) -> list[str]:
    """Sentences that someone who decides about shipping should read, beside the gates."""
    sentences = []
    # Reports of earlier releases, which are drawn again when something is measured, lack it.
    if not_judged := facts.get("licences", {}).get("not_judged"):
        sentences.append(unjudged_sentence(not_judged))
    held_out = facts["distillation"]["held_out"]
    control = facts["distillation"]["control"]
    if held_out["kl_after"] >= held_out["kl_before"]:
        sentences.append("Distillation did not bring the student nearer to the teacher.")
    if control and control["held_out"]["kl_after"] <= held_out["kl_after"]:
        sentences.append("Plain cross-entropy on the same tokens came as near to the teacher, or nearer.")
    if (
        facts["instruct"]["after"]["assistant_cross_entropy"]
        >= (facts["instruct"]["before"]["assistant_cross_entropy"])
    ):
        sentences.append("Instruction tuning did not lower the cross-entropy on held-out answers.")
    worse = [
        entry["file"]
        for entry in facts["fidelity"]
        if (without := entry["without_importance_matrix"]) is not None
        and None not in (without["mean_kl"], entry["mean_kl"])
        and without["mean_kl"] < entry["mean_kl"]
    ]
    if worse:
        sentences.append(f"The importance matrix made {', '.join(worse)} worse, not better.")
    unreliable = [entry["file"] for entry in facts["device"] if not entry["reliable"]]
    if unreliable:
        sentences.append(
            f"The machine was busy while {len(unreliable)} of {len(facts['device'])} files were timed: "
            "their speeds are not to be trusted."
        )
    outside: dict[str, list[str]] = {}
    for entry in facts["device"]:
        for found in entry["profiles"]:
            if found["status"] == "failed":
                outside.setdefault(found["profile"], []).append(f"{entry['format']} {entry['quantization']}")
    sentences.extend(f"{', '.join(files)} failed within {name}." for name, files in outside.items())
    sentences.extend(
        f"{entry['file']} did not run as it was asked to ({'; '.join(entry['backend']['fallbacks'])}): its "
        "speed is that of the fallback."
        for entry in facts["device"]
        if entry["backend"]["fallbacks"]
    )
    return sentences


def reasons(facts: dict[str, Any]) -> list[str]:
    """Why the verdict is what it is, beyond the gates that failed: the file that comes closest to its limit,
    and what distillation did."""
    sentences = []
    limits = facts["recipe"]["validate"]
    shares = []
    for entry in facts["fidelity"]:
        threshold = limits["thresholds"].get(entry["quantization"], limits["default"])["mean_kl"]
        if entry["mean_kl"] is not None:
            shares.append((entry["mean_kl"] / threshold, threshold, entry))
    if shares:
        share, threshold, entry = max(shares, key=lambda found: found[0])
        sentences.append(
            f"Nearest to its limit is {entry['format']} {entry['quantization']}: mean KL "
            f"{readable_number(entry['mean_kl'])} nats of at most {readable_number(threshold)} "
            f"({readable_percent(share, 0)}), the same most likely token in "
            f"{readable_percent(entry['same_top'])} of the positions."
        )
    held_out = facts["distillation"]["held_out"]
    control = facts["distillation"]["control"]
    left = held_out["kl_after"] / held_out["kl_before"]
    sentences.append(
        f"Distillation left {readable_percent(left, 0)} of the student's distance to the teacher"
        + (
            f", plain cross-entropy on the same tokens "
            f"{readable_percent(control['held_out']['kl_after'] / control['held_out']['kl_before'], 0)}."
            if control
            else "."
        )
    )
    return sentences


def talks(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversations with every file's answer: [{prompt, answers: [(who, text)]}]. Files that say the
    same are put together, and those that say what the model says stand with it."""
    pages = []
    for number, talk in enumerate(facts["conversations"]):
        said: dict[str, list[str]] = {talk["after"]: ["student after"]}
        for entry in facts["fidelity"]:
            answers = entry.get("said")
            if answers is not None and number < len(answers):
                said.setdefault(answers[number], []).append(f"{entry['format']} {entry['quantization']}")
        answers = [("teacher", talk["teacher"]), ("student before instruction tuning", talk["before"])]
        answers += [(", ".join(who), text) for text, who in said.items()]
        pages.append({"prompt": talk["prompt"], "answers": answers})
    return pages


def ranked(study: dict[str, Any]) -> list[dict[str, Any]]:
    """The contenders of a comparison, the nearest to the teacher first."""
    return sorted(study["contenders"], key=lambda entry: entry["mean"]["kl"])


def budgets(facts: dict[str, Any]) -> list[tuple[str, str, int | None, float | None]]:
    """What the release was made with: [(stage, what it had, optimizer steps, seconds)]; None where a stage
    has no steps, or its seconds were not kept."""
    seconds = {entry["name"]: entry["seconds"] for entry in facts["stages"]}
    recipe, distillation = facts["recipe"], facts["distillation"]
    runs = [("distill", distillation)]
    runs += [("control", distillation["control"])] if distillation["control"] else []
    rows = [
        (f"{role}, {run['objective']}", f"{run['tokens']:,} tokens", run["steps"], seconds.get(role))
        for role, run in runs
    ]
    if recipe["pretrain"]:
        rows.append(("pretrain", f"{recipe['pretrain']['tokens']:,} tokens", None, seconds.get("pretrain")))
    conversations = facts["data"]["chats"]["splits"]["train"]["conversations"]
    epochs = recipe["instruct"]["epochs"]
    rows.append(
        (
            "instruct",
            f"{conversations:,} conversations" + (f", {epochs:g} times" if epochs != 1 else ""),
            len(facts["instruct"]["curve"]),
            seconds.get("instruct"),
        )
    )
    for kind, work in (
        ("fidelity", f"{recipe['validate']['tokens']:,} held-out tokens a file"),
        ("device", f"{recipe['bench']['repetitions']} repetitions a file"),
    ):
        spent = [value for role, value in seconds.items() if role.startswith(f"{kind}_")]
        rows.append(("gates" if kind == "fidelity" else "measurements", work, None, sum(spent) or None))
    return [*rows, ("all stages", "", None, sum(seconds.values()))]


def charts(facts: dict[str, Any]) -> dict[str, Markup]:
    """The report's pictures by name, as SVG to be put into the page; a picture without points is left out."""
    distillation = facts["distillation"]
    runs = {distillation["objective"]: distillation["curve"]}
    if distillation["control"]:
        runs["control: cross-entropy only"] = distillation["control"]["curve"]
    found = {}
    for field, axis in (("loss", "training loss, nats"), ("held_out_kl", "held-out KL, nats"), ("t", "t")):
        lines = {
            run: [point for point in points if point.get(field) is not None] for run, points in runs.items()
        }
        lines = {run: points for run, points in lines.items() if points}
        if lines:
            told = "; ".join(
                f"{run} from {readable_number(points[0][field])} to {readable_number(points[-1][field])}"
                for run, points in lines.items()
            )
            found[field] = svg(_curves(lines, field, axis), f"{TITLES[field]}. {told}")
    if facts.get("study"):
        contenders = ranked(facts["study"])
        told = "; ".join(f"{entry['label']} {readable_number(entry['mean']['kl'])}" for entry in contenders)
        found["objectives"] = objectives_picture(contenders, f"{TITLES['objectives']}. Means: {told}")
    speed = {entry["file"]: entry["decode_tokens_per_s"] for entry in facts["device"]}
    files = [
        {
            "quantization": entry["quantization"],
            "format": entry["format"],
            "megabytes": entry["bytes"] / 1e6,
            "mean_kl": None if entry["mean_kl"] is None else max(entry["mean_kl"], SMALLEST_KL),
            "speed": speed.get(entry["file"]),
        }
        for entry in facts["fidelity"]
    ]
    judged = [file for file in files if file["mean_kl"] is not None]
    timed = [file for file in files if file["speed"] is not None]
    if judged:
        found["fidelity"] = svg(_files(judged, "mean_kl", kl_axis(14)), _told("fidelity", judged, "mean_kl"))
    if timed:
        speeds = altair.Y("speed:Q", title="decode, tokens/s", axis=altair.Axis(tickCount=5))
        found["speed"] = svg(_files(timed, "speed", speeds), _told("speed", timed, "speed"))
    both = [file for file in judged if file in timed]
    if len(both) > 1:
        told = _told("pareto", both, "mean_kl", "speed")
        found["pareto"] = svg(_pareto(both, wide=True), told)
        found["pareto_narrow"] = svg(_pareto(both, wide=False), told)
    return found


def _told(picture: str, files: list[dict[str, Any]], *fields: str) -> str:
    """A picture of files in words."""
    words = {"mean_kl": "KL {}", "speed": "{} tokens/s"}
    entries = (
        f"{file['format']} {file['quantization']}: {readable_size(file['megabytes'] * 1e6)}, "
        + ", ".join(words[field].format(readable_number(file[field])) for field in fields)
        for file in files
    )
    return f"{TITLES[picture]}. {'; '.join(entries)}"


def _curves(lines: dict[str, list[dict[str, Any]]], field: str, title: str) -> altair.Chart:
    """A value over the training tokens, one line a run, told apart by colour and by dashes."""
    values = [
        {"tokens": point["tokens"], field: point[field], "run": run}
        for run, points in lines.items()
        for point in points
    ]
    runs = list(lines)
    legend = altair.Legend(title=None, orient="top", symbolStrokeWidth=2.5, labelLimit=300)
    # A line of one point would be invisible.
    lonely = len(values) < 2 * len(runs)
    span = altair.Scale(domain=[0, 1]) if field == "t" else altair.Scale(zero=False)
    return (
        altair.Chart(altair.Data(values=values))
        .mark_line(strokeWidth=2, point=lonely)
        .encode(
            x=altair.X("tokens:Q", title="training tokens", axis=altair.Axis(format="~s", tickCount=5)),
            y=altair.Y(f"{field}:Q", title=title, scale=span, axis=altair.Axis(tickCount=5)),
            color=altair.Color(
                "run:N", scale=altair.Scale(domain=runs, range=[BLUE, ORANGE][: len(runs)]), legend=legend
            ),
            strokeDash=altair.StrokeDash(
                "run:N",
                scale=altair.Scale(domain=runs, range=[[1, 0], [5, 3]][: len(runs)]),
                legend=legend,
            ),
        )
        .properties(width=300, height=210)
    )


def _files(files: list[dict[str, Any]], field: str, y: altair.Y) -> altair.LayerChart:
    """A value of each exported file over its size, told apart by colour, shape and name."""
    values = _sides(files, field)
    base = altair.Chart(altair.Data(values=values)).encode(x=size_axis(68), y=y)
    dots = base.mark_point(size=80, filled=True, opacity=1).encode(**by_format(values))
    layers = altair.LayerChart(layer=[dots, *names_beside(base, "quantization", 9)])
    return layers.properties(width=300, height=270)


def _sides(files: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """The files with ``left``: names of neighbours in a field stand on opposite sides of their marks."""
    ordered = sorted(files, key=lambda entry: entry[field])
    return [{**entry, "left": rank % 2 == 1} for rank, entry in enumerate(ordered)]


def pareto_front(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which no other is both smaller and nearer to the model, the smallest first."""
    front: list[dict[str, Any]] = []
    for entry in sorted(files, key=lambda file: (file["megabytes"], file["mean_kl"])):
        if not front or entry["mean_kl"] < front[-1]["mean_kl"]:
            front.append(entry)
    return front


def _pareto(files: list[dict[str, Any]], wide: bool) -> altair.LayerChart:
    """Mean KL over size, marks as large as the file is fast, with the line of the best.

    Args:
        files: with ``mean_kl`` and ``speed``.
        wide: with the speeds beside the names, for which a phone has no room.
    """
    values = [
        {
            **entry,
            "label": entry["quantization"] + (f", {readable_number(entry['speed'])} tok/s" if wide else ""),
        }
        for entry in _sides(files, "mean_kl")
    ]
    x, y = size_axis(150 if wide else 72), kl_axis(24)
    line = (
        altair.Chart(altair.Data(values=pareto_front(files)))
        .mark_line(color="currentColor", strokeDash=[4, 3], strokeWidth=1.5, opacity=0.6)
        .encode(x=x, y=y)
    )
    base = altair.Chart(altair.Data(values=values)).encode(x=x, y=y)
    fastest = max(entry["speed"] for entry in files)
    marks = base.mark_point(filled=True, opacity=0.85).encode(
        size=altair.Size(
            "speed:Q", scale=altair.Scale(domain=[0, fastest], range=[20, 300], zero=True), legend=None
        ),
        **by_format(values),
    )
    layers = altair.LayerChart(layer=[line, marks, *names_beside(base, "label", 13)])
    return layers.properties(width=620 if wide else 300, height=360 if wide else 300)
