"""The report: its JSON against its schema, its page in Chromium."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from release_artifacts import example_artifacts, example_recipe, example_stage_times

from pipeline import release, report
from pipeline.artifacts import Store
from pipeline.recipe import Recipe

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SCHEMA = Path(report.__file__).parent / "schemas" / "report.schema.json"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    store = Store(folder / "store", report=lambda line: None)
    recipe = example_recipe()
    artifacts = example_artifacts(store, recipe)
    return release.run(recipe, artifacts, folder / "release", store, example_stage_times(artifacts))


@pytest.fixture
def facts(released: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((released / "report.json").read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def page(released: Path) -> str:
    return (released / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def text_of(page: str) -> str:
    body = re.sub(r"<(style|title)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_report_json_follows_its_schema(facts: dict[str, Any], validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(facts)] == []


def test_report_json_has_the_promised_keys(facts: dict[str, Any]) -> None:
    """Written out apart from the schema, so that a change of one of both is seen."""
    distillation = facts["distillation"]
    assert {"schema", "recipe", "distillation", "fidelity", "device", "stages"} <= set(facts)
    assert {"tokens", "seconds", "tokens_per_second", "curve", "held_out"} <= set(distillation)
    held_out = distillation["held_out"]
    assert held_out["teacher_cross_entropy"] == 3.58
    assert (held_out["student_cross_entropy_before"], held_out["student_cross_entropy_after"]) == (5.87, 4.15)
    assert (held_out["kl_before"], held_out["kl_after"]) == (2.36, 0.80)
    assert distillation["control"]["held_out"]["kl_after"] == 1.02
    for entry in facts["fidelity"]:
        assert set(entry) >= {
            "file",
            "format",
            "quantization",
            "token_ids_equal",
            "mean_kl",
            "p99_kl",
            "max_kl",
            "same_top",
            "perplexity_ratio",
            "passed",
        }
    for entry in facts["device"]:
        assert set(entry) >= {
            "file",
            "runtime",
            "threads",
            "load_s",
            "ttft_s",
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "rss_anon_bytes",
            "rss_file_bytes",
            "peak_rss_bytes",
            "reliable",
        }
    for entry in facts["stages"]:
        assert set(entry) == {"name", "seconds", "cached"}
    assert Recipe.model_validate(facts["recipe"]) == example_recipe()


@pytest.mark.parametrize(
    "path",
    [
        "distillation.held_out.kl_after",
        "fidelity.0.mean_kl",
        "device.0.reliable",
        "stages.0.cached",
        "recipe",
    ],
)
def test_the_schema_misses_what_is_missing(facts: dict[str, Any], validator: Any, path: str) -> None:
    *parents, last = path.split(".")
    parent: Any = facts
    for key in parents:
        parent = parent[int(key) if key.isdigit() else key]
    del parent[last]
    assert not validator.is_valid(facts)


def test_lineage_leads_back_to_teacher_and_data(facts: dict[str, Any]) -> None:
    def ancestors(role: str) -> set[str]:
        parents = facts["lineage"][role]["made_from"]
        return set(parents).union(*(ancestors(parent) for parent in parents))

    for format in ("gguf", "mlc", "onnx"):
        assert {"teacher", "text", "chats", "student", "distill", "instruct"} <= ancestors(format)
    assert facts["lineage"]["text"]["sources"] == {"pydoc_data/topics.py": "cd" * 32}


def test_page_says_what_was_measured(page: str) -> None:
    text = text_of(page)
    assert "Ship. All 7 exported files passed every gate" in text
    assert "KL(teacher ‖ student) went from 2.36 to 0.800 nats, 34 % of its starting value" in text
    assert "by cross-entropy alone ends at 1.02, 43 %" in text
    assert "10,200 held-out tokens" in text
    assert "61,440 training tokens" in text
    assert "seed 7" in text
    assert "not a phone" in text
    assert "Nearest to its limit is mlc q4f32_1: mean KL 0.312 nats of at most 0.250 (125 %)" in text
    assert "Distillation left 34 % of the student's distance to the teacher" in text.replace("&#39;", "'")
    order = ["What was made", "Learning", "Is every file the model?", "Where each file is furthest"]
    order += ["Which file for which device?", "How does it run?", "Conversations, as they are"]
    order += ["What a quantization's name really holds", "Where it comes from", "To do it again"]
    text = text.split("What was made Learning", 1)[1]  # the list of sections, which names them too
    places = [text.replace("&#39;", "'").index(heading) for heading in order]
    assert places == sorted(places)


def test_worst_tokens_stand_in_their_text(page: str) -> None:
    text = text_of(page)
    assert "…The import statement searches for the &lt;module&gt; and binds" in text
    assert re.search(r"0\.00\d+|[\d.]+ …The import .* then 61 % a 22 %", text)
    assert text.count("…The import statement") == 7


def test_every_file_answers_beside_the_model(facts: dict[str, Any]) -> None:
    first, second = report.talks(facts)
    answers = dict(first["answers"])
    assert [who for who, _ in first["answers"]] == [
        "teacher",
        "student before instruction tuning",
        "student after, gguf f16, gguf q8_0, gguf q4_k_m, onnx fp32",
        "gguf q5_k_m, mlc q4f32_1, onnx int4",
    ]
    assert answers["gguf q5_k_m, mlc q4f32_1, onnx int4"].endswith("Sky sky.")
    assert len(second["answers"]) == 3
    del facts["fidelity"][0]["said"]  # a file that could not be run
    assert "gguf f16" not in str(report.talks(facts))


def test_pareto_front_is_what_nothing_beats(facts: dict[str, Any]) -> None:
    files = [
        {"megabytes": f["bytes"] / 1e6, "mean_kl": f["mean_kl"], "q": f["quantization"]}
        for f in facts["fidelity"]
    ]
    beaten = {
        a["q"]
        for a in files
        for b in files
        if b is not a and b["megabytes"] <= a["megabytes"] and b["mean_kl"] <= a["mean_kl"]
    }
    assert {entry["q"] for entry in report.pareto_front(files)} == {f["q"] for f in files} - beaten


def test_types_are_told_tensor_by_tensor(page: str) -> None:
    assert "attn_q 20 × Q5_0" in text_of(page)


def test_what_models_write_is_escaped(page: str) -> None:
    assert "a &lt;b&gt;cloud&lt;/b&gt; &amp; the" in page
    assert "<b>cloud" not in page


def test_page_needs_nothing_but_itself(page: str) -> None:
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page.replace("xlink:href", "href"))
    assert not re.search(r"url\((?!#|data:)", page)
    assert "@import" not in page


def test_page_is_well_formed_and_accessible(page: str) -> None:
    class Outline(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.headings: list[int] = []
            self.ids: list[str] = []
            self.labelled: list[str] = []
            self.charts: list[dict[str, str | None]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            if re.fullmatch(r"h[1-6]", tag):
                self.headings.append(int(tag[1]))
            if values.get("id"):
                self.ids.append(str(values["id"]))
            if values.get("aria-labelledby"):
                self.labelled.append(str(values["aria-labelledby"]))
            if tag == "svg":
                self.charts.append(values)

    outline = Outline()
    outline.feed(page)
    assert outline.headings.count(1) == 1
    assert outline.headings[0] == 1
    assert all(
        after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False)
    )
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.labelled) <= set(outline.ids)
    assert len(outline.charts) == 6
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in outline.charts)
    assert page.count("<th scope=") == len(re.findall(r"<th\b", page))


def test_pictures_show_every_file_and_both_runs(facts: dict[str, Any]) -> None:
    charts = report.charts(facts)
    assert set(charts) == {"loss", "held_out_kl", "t", "fidelity", "speed", "pareto"}
    words = {name: set(ElementTree.fromstring(svg).itertext()) for name, svg in charts.items()}
    for name in ("fidelity", "speed"):
        assert {entry["quantization"] for entry in facts["fidelity"]} <= words[name]
    for entry, file in zip(facts["device"], facts["fidelity"], strict=True):
        speed = report.readable_number(entry["decode_tokens_per_s"])
        assert f"{file['quantization']}, {speed} tok/s" in words["pareto"]
    assert {"taid", "control: cross-entropy only"} <= words["loss"] & words["held_out_kl"]
    assert "control: cross-entropy only" not in words["t"]


def test_a_failed_gate_is_the_first_thing_said(facts: dict[str, Any]) -> None:
    sentence = "model_q4.onnx: gate mean_kl: 0.147, the threshold is at most 0.1."
    broken = facts["fidelity"][-1]
    broken |= {"passed": False, "failures": [sentence]}
    broken |= dict.fromkeys(("mean_kl", "median_kl", "p99_kl", "same_top", "perplexity_ratio"))
    text = text_of(report.render(facts))
    assert "Do not ship. 1 of 7 files missed a gate:" in text
    assert text.index(sentence) < text.index("What was made")
    assert "Ship. All" not in text


def test_notes_tell_what_numbers_do_not_flatter(facts: dict[str, Any]) -> None:
    assert report.notes(facts) == []
    worse = deepcopy(facts)
    worse["distillation"]["held_out"]["kl_after"] = 3.0
    worse["instruct"]["after"]["assistant_cross_entropy"] = 9.0
    worse["device"][0]["reliable"] = False
    worse["device"][1]["backend"]["fallbacks"] = ["threads: 4 asked for, 2 in use"]
    assert len(report.notes(worse)) == 5
    assert "1 of 7 files" in report.notes(worse)[-2]
    assert "(threads: 4 asked for, 2 in use)" in report.notes(worse)[-1]
    assert "Fallback: threads: 4 asked for, 2 in use" in text_of(report.render(worse))


def test_a_report_without_control_t_and_pruning(facts: dict[str, Any], validator: Any) -> None:
    facts["distillation"]["control"] = None
    facts["distillation"]["objective"] = "forward_kl"
    for point in facts["distillation"]["curve"]:
        del point["t"]
    facts["student"] |= {"dropped": None, "influences": None}
    facts["recipe"]["student"] = {"model": "someone/small", "revision": None, "prune": None}
    facts["tensor_types"] = {}
    assert validator.is_valid(facts)
    page = report.render(facts)
    assert "t" not in report.charts(facts)
    assert "started from <code>someone/small</code>" in page
    assert "control" not in text_of(page).split("Where it comes from")[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (0.8, "0.800"),
        (61.24, "61.2"),
        (123.4, "123"),
        (4567.8, "4,568"),
        (6.1e-6, "6.1e-6"),
    ],
)
def test_readable_number(value: float | None, shown: str) -> None:
    assert report.readable_number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(12, "12 B"), (4_200, "4 kB"), (81_000_000, "81.0 MB"), (2_500_000_000, "2.5 GB")]
)
def test_readable_size(value: int, shown: str) -> None:
    assert report.readable_size(value) == shown


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS.split())
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(browser: Any, released: Path, tmp_path: Path, width: int, scheme: str) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    address = (released / "report.html").as_uri()
    tab.goto(address)
    try:
        # Not full_page: while Chromium grows the view for that it now and then refuses the picture.
        height = tab.evaluate("document.documentElement.scrollHeight")
        tab.set_viewport_size({"width": width, "height": height})
        picture = tab.screenshot(path=tmp_path / "report.png")
        tab.set_viewport_size({"width": width, "height": 844})
        assert len(picture) > 50_000
        assert said == []
        assert asked == [address]
        assert tab.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
        # What decides stands on the first screen.
        assert tab.locator(".verdict").bounding_box()["y"] < 844 / 2
        for chart in tab.locator("svg").all():
            box = chart.bounding_box()
            assert box["width"] > 250
            assert box["x"] + box["width"] <= width
        low = tab.evaluate(CONTRAST)
        assert low == [], "text without enough contrast"
    finally:
        tab.close()


# WCAG 2.1 contrast of every text against the first opaque ground behind it; below 4.5 is listed.
CONTRAST = """() => {
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    if (element.tagName === 'title' || element.tagName === 'STYLE') continue;
    let ground = element;
    while (ground && parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const style = getComputedStyle(element);
    const ink = parse(element.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(parse(getComputedStyle(ground || document.body).backgroundColor))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""
