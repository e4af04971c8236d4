"""The report: ``report.json`` and a page that needs nothing but itself."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import altair
import jinja2
import vl_convert
from markupsafe import Markup

from pipeline.artifacts import Artifact
from pipeline.recipe import Recipe

SCHEMA = "martlet-report-1"
FORMATS = ("gguf", "mlc", "onnx")
BLUE, ORANGE, GREY = "#3b82c4", "#d97a2b", "#808890"
"""Readable on white and on black."""


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
        "distillation": distillation("distill"),
        "control": distillation("control") if "control" in artifacts else None,
        "instruct": {**read("instruct", "evaluation.json"), "curve": read("instruct", "curve.json")},
        "conversations": read("instruct", "conversations.json"),
        "fidelity": [entry for name in formats for entry in read(f"fidelity_{name}", "fidelity.json")],
        "device": [entry for name in formats for entry in read(f"device_{name}", "device.json")],
        "tensor_types": {
            Path(entry["path"]).name: entry["tensor_types"] for entry in files if entry["tensor_types"]
        },
        "stages": stage_times,
        "lineage": {
            role: {"stage": artifact.stage, "key": artifact.key, "digest": artifact.digest}
            for role, artifact in artifacts.items()
        },
        "packages": {**artifacts["instruct"].manifest()["packages"], "martlet": version("martlet")},
    }


def render(facts: dict[str, Any]) -> str:
    """The page of a report, one HTML file without script and without any request."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"size": readable_size, "number": readable_number}
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        shipped=all(entry["passed"] for entry in facts["fidelity"]),
        charts={name: Markup(svg) for name, svg in charts(facts).items()},
    )


def readable_size(count: float) -> str:
    """Bytes as people say them, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def readable_number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, never in exponents a reader must decode."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e" in text or abs(value) >= 1000 else text


def charts(facts: dict[str, Any]) -> dict[str, str]:
    """The report's pictures by name, as SVG."""
    curves = [
        {**point, "run": label}
        for label, part in (
            (facts["distillation"]["objective"], facts["distillation"]),
            ("cross_entropy (control)", facts["control"]),
        )
        if part
        for point in part["curve"]
    ]
    runs = list(dict.fromkeys(point["run"] for point in curves))
    color = altair.Color(
        "run:N",
        scale=altair.Scale(domain=runs, range=[BLUE, ORANGE][: len(runs)]),
        legend=altair.Legend(title=None, orient="top"),
    )

    def line(field: str, title: str, points: list[dict[str, Any]]) -> altair.Chart:
        values = [
            {"tokens": point["tokens"], field: point[field], "run": point["run"]}
            for point in points
            if point.get(field) is not None
        ]
        return (
            altair.Chart(altair.Data(values=values))
            .mark_line(strokeWidth=2)
            .encode(
                x=altair.X("tokens:Q", title="training tokens", axis=altair.Axis(format="~s")),
                y=altair.Y(f"{field}:Q", title=title, scale=altair.Scale(zero=False)),
                color=color,
            )
        )

    speed = {entry["file"]: entry["decode_tokens_per_s"] for entry in facts["device"]}
    points = [
        {
            "label": f"{entry['format']} {entry['quantization']}",
            "megabytes": entry["bytes"] / 1e6,
            "mean_kl": max(entry.get("mean_kl") or 0, 1e-8),
            "speed": speed.get(entry["file"]),
        }
        for entry in facts["fidelity"]
    ]
    base = altair.Chart(altair.Data(values=points))

    def scatter(y: altair.Y) -> altair.LayerChart:
        x = altair.X("megabytes:Q", title="size in MB", scale=altair.Scale(zero=False, padding=40))
        dots = base.mark_circle(size=90, color=BLUE, opacity=1).encode(x=x, y=y)
        labels = base.mark_text(align="left", dx=8, dy=-6, color=GREY).encode(x=x, y=y, text="label:N")
        return dots + labels

    pictures = {
        "loss": line("loss", "training loss", curves),
        "held_out_kl": line("held_out_kl", "held-out KL to the teacher", curves),
        "fidelity": scatter(
            altair.Y("mean_kl:Q", title="mean KL to the model", scale=altair.Scale(type="log"))
        ),
        "speed": scatter(altair.Y("speed:Q", title="decode tok/s")),
    }
    if any(point.get("t") is not None for point in curves):
        pictures["t"] = line("t", "interpolation t", curves)
    return {name: _svg(chart) for name, chart in pictures.items()}


def _svg(chart: altair.Chart | altair.LayerChart) -> str:
    styled = (
        chart.properties(width=420, height=240, background="transparent")
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=GREY, titleColor=GREY, domainColor=GREY, tickColor=GREY, gridColor="#80889040"
        )
        .configure_legend(labelColor=GREY)
    )
    return vl_convert.vegalite_to_svg(styled.to_dict())
