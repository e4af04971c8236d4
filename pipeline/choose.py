"""Which file of a release to ship: the Pareto front of size, fidelity and decode speed, within budgets."""

import json
import re
from pathlib import Path
from typing import Any

import altair

from pipeline.errors import UserError
from pipeline.pages import SMALLEST_KL, by_format, kl_axis, names_beside, size_axis, svg

NEGLIGIBLE_KL = 0.01
"""Nats. Files no further from the model than this are told apart by speed and size alone: it is about what
seeds of a training run move KL by."""
AS_FAST = 0.95
"""Files that reach this share of the highest speed count as equally fast."""
UNITS = {"": 1, "B": 1}
UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("kMG", 1)}
UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMG", 1)}


def choose(
    release: Path,
    max_size: int | None = None,
    max_memory: int | None = None,
    min_speed: float | None = None,
) -> dict[str, Any]:
    """Reads a release's report and weighs its files.

    Of the files on the front that fit, the most faithful is the one to ship. Files with a mean KL of at most
    ``NEGLIGIBLE_KL`` count as equally faithful: then the fastest, and of the equally fast the smallest.

    Args:
        release: release folder with ``report.json``.
        max_size: most bytes on disk.
        max_memory: most bytes of memory at the peak.
        min_speed: least decoded tokens a second, on the machine and threads of the benchmark.

    Returns:
        ``files``: [{file, format, quantization, bytes, mean_kl, decode_tokens_per_s, peak_rss_bytes,
        reliable, on_front, fits, why_not}] from the smallest to the largest; speed, memory and reliable of a
        file without benchmark are null, why_not of one that fits. ``ship``: the chosen one's file name, null
        if none fits. ``machine`` and ``threads`` of the benchmark.

    Raises:
        UserError: there is no readable report.
    """
    path = Path(release) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        weighed = weigh(report["fidelity"], report["device"], max_size, max_memory, min_speed)
        machine = report.get("machine")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is missing or no report of martlet ({error}); give a release folder."
        ) from None
    return {
        **weighed,
        "machine": machine,
        "threads": next((entry["threads"] for entry in report["device"]), None),
    }


def weigh(
    fidelity: list[dict[str, Any]],
    device: list[dict[str, Any]],
    max_size: int | None = None,
    max_memory: int | None = None,
    min_speed: float | None = None,
) -> dict[str, Any]:
    """``files`` and ``ship`` of ``choose``.

    Args:
        fidelity, device: entries of these keys of a report.
        max_size, max_memory, min_speed: as of ``choose``.
    """
    measured = {entry["file"]: entry for entry in device}
    files = [_weighed(entry, measured.get(entry["file"], {})) for entry in fidelity]
    candidates = [file for file in files if file["why_not"] is None]
    for file in files:
        file["on_front"] = file in candidates and not any(_better(other, file) for other in candidates)
        for key, limit, word in (
            ("bytes", max_size, "is larger"),
            ("peak_rss_bytes", max_memory, "needs more memory"),
            ("decode_tokens_per_s", min_speed, "is slower"),
        ):
            if limit is None or file["why_not"] is not None:
                continue
            if file[key] is None:
                file["why_not"] = "was not measured"
            elif file[key] < limit if key == "decode_tokens_per_s" else file[key] > limit:
                file["why_not"] = word
        file["fits"] = file["why_not"] is None
    fitting = [file for file in files if file["fits"]]
    return {
        "ship": _best(fitting)["file"] if fitting else None,
        "files": sorted(files, key=lambda file: file["bytes"]),
    }


def _weighed(entry: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: entry[key] for key in ("file", "format", "quantization", "bytes", "mean_kl")},
        **{key: measured.get(key) for key in ("decode_tokens_per_s", "peak_rss_bytes", "reliable")},
        "why_not": None if entry["passed"] and entry["mean_kl"] is not None else "missed a gate",
    }


def _better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a file is at least as good as another in everything, and better in something."""
    a, b = ([f["bytes"], f["mean_kl"], -(f["decode_tokens_per_s"] or 0.0)] for f in (one, other))
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _best(fitting: list[dict[str, Any]]) -> dict[str, Any]:
    nearest = max(min(file["mean_kl"] for file in fitting), NEGLIGIBLE_KL)
    faithful = [file for file in fitting if file["mean_kl"] <= nearest]
    fastest = max(file["decode_tokens_per_s"] or 0.0 for file in faithful)
    fast = [file for file in faithful if (file["decode_tokens_per_s"] or 0.0) >= AS_FAST * fastest]
    return min(fast, key=lambda file: (file["bytes"], file["mean_kl"]))


def bytes_of(text: str, option: str) -> int:
    """Bytes of a size such as ``80MB`` (powers of ten), ``80MiB`` (of two) or a plain number.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise UserError(
            f"{option}: {text!r} is no size; write bytes, or a number with kB, MB, GB, MiB or GiB."
        )
    return int(float(found[1]) * units[found[2].lower()])


def picture(choice: dict[str, Any]) -> str:
    """The files by size and KL as SVG: colour and shape are the format, the line joins the front, a ring
    marks the one to ship, faint ones do not fit or missed a gate; speeds stand beside the names."""
    values = [
        {
            "megabytes": file["bytes"] / 1e6,
            "mean_kl": max(file["mean_kl"], SMALLEST_KL),
            "format": file["format"],
            "label": file["quantization"]
            + ("" if (speed := file["decode_tokens_per_s"]) is None else f", {speed:.0f} tok/s"),
            "opacity": 1.0 if file["fits"] else 0.35,
            "front": file["on_front"],
            "ship": file["file"] == choice["ship"],
            "left": rank % 2 == 1,
        }
        for rank, file in enumerate(choice["files"])
        if file["mean_kl"] is not None
    ]
    base = altair.Chart(altair.Data(values=values)).encode(x=size_axis(98), y=kl_axis(16))
    front = base.transform_filter("datum.front").mark_line(
        color="currentColor", opacity=0.4, strokeDash=[4, 3]
    )
    ring = base.transform_filter("datum.ship").mark_point(size=320, strokeWidth=2, color="currentColor")
    faint = altair.Opacity("opacity:Q", scale=None, legend=None)
    dots = base.mark_point(size=90, filled=True).encode(opacity=faint, **by_format(values))
    texts = names_beside(base, "label", 13, opacity=faint)
    chart = altair.LayerChart(layer=[front, ring, dots, *texts]).properties(width=620, height=380)
    return str(svg(chart, "Files by size and mean KL; the ring marks the one to ship"))
