"""The report: its JSON against its schema, its page in Chromium."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from chromium import CONTRAST, LETTERS
from release_artifacts import example_artifacts, example_recipe, example_stage_times

from pipeline import compare, pages, release, report
from pipeline.artifacts import Store
from pipeline.errors import UserError
from pipeline.recipe import Recipe

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
    assert "at 2 to 15 W a busy processor, a model and no measurement" in text
    assert re.search(r"[\d.]+ to [\d.]+, modelled", text)
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
    assert len(outline.charts) == 7
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in outline.charts)
    assert page.count("<th scope=") == len(re.findall(r"<th\b", page))


def test_pictures_show_every_file_and_both_runs(facts: dict[str, Any]) -> None:
    charts = report.charts(facts)
    assert set(charts) == {"loss", "held_out_kl", "t", "fidelity", "speed", "pareto", "pareto_narrow"}
    words = {name: set(ElementTree.fromstring(svg).itertext()) for name, svg in charts.items()}
    for name in ("fidelity", "speed"):
        assert {entry["quantization"] for entry in facts["fidelity"]} <= words[name]
    for entry, file in zip(facts["device"], facts["fidelity"], strict=True):
        speed = pages.readable_number(entry["decode_tokens_per_s"])
        assert f"{file['quantization']}, {speed} tok/s" in words["pareto"]
        assert file["quantization"] in words["pareto_narrow"]
    assert {"taid", "control: cross-entropy only"} <= words["loss"] & words["held_out_kl"]
    assert "control: cross-entropy only" not in words["t"]


def test_pictures_are_told_in_words(facts: dict[str, Any]) -> None:
    named = {
        name: ElementTree.fromstring(svg).attrib["aria-label"] for name, svg in report.charts(facts).items()
    }
    assert "taid from 4.19 to 2.03; control: cross-entropy only from" in named["loss"]
    assert "gguf q4_k_m: 81.0 MB, KL 0.0480, 61.2 tokens/s" in named["pareto"]
    assert all(entry["quantization"] in named["fidelity"] for entry in facts["fidelity"])


def test_budgets_tell_what_each_stage_had(page: str, facts: dict[str, Any]) -> None:
    rows = {name: rest for name, *rest in report.budgets(facts)}
    assert rows["distill, taid"][:2] == ["61,440 tokens", 60]
    assert rows["control, cross_entropy"][:2] == ["61,440 tokens", 60]
    assert rows["instruct"][:2] == ["120 conversations", 2]
    assert rows["all stages"][2] == pytest.approx(sum(stage["seconds"] for stage in facts["stages"]))
    assert "2,048 held-out tokens a file" in text_of(page)


def test_every_file_leads_to_the_result_that_it_is_a_part_of(released: Path, facts: dict[str, Any]) -> None:
    manifest = json.loads((released / "manifest.json").read_text(encoding="utf-8"))
    models = {
        name: entry for name, entry in manifest["files"].items() if entry["made_from"]["stage"] != "release"
    }
    assert {file["file"] for file in facts["files"]} == set(models)
    for file in facts["files"]:
        entry, result = models[file["file"]], facts["lineage"][file["role"]]
        assert (file["sha256"], file["bytes"]) == (entry["sha256"], entry["bytes"])
        assert (result["key"], result["digest"]) == (entry["made_from"]["key"], entry["made_from"]["digest"])


@pytest.fixture
def comparison() -> dict[str, Any]:
    """What ``pipeline.compare.run`` gives, of two objectives and two seeds; numbers of docs/log.md's size."""
    measured = {"cross_entropy": 4.3, "reverse_kl": 1.2, "same_top": 0.5, "rouge_l": 0.2, "head_mass": 0.2}
    contenders = []
    for label, kls in (("forward_kl", (1.03, 1.05)), ("taid", (1.01, 1.02))):
        runs = [{"seed": seed, "kl": kl, "curve": [], **measured} for seed, kl in enumerate(kls)]
        contenders.append(
            {
                "label": label,
                "objective": label,
                "settings": {},
                "mean": {"kl": sum(kls) / 2, **measured},
                "spread": {"kl": 0.01, **dict.fromkeys(measured, 0.001)},
                "kl_difference": compare.paired_difference(runs, contenders[0]["runs"], "kl")
                if contenders
                else {"mean": 0.0, "standard_error": 0.0},
                "runs": runs,
            }
        )
    before = {"kl": 2.36, **measured}
    numbers = {"seeds": [0, 1], "tokens": 12_288, "steps": 12, "held_out_tokens": 10_200}
    return {**numbers, "before": before, "teacher": {"cross_entropy": 3.58}, "contenders": contenders}


def test_a_comparison_of_objectives_enters_the_report(
    released: Path, comparison: dict[str, Any], validator: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "release"
    shutil.copytree(released, copy)
    compare.require_same_start(example_recipe(), copy)
    compare.show_in_report(comparison, copy)
    assert release.verify(copy) == []
    shown = json.loads((copy / "report.json").read_text(encoding="utf-8"))
    assert validator.is_valid(shown)
    assert "curve" not in json.dumps(shown["study"])
    text = text_of((copy / "report.html").read_text(encoding="utf-8"))
    study = text.split("Objectives compared", 1)[1].split("Is every file the model?")[0]
    assert "12,288 tokens in 12 steps" in study
    assert re.search(r"taid 1\.015 ± 0\.010 .*-0\.0250 ± 0\.0050 forward_kl 1\.040", study)
    words = set(ElementTree.fromstring(report.charts(shown)["objectives"]).itertext())
    assert {"taid", "forward_kl"} <= words


def test_a_comparison_of_another_student_does_not(released: Path, tmp_path: Path) -> None:
    for changes, key in (
        ({"seed": 8}, "seed"),
        ({"student": {"prune": {"layers": 15}}}, "student"),
        ({"teacher": {"model": "someone/other"}}, r"teacher\.model"),
    ):
        with pytest.raises(UserError, match=f"--release: .* another {key} than"):
            compare.require_same_start(example_recipe(**changes), released)
    # A licence makes no other student, and releases from before the key say nothing of one.
    compare.require_same_start(example_recipe(student={"prune": {"layers": 20}, "licence": "MIT"}), released)
    with pytest.raises(UserError, match="is missing or no manifest of martlet"):
        compare.require_same_start(example_recipe(), tmp_path)


def test_a_damaged_report_is_not_added_to(released: Path, tmp_path: Path) -> None:
    copy = tmp_path / "release"
    shutil.copytree(released, copy)
    with (copy / "report.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"report\.json: is missing or damaged"):
        release.change_report(copy, lambda facts: None)


def test_a_failed_gate_is_the_first_thing_said(facts: dict[str, Any]) -> None:
    sentence = "model_q4.onnx: gate mean_kl: 0.147, the threshold is at most 0.1."
    broken = facts["fidelity"][-1]
    broken |= {"passed": False, "failures": [sentence]}
    broken |= dict.fromkeys(("mean_kl", "median_kl", "p99_kl", "same_top", "perplexity_ratio"))
    text = text_of(report.render(facts))
    assert "Do not ship. 1 of 7 files missed a gate:" in text
    assert text.index(sentence) < text.index("What was made")
    assert "Ship. All" not in text


def test_notes_tell_which_licences_nobody_judged(facts: dict[str, Any]) -> None:
    assert facts["licences"] == {"result": "Apache-2.0", "not_judged": []}
    others = report.notes(facts)
    unknown = deepcopy(facts) | {"licences": {"result": "MIT", "not_judged": ["teacher.licence: <b>x"]}}
    first, *rest = report.notes(unknown)
    assert "does not know teacher.licence: <b>x, so" in first
    assert rest == others
    assert "does not know teacher.licence: &lt;b&gt;x, so" in report.render(unknown)
    del facts["licences"]  # as in a report of an earlier version
    assert report.notes(facts) == others


def test_notes_tell_what_numbers_do_not_flatter(facts: dict[str, Any]) -> None:
    assert report.notes(facts) == ["onnx fp32, onnx int4 failed within small phone."]
    worse = deepcopy(facts)
    worse["distillation"]["held_out"]["kl_after"] = 3.0
    worse["instruct"]["after"]["assistant_cross_entropy"] = 9.0
    worse["device"][0]["reliable"] = False
    worse["device"][1]["backend"]["fallbacks"] = ["threads: 4 asked for, 2 in use"]
    assert len(report.notes(worse)) == 6
    assert "1 of 7 files" in report.notes(worse)[-3]
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
    assert pages.readable_number(value) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", "(special token)"), (" rain", " rain"), ("\n", "↵"), (" \t", "␣⇥"), (".\n\n", ".↵↵")],
)
def test_readable_token(text: str, shown: str) -> None:
    assert pages.readable_token(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(12, "12 B"), (4_200, "4 kB"), (81_000_000, "81.0 MB"), (2_500_000_000, "2.5 GB")]
)
def test_readable_size(value: int, shown: str) -> None:
    assert pages.readable_size(value) == shown


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
        charts = [chart for chart in tab.locator("svg").all() if chart.is_visible()]
        assert len(charts) == 6
        for chart in charts:
            box = chart.bounding_box()
            assert box["width"] > 250
            assert box["x"] + box["width"] <= width
        assert tab.evaluate(LETTERS) >= 9.5, "words of a picture are too small to read"
        low = tab.evaluate(CONTRAST)
        assert low == [], "text without enough contrast"
    finally:
        tab.close()


def test_keys_reach_everything_and_show_where_they_are(browser: Any, released: Path) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto((released / "report.html").as_uri())
    try:
        wanted = tab.locator("a[href], summary, [tabindex='0']").evaluate_all(
            "all => all.filter(e => e.checkVisibility()).length"
        )
        reached = 0
        for _ in range(wanted):
            tab.keyboard.press("Tab")
            outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            reached += tab.evaluate("document.activeElement !== document.body")
            assert outline != "none"
        assert reached == wanted > 20
    finally:
        tab.close()


def test_paper_shows_what_is_folded_on_a_screen(browser: Any, released: Path) -> None:
    tab = browser.new_page()
    tab.goto((released / "report.html").as_uri())
    try:
        hidden = (
            "[...document.querySelectorAll('details table, details pre')].filter(e => !e.checkVisibility())"
        )
        assert tab.evaluate(f"{hidden}.length") > 0
        tab.emulate_media(media="print")
        assert tab.evaluate(f"{hidden}.length") == 0
        # A4 less its margins, at 96 pixels an inch: no table may leave the sheet.
        tab.set_viewport_size({"width": 718, "height": 1000})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 718
    finally:
        tab.close()
