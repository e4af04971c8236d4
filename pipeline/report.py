"""The report: ``report.json`` and a page that needs nothing but itself."""

import html
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import altair
import jinja2
import vl_convert
import yaml
from markupsafe import Markup

from pipeline.artifacts import Artifact
from pipeline.recipe import Recipe

SCHEMA = "martlet-report-1"
FORMATS = ("gguf", "mlc", "onnx")
BLUE, ORANGE, TEAL = "#3b82c4", "#c96a1e", "#1f9483"
"""At least three to one against the page's paper, light and dark."""
SMALLEST_KL = 1e-5
TITLES = {
    "loss": "Training loss of each step. Objectives measure different things: compare shapes, not heights",
    "held_out_kl": "KL to the teacher during training, on a part of the held-out text",
    "t": "TAID's interpolation t of each step: 0 is the student itself, 1 the teacher",
    "fidelity": "Mean KL to the model against size. Lower and further left is better; below 1e-5 it is drawn "
    "at 1e-5",
    "speed": "Decode speed against size. Higher and further left is better",
    "pareto": "Size, mean KL and decode speed: the larger a mark, the faster the file. The line joins those "
    "that no other beats in both size and KL",
}
"""What each picture shows: its caption and its text for screen readers."""


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
        # Filled by martlet phone, when devices send what they measured.
        "phones": [],
        "tensor_types": {
            Path(entry["path"]).name: entry["tensor_types"] for entry in files if entry["tensor_types"]
        },
        "tensor_kinds": {
            Path(entry["path"]).name: entry["tensor_kinds"] for entry in files if entry.get("tensor_kinds")
        },
        "stages": stage_times,
        "machine": platform.machine(),
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
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            facts=facts,
            failures=[sentence for entry in facts["fidelity"] for sentence in entry["failures"]],
            notes=notes(facts),
            reasons=reasons(facts),
            talks=talks(facts),
            charts=charts(facts),
            titles=TITLES,
            recipe_yaml=yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True),
        )
    )


def page_environment() -> jinja2.Environment:
    """Templates of the project's pages, with the filters ``device``, ``facts``, ``size``, ``number`` and
    ``percent``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "device": readable_device,
        "facts": readable_facts,
        "size": readable_size,
        "number": readable_number,
        "percent": readable_percent,
    }
    return environment


def notes(facts: dict[str, Any]) -> list[str]:
    """Sentences that someone who decides about shipping should read, beside the gates."""
    sentences = []
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
    sentences.extend(
        f"{entry['file']} did not run as it was asked to ({'; '.join(entry['backend']['fallbacks'])}): its "
        "speed is that of the fallback."
        for entry in facts["device"]
        if entry["backend"]["fallbacks"]
    )
    return sentences


def readable_facts(facts: dict[str, Any]) -> str:
    """What a runtime was asked for, or has in use, in one line."""

    def readable(value: Any) -> str:
        return ", ".join(value) if isinstance(value, list) else str(value)

    return "; ".join(f"{name.replace('_', ' ')}: {readable(value)}" for name, value in facts.items() if value)


def readable_device(device: dict[str, Any]) -> str:
    """A device that sent measurements, in a few words of its own."""
    system = " ".join(part for part in (device["platform"], device["platform_version"]) if part)
    words = [device["model"], system, f"{device['processors']} processors" if device["processors"] else None]
    return ", ".join(word for word in words if word) or device["user_agent"] or "a device that tells nothing"


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


def readable_percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def readable_size(count: float) -> str:
    """Bytes as people say them, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def readable_number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; what is small enough for an exponent has two of them."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    text = f"{value:#.{digits}g}"
    return f"{value:,.0f}" if "e" in text or abs(value) >= 1000 else text.rstrip(".")


def charts(facts: dict[str, Any]) -> dict[str, Markup]:
    """The report's pictures by name, as SVG to be put into the page; a picture without points is left out."""
    distillation = facts["distillation"]
    runs = {distillation["objective"]: distillation["curve"]}
    if distillation["control"]:
        runs["control: cross-entropy only"] = distillation["control"]["curve"]
    curve = [{**point, "run": run} for run, points in runs.items() for point in points]
    pictures: dict[str, altair.Chart | altair.LayerChart | None] = {
        "loss": _curves(curve, list(runs), "loss", "training loss, nats"),
        "held_out_kl": _curves(curve, list(runs), "held_out_kl", "held-out KL, nats"),
        "t": _curves(curve, list(runs), "t", "t"),
    }
    speed = {entry["file"]: entry["decode_tokens_per_s"] for entry in facts["device"]}
    files = [
        {
            "quantization": entry["quantization"],
            "format": entry["format"],
            "megabytes": entry["bytes"] / 1e6,
            # The axis is logarithmic; what is below this is rounding, not quantization.
            "mean_kl": None if entry["mean_kl"] is None else max(entry["mean_kl"], SMALLEST_KL),
            "speed": speed.get(entry["file"]),
        }
        for entry in facts["fidelity"]
    ]
    pictures["fidelity"] = _files(files, "mean_kl", "mean KL to the model, nats", "log")
    pictures["speed"] = _files(files, "speed", "decode, tokens/s", "linear")
    pictures["pareto"] = _pareto([file for file in files if file["mean_kl"] and file["speed"]])
    return {name: svg(chart, TITLES[name]) for name, chart in pictures.items() if chart is not None}


def _curves(points: list[dict[str, Any]], runs: list[str], field: str, title: str) -> altair.Chart | None:
    """A value over the training tokens, one line a run, told apart by colour and by dashes."""
    values = [
        {"tokens": point["tokens"], field: point[field], "run": point["run"]}
        for point in points
        if point.get(field) is not None
    ]
    if not values:
        return None
    runs = [run for run in runs if any(value["run"] == run for value in values)]
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
        .properties(width=390, height=230)
    )


def _files(
    files: list[dict[str, Any]], field: str, title: str, scale: Literal["log", "linear"]
) -> altair.LayerChart | None:
    """A value of each exported file over its size, told apart by colour, shape and name."""
    # Neighbours have their names on opposite sides, so that these do not cover each other.
    ranked = sorted((entry for entry in files if entry[field] is not None), key=lambda entry: entry[field])
    values = [{**entry, "left": rank % 2 == 1} for rank, entry in enumerate(ranked)]
    if not values:
        return None
    formats = [name for name in FORMATS if any(entry["format"] == name for entry in values)]
    colours = dict(zip(FORMATS, (BLUE, TEAL, ORANGE), strict=True))
    shapes = dict(zip(FORMATS, ("circle", "square", "triangle-up"), strict=True))
    legend = altair.Legend(title=None, orient="top")
    axis = altair.Axis(tickCount=5, format=".0e") if scale == "log" else altair.Axis(tickCount=5)
    vertical = altair.Scale(type=scale, padding=14) if scale == "log" else altair.Scale(zero=True)
    base = altair.Chart(altair.Data(values=values)).encode(
        x=altair.X(
            "megabytes:Q",
            title="size, MB",
            scale=altair.Scale(type="log", nice=False, padding=56),
            axis=altair.Axis(tickCount=6, format=",.3~r"),
        ),
        y=altair.Y(f"{field}:Q", title=title, scale=vertical, axis=axis),
    )
    dots = base.mark_point(size=80, filled=True, opacity=1).encode(
        color=altair.Color(
            "format:N",
            scale=altair.Scale(domain=formats, range=[colours[name] for name in formats]),
            legend=legend,
        ),
        shape=altair.Shape(
            "format:N",
            scale=altair.Scale(domain=formats, range=[shapes[name] for name in formats]),
            legend=legend,
        ),
    )
    left = base.transform_filter("datum.left").mark_text(
        align="right", dx=-9, fontSize=12, color="currentColor"
    )
    right = base.transform_filter("!datum.left").mark_text(
        align="left", dx=9, fontSize=12, color="currentColor"
    )
    name = altair.Text("quantization:N")
    pictures = altair.LayerChart(layer=[dots, left.encode(text=name), right.encode(text=name)])
    return pictures.properties(width=390, height=290)


def pareto_front(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which no other is both smaller and nearer to the model, the smallest first."""
    front: list[dict[str, Any]] = []
    for entry in sorted(files, key=lambda file: (file["megabytes"], file["mean_kl"])):
        if not front or entry["mean_kl"] < front[-1]["mean_kl"]:
            front.append(entry)
    return front


def _pareto(files: list[dict[str, Any]]) -> altair.LayerChart | None:
    """Mean KL over size, marks as large as the file is fast, with the line of the best."""
    if len(files) < 2:
        return None
    x = altair.X(
        "megabytes:Q",
        title="size, MB",
        scale=altair.Scale(type="log", nice=False, padding=125),
        axis=altair.Axis(tickCount=6, format=",.3~r"),
    )
    y = altair.Y(
        "mean_kl:Q",
        title="mean KL to the model, nats",
        scale=altair.Scale(type="log", padding=24),
        axis=altair.Axis(tickCount=5, format=".0e"),
    )
    formats = [name for name in FORMATS if any(entry["format"] == name for entry in files)]
    colours = dict(zip(FORMATS, (BLUE, TEAL, ORANGE), strict=True))
    line = (
        altair.Chart(altair.Data(values=pareto_front(files)))
        .mark_line(color="currentColor", strokeDash=[4, 3], strokeWidth=1.5, opacity=0.6)
        .encode(x=x, y=y)
    )
    ranked = sorted(files, key=lambda entry: entry["mean_kl"])
    values = [
        {
            **entry,
            "label": f"{entry['quantization']}, {readable_number(entry['speed'])} tok/s",
            "left": rank % 2 == 1,
        }
        for rank, entry in enumerate(ranked)
    ]
    base = altair.Chart(altair.Data(values=values)).encode(x=x, y=y)
    fastest = max(entry["speed"] for entry in files)
    marks = base.mark_circle(opacity=0.8).encode(
        size=altair.Size(
            "speed:Q", scale=altair.Scale(domain=[0, fastest], range=[20, 300], zero=True), legend=None
        ),
        color=altair.Color(
            "format:N",
            scale=altair.Scale(domain=formats, range=[colours[name] for name in formats]),
            legend=altair.Legend(title=None, orient="top"),
        ),
    )
    left = base.transform_filter("datum.left").mark_text(
        align="right", dx=-13, fontSize=12, color="currentColor"
    )
    right = base.transform_filter("!datum.left").mark_text(
        align="left", dx=13, fontSize=12, color="currentColor"
    )
    name = altair.Text("label:N")
    layers = altair.LayerChart(layer=[line, marks, left.encode(text=name), right.encode(text=name)])
    return layers.properties(width=620, height=360)


def svg(chart: altair.Chart | altair.LayerChart | altair.FacetChart, title: str) -> Markup:
    """The SVG of a chart. Text and axes take the colour of the page, so that they suit light and dark."""
    ink = "currentColor"
    styled = chart.properties(background="transparent").configure(
        font="system-ui, sans-serif",
        view=altair.ViewConfig(stroke=None),
        axis=altair.AxisConfig(
            labelColor=ink,
            titleColor=ink,
            domainColor=ink,
            tickColor=ink,
            gridColor=ink,
            gridOpacity=0.14,
            domainOpacity=0.5,
            tickOpacity=0.5,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=8,
        ),
        legend=altair.LegendConfig(labelColor=ink, labelFontSize=12, columnPadding=16),
    )
    picture = vl_convert.vegalite_to_svg(styled.to_dict())
    label = html.escape(title, quote=True)
    # As one picture with a name; the hundreds of marks inside would only be noise to a screen reader.
    opening, rest = picture.split(">", 1)
    return Markup(f'{opening} role="img" aria-label="{label}"><title>{label}</title>{rest}')
