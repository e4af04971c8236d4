"""What the project's pages and pictures share: how numbers are written, colours, axes, marks, SVG."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import altair
import jinja2
import vl_convert
from markupsafe import Markup

FORMATS = ("gguf", "mlc", "onnx")
BLUE, ORANGE, TEAL = "#3b82c4", "#c96a1e", "#1f9483"
"""At least three to one against a page's paper, light and dark."""
FORMAT_COLOURS = {"gguf": BLUE, "mlc": TEAL, "onnx": ORANGE}
FORMAT_SHAPES = {"gguf": "circle", "mlc": "square", "onnx": "triangle-up"}
FONT_SIZE = 13
SMALLEST_KL = 1e-5
"""A logarithmic axis begins here: what is below is rounding, not quantization."""


def page_environment() -> jinja2.Environment:
    """Templates of the project's pages, with the filters ``device``, ``facts``, ``size``, ``number``,
    ``percent`` and ``token``."""
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
        "token": readable_token,
    }
    return environment


def readable_device(device: Mapping[str, Any]) -> str:
    """A device that sent measurements, in a few words of its own."""
    system = " ".join(part for part in (device["platform"], device["platform_version"]) if part)
    words = [device["model"], system, f"{device['processors']} processors" if device["processors"] else None]
    return ", ".join(word for word in words if word) or device["user_agent"] or "a device that tells nothing"


def readable_facts(facts: Mapping[str, Any]) -> str:
    """What a runtime was asked for, or has in use, in one line."""

    def readable(value: Any) -> str:
        return ", ".join(value) if isinstance(value, list) else str(value)

    return "; ".join(f"{name.replace('_', ' ')}: {readable(value)}" for name, value in facts.items() if value)


def readable_percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def readable_token(text: str) -> str:
    """A token as it can be seen: ends of lines are arrows, and so is what is nothing but blank."""
    if not text:
        return "(special token)"
    shown = text.replace("\n", "↵")
    return shown if shown.strip() else shown.replace(" ", "␣").replace("\t", "⇥")


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


def size_axis(padding: int) -> altair.X:
    """Megabytes, logarithmic; the padding leaves room for names beside marks."""
    return altair.X(
        "megabytes:Q",
        title="size, MB",
        scale=altair.Scale(type="log", nice=False, padding=padding),
        axis=altair.Axis(tickCount=6, format=",.3~r", labelOverlap="greedy", labelSeparation=6),
    )


def kl_axis(padding: int) -> altair.Y:
    """Mean KL of a file to its model, logarithmic."""
    return altair.Y(
        "mean_kl:Q",
        title="mean KL to the model, nats",
        scale=altair.Scale(type="log", padding=padding),
        axis=altair.Axis(tickCount=5, format=".0e"),
    )


def by_kind(field: str, colours: Mapping[str, str], shapes: Mapping[str, str]) -> dict[str, Any]:
    """Encodings that tell the kinds of a field apart by colour and by shape, with a legend.

    Args:
        field: such as ``format``.
        colours, shapes: of each kind that occurs, in the legend's order.
    """
    legend = altair.Legend(title=None, orient="top", labelLimit=300)
    kinds = list(colours)
    return {
        "color": altair.Color(
            f"{field}:N", scale=altair.Scale(domain=kinds, range=list(colours.values())), legend=legend
        ),
        "shape": altair.Shape(
            f"{field}:N",
            scale=altair.Scale(domain=kinds, range=[shapes[kind] for kind in kinds]),
            legend=legend,
        ),
    }


def by_format(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Encodings of the formats that occur among exported files."""
    occurring = {value["format"] for value in values}
    return by_kind("format", {f: FORMAT_COLOURS[f] for f in FORMATS if f in occurring}, FORMAT_SHAPES)


def names_beside(base: altair.Chart, field: str, gap: int, **encoding: Any) -> list[altair.Chart]:
    """The names of marks, on the left of those whose ``left`` is true, so that neighbours do not cover each
    other.

    Args:
        base: a chart whose encoding places the marks.
        field: holds the name.
        gap: pixels between a mark's middle and its name.
        encoding: what else varies, such as opacity.
    """
    words: dict[str, Any] = {"fontSize": FONT_SIZE, "color": "currentColor"}
    left = base.transform_filter("datum.left").mark_text(align="right", dx=-gap, **words)
    right = base.transform_filter("!datum.left").mark_text(align="left", dx=gap, **words)
    return [side.encode(text=altair.Text(f"{field}:N"), **encoding) for side in (left, right)]


def objectives_picture(contenders: Sequence[Mapping[str, Any]], title: str) -> Markup:
    """KL to the teacher of each contender of a comparison: a dot for each seed, a bar at the mean.

    Args:
        contenders: [{label, mean: {kl}, runs: [{kl}]}], in the order of the rows.
        title: what the picture shows.
    """
    dots = [
        {"run": entry["label"], "kl": run["kl"], "mean": entry["mean"]["kl"]}
        for entry in contenders
        for run in entry["runs"]
    ]
    labels = [entry["label"] for entry in contenders]
    rows = altair.Y("run:N", sort=labels, title=None, axis=altair.Axis(labelLimit=260))
    base = altair.Chart(altair.Data(values=dots)).encode(y=rows)
    span = altair.Scale(zero=False, padding=12)
    layers = altair.LayerChart(
        layer=[
            base.mark_tick(thickness=3, size=16, color=BLUE).encode(x=altair.X("mean:Q", scale=span)),
            base.mark_point(filled=True, size=55, opacity=0.65, color=BLUE).encode(
                x=altair.X("kl:Q", title="held-out KL, nats", scale=span, axis=altair.Axis(tickCount=4))
            ),
        ]
    ).properties(
        # Room on the left: a browser's font may be wider than the one that the labels were measured with.
        width=230,
        height=altair.Step(26),
        padding={"left": 30, "top": 5, "right": 10, "bottom": 5},
    )
    return svg(layers, title)


def svg(chart: altair.Chart | altair.LayerChart | altair.FacetChart, title: str) -> Markup:
    """The SVG of a chart. Text and axes take the colour of the page, so that they suit light and dark.

    Args:
        chart: the chart.
        title: what it shows, for those who do not see it.
    """
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
            labelFontSize=FONT_SIZE,
            titleFontSize=FONT_SIZE,
            titleFontWeight="normal",
            titlePadding=8,
        ),
        legend=altair.LegendConfig(labelColor=ink, labelFontSize=FONT_SIZE, columnPadding=16),
    )
    picture = vl_convert.vegalite_to_svg(styled.to_dict())
    label = html.escape(title, quote=True)
    # As one picture with a name; the hundreds of marks inside would only be noise to a screen reader.
    opening, rest = picture.split(">", 1)
    return Markup(f'{opening} role="img" aria-label="{label}"><title>{label}</title>{rest}')
