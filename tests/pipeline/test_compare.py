"""The comparison study: measures against formulas of their own, options, and a whole study at tiny size."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipeline import compare
from pipeline.artifacts import Store
from pipeline.errors import UserError
from pipeline.models import position_ids
from pipeline.recipe import Recipe

DISTILL = {"batch_size": 2, "evaluate_every": 4, "evaluate_tokens": 128, "checkpoint_every": 100}


def slow_common_length(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence by its defining recursion."""
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return slow_common_length(left[:-1], right[:-1]) + 1
    return max(slow_common_length(left[:-1], right), slow_common_length(left, right[:-1]))


@given(*[st.lists(st.sampled_from(["the", "bird", "sea"]), min_size=1, max_size=6)] * 2)
def test_rouge_l_is_f1_of_the_common_subsequence(left: list[str], right: list[str]) -> None:
    common = slow_common_length(left, right)
    precision, recall = common / len(left), common / len(right)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert compare.rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected)


def test_rouge_l_of_lins_example_and_of_nothing() -> None:
    # Lin 2004, section 3.1: three of four words, in order.
    assert compare.rouge_l("police kill the gunman", "Police killed the gunman.") == pytest.approx(0.75)
    assert compare.rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert compare.rouge_l("", "...") == 1
    assert compare.rouge_l("", "bird") == 0


def test_head_and_tail_against_a_sort(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    rng = np.random.default_rng(0)
    blocks = rng.integers(3, 2000, (3, 16), dtype=np.int32)
    documents = np.repeat(np.array([[0] * 9 + [1] * 7], dtype=np.int32), 3, axis=0)
    measured = compare.probability_mass(model, blocks, position_ids(documents))
    kept = [place for place in range(15) if place != 8]
    alone = []
    for ids in blocks:
        for part in (ids[:9], ids[9:]):
            with torch.no_grad():
                logits = model(torch.from_numpy(part).long()[None]).logits[0].double()
            alone.append(logits[:-1].softmax(-1).sort(-1, descending=True).values)
    p = torch.cat(alone)
    assert measured["mass_tokens"] == len(p) == 3 * len(kept)
    assert measured["head_mass"] == pytest.approx(float(p[:, :10].sum(-1).mean()), rel=1e-4)
    least = int(0.2 * p.shape[1])
    assert measured["tail_mass"] == pytest.approx(float(p[:, -least:].sum(-1).mean()), rel=1e-4)
    assert 0 < measured["tail_mass"] < measured["head_mass"] < 1


def test_prompts_stay_within_one_document() -> None:
    blocks = np.arange(4 * 64).reshape(4, 64)
    documents = np.zeros((4, 64), dtype=np.int32)
    documents[1, 20:] = 1
    documents[2, 40:] = 1
    prompts = compare.prompts_of(blocks, documents)
    assert prompts.tolist() == [blocks[row, :32].tolist() for row in (0, 2, 3)]
    documents[:, 3:] = 7
    assert compare.prompts_of(blocks, documents).shape == (4, 32)


def test_paired_difference_forgets_what_the_seeds_share() -> None:
    runs = [{"kl": value} for value in (1.1, 2.1, 3.1)]
    others = [{"kl": value} for value in (1.0, 2.0, 3.0)]
    difference = compare.paired_difference(runs, others, "kl")
    assert difference["mean"] == pytest.approx(0.1)
    assert difference["standard_error"] == pytest.approx(0, abs=1e-12)
    difference = compare.paired_difference(runs, others[::-1], "kl")
    assert difference["standard_error"] == pytest.approx(np.std([-1.9, 0.1, 2.1], ddof=1) / math.sqrt(3))
    assert compare.paired_difference(runs[:1], others[:1], "kl")["standard_error"] is None


@pytest.mark.parametrize(("tokens", "steps"), [(None, 16), (1024, 8), (1100, 9), (3 * 128, 3), (4096, 32)])
def test_tokens_become_whole_steps(
    make_recipe: Callable[..., Recipe], tokens: int | None, steps: int
) -> None:
    recipe = make_recipe(distill={"batch_size": 2})
    assert compare.optimizer_steps(recipe, tokens) == steps
    assert math.ceil(compare.run_epochs(recipe, tokens) * compare.steps_an_epoch(recipe)) == steps


def test_schedules(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(distill={"batch_size": 2})
    entries = compare.contenders(
        recipe,
        ["taid", "taid_without_adaptation", "forward_kl"],
        ["alpha=8/N, t_start=0.2", "signal=divergence"],
        1024,
    )
    assert [entry.label for entry in entries] == [
        "taid",
        "taid without adaptation",
        "forward_kl",
        "taid: alpha 8/N, t_start 0.2",
        "taid: signal divergence",
    ]
    assert entries[1].changes == {"adaptive": False}
    assert entries[3].changes == {"alpha": 1.0, "t_start": "0.2"}
    assert {entry.objective for entry in entries} == {"taid", "forward_kl"}


@pytest.mark.parametrize(
    ("objectives", "schedules", "tokens", "message"),
    [
        (["taid", "magic"], [], None, "no 'magic'"),
        (["taid", "taid"], [], None, "listed twice"),
        ([], [], None, "at least one"),
        (["taid"], ["alpha"], None, "'alpha' is not KEY=VALUE"),
        (["taid"], ["gamma=1"], None, "'gamma=1' is not KEY=VALUE"),
        (["taid"], ["alpha=x/N"], None, "neither a number nor C/N"),
        (["taid"], ["t_start=2"], None, "t_start: Input should be less than or equal to 1"),
        (["taid"], ["t_start=0.9,t_end=0.5"], None, "t_start 0.9 is above t_end 0.5"),
        (["taid"], ["alpha=1/N"], 10, "less than one optimizer step"),
    ],
)
def test_wrong_options_are_named(
    make_recipe: Callable[..., Recipe],
    objectives: list[str],
    schedules: list[str],
    tokens: int | None,
    message: str,
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compare.contenders(make_recipe(), objectives, schedules, tokens)


@pytest.fixture(scope="module")
def study(
    make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Recipe, list[compare.Contender], dict[str, Any]]:
    """Three contenders, two seeds, four steps each."""
    store = Store(tmp_path_factory.mktemp("comparison"), report=lambda line: None)
    recipe = make_recipe(distill=DISTILL)
    entries = compare.contenders(
        recipe, ["taid", "curriculum_temperature"], ["alpha=8/N,signal=divergence"], 512
    )
    return store, recipe, entries, compare.run(store, recipe, entries, [0, 3], 512)


def test_a_study(study: tuple[Store, Recipe, list[compare.Contender], dict[str, Any]]) -> None:
    facts = study[3]
    assert (facts["tokens"], facts["steps"], facts["seeds"]) == (512, 4, [0, 3])
    assert [entry["label"] for entry in facts["contenders"]] == [
        "taid",
        "curriculum_temperature",
        "taid: alpha 8/N, signal divergence",
    ]
    for entry in facts["contenders"]:
        assert [run["seed"] for run in entry["runs"]] == [0, 3]
        values = [run["kl"] for run in entry["runs"]]
        assert values[0] != values[1]
        assert entry["mean"]["kl"] == pytest.approx(np.mean(values))
        assert entry["spread"]["kl"] == pytest.approx(np.std(values, ddof=1))
        assert all(run["kl"] < facts["before"]["kl"] for run in entry["runs"])
        assert all(0 <= run["rouge_l"] <= 1 for run in entry["runs"])
        assert all(run["peak_memory_bytes"] > 2**20 for run in entry["runs"])
        assert [point["step"] for point in entry["runs"][0]["curve"] if "loss" in point] == [1, 2, 3, 4]
    assert facts["contenders"][0]["kl_difference"] == {"mean": 0.0, "standard_error": 0.0}
    t = [[point["t"] for point in facts["contenders"][n]["runs"][0]["curve"] if "t" in point] for n in (0, 2)]
    assert t[0] == pytest.approx([0.4, 0.4, 0.7, 0.85])
    assert t[1][2] > t[0][2]


def test_a_study_that_was_stopped_goes_on(
    study: tuple[Store, Recipe, list[compare.Contender], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, recipe, entries, facts = study

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("everything is in the store")

    monkeypatch.setattr(Store, "_make", refuse)
    assert compare.run(store, recipe, entries, [0, 3], 512) == facts


def test_the_page_and_its_json(
    study: tuple[Store, Recipe, list[compare.Contender], dict[str, Any]], tmp_path: Path
) -> None:
    facts = study[3]
    data, page = compare.write(facts, tmp_path / "deep" / "comparison")
    assert json.loads(data.read_text(encoding="utf-8")) == facts
    text = page.read_text(encoding="utf-8")
    assert sorted(path.name for path in data.parent.iterdir()) == ["comparison.html", "comparison.json"]
    for entry in facts["contenders"]:
        assert f'<th scope="row">{entry["label"]}</th>' in text
        assert f"{entry['mean']['kl']:#.4g}" in text
    assert text.count("<svg") == 4  # the losses twice, once for phones
    assert "<script" not in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
