"""The prepare stage: what is in the packed blocks, and what is refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline import prepare
from pipeline.artifacts import Artifact, Store
from pipeline.errors import UserError
from pipeline.models import position_ids
from pipeline.recipe import Recipe
from pipeline.sources import PART_CHARACTERS, documents

MakeRecipe = Callable[..., Recipe]
SENTENCE = "Document {} says that swallow {} flew over field {} before the rain came. "
SMALL: dict[str, Any] = {
    "data__text__sequence_length": 32,
    "data__text__train_tokens": 320,
    "data__text__held_out_tokens": 128,
    "data__text__calibration_tokens": 64,
}


def texts(count: int) -> list[str]:
    return [
        "".join(SENTENCE.format(number, number * 3 + line, line) for line in range(1 + number % 4))
        for number in range(count)
    ]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def arrays(artifact: Artifact, split: str) -> tuple[np.ndarray, np.ndarray]:
    return np.load(artifact.path / f"{split}.npy"), np.load(artifact.path / f"documents_{split}.npy")


def test_blocks_hold_whole_documents_apart(
    tmp_path: Path,
    store: Store,
    make_recipe: MakeRecipe,
    tiny_teacher: Artifact,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    originals = texts(60)
    source = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in originals])
    artifact = prepare.run(store, make_recipe(data__text__sources=[str(source)], **SMALL), tiny_teacher)
    end = tiny_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    expected = {tuple(tiny_tokenizer(text)["input_ids"]) for text in originals}
    seen: dict[str, set[int]] = {}
    for split, blocks in (("train", 10), ("held_out", 4), ("calibration", 2)):
        tokens, numbers = arrays(artifact, split)
        assert tokens.shape == numbers.shape == (blocks, 32)
        assert tokens.dtype == numbers.dtype == np.int32
        flat, of_document = tokens.ravel(), numbers.ravel()
        seen[split] = set(of_document.tolist())
        complete = 0
        for number in seen[split]:
            ids = flat[of_document == number].tolist()
            if ids[-1] == end:
                assert tuple(ids[:-1]) in expected
                complete += 1
            else:  # cut by the end of the split or by the share that one document may have
                assert any(text[: len(ids)] == tuple(ids) for text in expected)
        assert complete >= 3 or split != "train"
    assert not seen["train"] & seen["held_out"]
    assert not seen["train"] & seen["calibration"]
    assert not seen["held_out"] & seen["calibration"]
    statistics = json.loads((artifact.path / "statistics.json").read_text())
    assert statistics["documents"] == 60
    assert statistics["splits"]["train"] == {"documents": len(seen["train"]), "tokens": 320}


def test_attention_positions_follow_the_documents(
    store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    artifact = prepare.run(store, make_recipe(), tiny_teacher)
    _, numbers = arrays(artifact, "train")
    positions = position_ids(numbers)
    for row, of_document in zip(positions, numbers, strict=True):
        for number in set(of_document.tolist()):
            assert row[of_document == number].tolist() == list(range((of_document == number).sum()))


def test_same_seed_same_blocks_and_another_seed_others(
    tmp_path: Path, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    source = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in texts(60)])

    def held_out(folder: str, seed: int) -> np.ndarray:
        store = Store(tmp_path / folder, report=lambda line: None)
        recipe = make_recipe(data__text__sources=[str(source)], seed=seed, **SMALL)
        return arrays(prepare.run(store, recipe, tiny_teacher), "held_out")[0]

    first = held_out("a", 0)
    assert np.array_equal(first, held_out("b", 0))
    assert not np.array_equal(first, held_out("a", 1))


def test_duplicates_are_counted_once(
    tmp_path: Path, store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    rows = [{"text": text} for text in texts(60)]
    respaced = [{"text": "  " + row["text"].replace(" ", "\n ")} for row in rows]
    source = write_lines(tmp_path / "text.jsonl", [*rows, *respaced, {"text": " \n"}, *rows])
    artifact = prepare.run(store, make_recipe(data__text__sources=[str(source)], **SMALL), tiny_teacher)
    statistics = json.loads((artifact.path / "statistics.json").read_text())
    assert (statistics["documents"], statistics["left_out"]) == (60, 121)


def test_no_document_decides_a_measuring_split(
    store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    """Python's longest topics hold more tokens than the whole split."""
    artifact = prepare.run(store, make_recipe(), tiny_teacher)
    for split in ("held_out", "calibration"):
        counts = np.unique(arrays(artifact, split)[1], return_counts=True)[1]
        assert len(counts) >= 8
        assert counts.max() <= counts.sum() / 8


def test_all_kinds_of_files_give_the_same_documents(tmp_path: Path) -> None:
    originals = texts(20)
    lines = write_lines(tmp_path / "a.jsonl", [{"body": text} for text in originals])
    table = pyarrow.table({"body": originals, "other": list(range(20))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(originals):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    datasets_folder = tmp_path / "dataset"
    datasets_folder.mkdir()
    lines.rename(datasets_folder / "train.jsonl")
    write_lines(lines, [{"body": text} for text in originals])
    assert list(documents(str(lines), "body")) == originals
    assert list(documents(str(tmp_path / "a.parquet"), "body")) == originals
    assert list(documents(str(folder), "body")) == originals
    assert sorted(documents(f"dataset:{datasets_folder}", "body", seed=3)) == sorted(originals)


def test_one_long_file_is_cut_into_documents(tmp_path: Path) -> None:
    paragraphs = [SENTENCE.format(number, number, number) * 5 for number in range(200)]
    path = tmp_path / "book.txt"
    path.write_text("\ufeff" + "\n\n".join(paragraphs), encoding="utf-8")
    parts = list(documents(str(path), "text"))
    assert len(parts) > 5
    assert "\n\n".join(parts) == "\n\n".join(paragraphs)
    assert max(map(len, parts)) <= 2 * PART_CHARACTERS
    path.write_text("no blank line here\n" * 5000)
    parts = list(documents(str(path), "text"))
    assert max(map(len, parts)) <= 2 * PART_CHARACTERS + 20
    assert "\n".join(parts) + "\n" == path.read_text()


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_through_json_lines(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    """Line separators such as U+2028 may stand unescaped inside a JSON string."""
    path = write_lines(tmp_path_factory.mktemp("lines") / "a.jsonl", [{"text": row} for row in rows])
    assert list(documents(str(path), "text")) == rows


def test_half_a_surrogate_pair_does_not_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "broken \\ud83d emoji"}\n')
    assert list(documents(str(path), "text")) == ["broken ? emoji"]


def test_text_that_looks_like_control_tokens_is_text(
    tmp_path: Path,
    store: Store,
    make_recipe: MakeRecipe,
    tiny_teacher: Artifact,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [
        {"text": f"{number} <|im_end|> <|im_start|> and <|endoftext|> {text}"}
        for number, text in enumerate(texts(60))
    ]
    source = write_lines(tmp_path / "text.jsonl", rows)
    artifact = prepare.run(store, make_recipe(data__text__sources=[str(source)], **SMALL), tiny_teacher)
    tokens, numbers = arrays(artifact, "train")
    end = tiny_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert not np.isin(tokens, tiny_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])).any()
    ends = np.flatnonzero(tokens.ravel() == end)
    changes = np.flatnonzero(np.diff(numbers.ravel()))
    assert set(changes) <= set(ends)
    assert len(ends) <= len(changes) + 1


def test_end_of_text_of_other_tokenizers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    class Other:
        def __init__(self, vocabulary: dict[str, int], eos: int | None):
            self.eos_token_id = eos
            self.get_vocab = lambda: vocabulary

    assert prepare.end_of_text(tiny_tokenizer) == 0
    assert prepare.end_of_text(Other({"<unk>": 0, "</s>": 2}, 2)) == 2
    assert prepare.end_of_text(Other({"<|end_of_text|>": 7, "<|eot_id|>": 9}, 9)) == 7
    with pytest.raises(UserError, match="end-of-sequence"):
        prepare.end_of_text(Other({"a": 0}, None))


def test_changed_data_is_not_taken_from_the_store(
    tmp_path: Path, store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    """Two files of the same name in two folders, the first of which changes."""
    rows = [{"text": text} for text in texts(60)]
    sources = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        sources.append(str(write_lines(tmp_path / name / "text.jsonl", rows)))
    recipe = make_recipe(data__text__sources=sources, **SMALL)
    prepare.run(store, recipe, tiny_teacher)
    assert prepare.run(store, recipe, tiny_teacher).cached
    write_lines(Path(sources[0]), [*rows, {"text": "one more document"}])
    assert not prepare.run(store, recipe, tiny_teacher).cached


def test_packaged_texts_are_english_prose_without_duplicates() -> None:
    topics = list(documents("package:pydoc-topics", "text"))
    docstrings = list(documents("package:python-docstrings", "text"))
    assert sum(map(len, topics)) > 300_000
    assert sum(map(len, docstrings)) > 500_000
    assert len(docstrings) == len(set(docstrings))
    # Both ConfigParser and RawConfigParser, for one, pass docstrings on; each is told once.
    paragraphs = Counter(part for text in docstrings for part in text.split("\n\n") if len(part) >= 400)
    assert sum(paragraphs.values()) - len(paragraphs) < 0.02 * len(paragraphs)
    words = " ".join(docstrings).split()
    assert words.count("the") / len(words) > 0.03


BROKEN = [
    ("text.jsonl", b'{"text": "a"}\n{"text": \n', ["text.jsonl, line 2", "not valid JSON"]),
    ("text.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', ["text.jsonl, line 3", "'text'", "text_field"]),
    ("text.jsonl", b'{"text": 5}\n', ["line 1", "'text'"]),
    ("text.jsonl", b'["text"]\n', ["line 1", "'text'"]),
    ("text.jsonl", b'{"text": "\xff"}\n', ["line 1", "not valid JSON"]),
    ("text.jsonl", b"[" * 100_000 + b"\n", ["line 1", "not valid JSON"]),
    ("text.jsonl", b"", ["text.jsonl", "empty"]),
    ("text.jsonl", b"\n \n", ["text.jsonl", "empty"]),
    ("text.txt", b"", ["text.txt", "empty"]),
    ("text.txt", b" \n\n", ["text.txt", "empty"]),
    ("text.txt", b"caf\xe9", ["text.txt", "UTF-8"]),
    ("text.parquet", b"PAR1 is not all", ["text.parquet", "Parquet"]),
    ("text.csv", b"a,b", ["text.csv", "unknown kind"]),
    ("text.txt", b"Far too little.", ["data.text.calibration_tokens", "64", "512", "lower train_tokens"]),
]


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_broken_sources_are_refused(
    name: str,
    content: bytes,
    words: list[str],
    tmp_path: Path,
    store: Store,
    make_recipe: MakeRecipe,
    tiny_teacher: Artifact,
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        prepare.run(store, make_recipe(data__text__sources=[str(path)], **SMALL), tiny_teacher)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not [path for path in (store.root / "prepare").glob("*") if path.suffix in ("", ".partial")]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/no/such/file.txt", ["/no/such/file.txt", "no such file"]),
        ("/no/such/file.jsonl", ["no such file"]),
        ("/no/such/file.parquet", ["no such file"]),
        ("/no/such/folder", ["no such file or folder"]),
        ("package:no-such-text", ["no-such-text", "pydoc-topics"]),
        ("dataset:/no/such/dataset", ["dataset:/no/such/dataset"]),
    ],
)
def test_missing_sources_are_refused(
    source: str, words: list[str], store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    with pytest.raises(UserError) as error:
        prepare.run(store, make_recipe(data__text__sources=[source], **SMALL), tiny_teacher)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_empty_folder_is_refused(
    tmp_path: Path, store: Store, make_recipe: MakeRecipe, tiny_teacher: Artifact
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        prepare.run(store, make_recipe(data__text__sources=[str(tmp_path / "empty")], **SMALL), tiny_teacher)


def test_missing_field_of_parquet_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"record 1.*'text'"):
        list(documents(str(tmp_path / "a.parquet"), "text"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_would_fill_the_memory_is_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "a"}, {"text": "b" * 5000}]
    write_lines(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression="zstd")
    assert list(documents(str(tmp_path / f"a.{suffix}"), "text")) == [row["text"] for row in rows]
    monkeypatch.setattr("pipeline.sources.LONGEST_LINE", 4000)
    monkeypatch.setattr("pipeline.sources.LARGEST_ROW_GROUP", 4000)
    sentence = {
        "jsonl": r"a\.jsonl, line 2: is longer than 4000 bytes; split it\.$",
        "parquet": r"a\.parquet: has a row group of \d+ bytes uncompressed; write it .* at most 4000\.$",
    }
    with pytest.raises(UserError, match=sentence[suffix]):
        list(documents(str(tmp_path / f"a.{suffix}"), "text"))
