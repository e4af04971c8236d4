"""Releases side by side: what differs in recipe and inputs, quality, size and speed."""

import json
from pathlib import Path
from typing import Any

import altair
from markupsafe import Markup

from pipeline.artifacts import write_json
from pipeline.errors import UserError
from pipeline.pages import (
    BLUE,
    ORANGE,
    SMALLEST_KL,
    TEAL,
    by_kind,
    kl_axis,
    names_beside,
    page_environment,
    size_axis,
    svg,
)
from pipeline.report import SCHEMA

COMPARISON_SCHEMA = "martlet-release-comparison-1"
PAGE = "comparison.html"
FACTS = "comparison.json"
TITLE = "Mean KL to its own model against size of every file. Lower and further left is better"

COLOURS, SHAPES = (BLUE, ORANGE, TEAL), ("circle", "diamond", "square", "triangle-up", "cross")
"""Of the releases' marks, taken in turn: no two of the first fifteen have both in common."""

MEASURES = {
    "parameters": "parameters",
    "kl_before": "KL to the teacher before distillation",
    "kl_after": "KL to the teacher after distillation",
    "cross_entropy_after": "cross-entropy after distillation",
    "tokens": "distillation tokens",
    "assistant_cross_entropy": "cross-entropy of assistant tokens after tuning",
}


def run(*releases: Path) -> dict[str, Any]:
    """What releases have in common and what not.

    Args:
        releases: their folders, two or more.

    Returns:
        Lists have one value for each release, in their order, None where it has none: ``releases`` [{folder,
        name}], ``measures`` {measure: values}, ``files`` [{format, quantization, bytes, mean_kl, same_top,
        decode_tokens_per_s: values}], ``recipe`` {key: values} of keys that differ, ``results`` {role: "same"
        | "differs" | "only in NAME, ..."}, ``conversations`` [{prompt, answers}] of prompts that all
        answered, ``packages`` {name: versions} that differ.

    Raises:
        UserError: there is only one, or a folder holds no report of martlet.
    """
    folders = [Path(release) for release in releases]
    if len(folders) < 2:
        raise UserError("There is nothing to compare; give two releases or more.")
    reports = [_read(folder) for folder in folders]
    recipes = [_flat(report["recipe"]) for report in reports]
    lineages = [report["lineage"] for report in reports]
    labels = _labels([str(report["name"]) for report in reports])
    talks = [{talk["prompt"]: talk["after"] for talk in report["conversations"]} for report in reports]
    return {
        "schema": COMPARISON_SCHEMA,
        "releases": [
            {"folder": str(folder), "name": report["name"]}
            for folder, report in zip(folders, reports, strict=True)
        ],
        "measures": _rows([_measures(report) for report in reports]),
        "files": _files(reports),
        "recipe": {key: values for key, values in _rows(recipes).items() if _differ(values)},
        "results": {
            role: _relation([lineage.get(role, {}).get("digest") for lineage in lineages], labels)
            for role in _rows(lineages)
        },
        "conversations": [
            {"prompt": prompt, "answers": [talk[prompt] for talk in talks]}
            for prompt in talks[0]
            if all(prompt in talk for talk in talks)
        ],
        "packages": {
            name: versions
            for name, versions in _rows([report["packages"] for report in reports]).items()
            if _differ(versions)
        },
    }


def write(facts: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes ``comparison.json`` and the page ``comparison.html``; returns their paths.

    Args:
        facts: result of ``run``.
        folder: is made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FACTS, facts)
    page = folder / PAGE
    partial = page.with_name(page.name + ".partial")
    partial.write_text(render(facts), encoding="utf-8")
    partial.replace(page)
    return folder / FACTS, page


def render(facts: dict[str, Any]) -> str:
    """The page, one HTML file without script and without any request, in the style of a release's report."""
    return (
        page_environment()
        .get_template("release_comparison.html.jinja")
        .render(
            facts=facts,
            charts=_charts(facts),
            title=TITLE,
            measures=MEASURES,
            labels=_labels([release["name"] for release in facts["releases"]]),
        )
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the folder of a release.") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise UserError(f"{path}: is no report of this version of martlet; give the folder of a release.")
    return report


def _measures(report: dict[str, Any]) -> dict[str, Any]:
    held_out = report["distillation"]["held_out"]
    return {
        "parameters": report["student"]["parameters"],
        "kl_before": held_out["kl_before"],
        "kl_after": held_out["kl_after"],
        "cross_entropy_after": held_out["student_cross_entropy_after"],
        "tokens": report["distillation"]["tokens"],
        "assistant_cross_entropy": report["instruct"]["after"]["assistant_cross_entropy"],
    }


def _files(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files of the same format and quantization, in the order of the first release, then of the others."""
    found: list[dict[tuple[str, str], dict[str, Any]]] = []
    for report in reports:
        speed = {entry["file"]: entry["decode_tokens_per_s"] for entry in report["device"]}
        found.append(
            {
                (entry["format"], entry["quantization"]): {
                    "bytes": entry["bytes"],
                    "mean_kl": entry["mean_kl"],
                    "same_top": entry["same_top"],
                    "decode_tokens_per_s": speed.get(entry["file"]),
                }
                for entry in report["fidelity"]
            }
        )
    keys = ("bytes", "mean_kl", "same_top", "decode_tokens_per_s")
    return [
        {
            "format": name[0],
            "quantization": name[1],
            **{key: [files.get(name, {}).get(key) for files in found] for key in keys},
        }
        for name in dict.fromkeys(name for files in found for name in files)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"distill.t_start": 0.4, ...} of a recipe; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _rows(mappings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """{key: [value in each mapping]}, None where a key is missing."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    return {key: [mapping.get(key) for mapping in mappings] for key in keys}


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)


def _relation(digests: list[str | None], labels: list[str]) -> str:
    if None in digests:
        there = [label for label, digest in zip(labels, digests, strict=True) if digest is not None]
        return f"only in {', '.join(there)}"
    return "differs" if _differ(digests) else "same"


def _labels(names: list[str]) -> list[str]:
    """The releases' names, numbered where some are the same."""
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _charts(facts: dict[str, Any]) -> list[Markup]:
    """KL against size of every file, for a desk and for a phone; none where nothing was measured."""
    labels = _labels([release["name"] for release in facts["releases"]])
    values = [
        {
            "release": labels[number],
            "megabytes": file["bytes"][number] / 1e6,
            "mean_kl": max(file["mean_kl"][number], SMALLEST_KL),
            "name": file["quantization"],
            "left": number % 2 == 0,
        }
        for file in facts["files"]
        for number in range(len(labels))
        if file["bytes"][number] is not None and file["mean_kl"][number] is not None
    ]
    if not values:
        return []
    base = altair.Chart(altair.Data(values=values)).encode(x=size_axis(58), y=kl_axis(14))
    told_apart = by_kind(
        "release",
        {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)},
        {label: SHAPES[number % len(SHAPES)] for number, label in enumerate(labels)},
    )
    marks = base.mark_point(size=80, filled=True, opacity=1).encode(**told_apart)
    layers = altair.LayerChart(layer=[marks, *names_beside(base, "name", 9)])
    return [svg(layers.properties(width=width, height=320), TITLE) for width in (560, 270)]
