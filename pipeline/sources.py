"""Where text and conversations come from: files, `datasets` names, and packages that are installed."""

import ast
import importlib.metadata
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml

from pipeline.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


def documents(source: str, field: str) -> Iterator[str]:
    """The documents of one text source.

    Args:
        source: a file, a folder of files, ``dataset:NAME`` or ``package:NAME``.
        field: the field that holds the text, where records have fields.

    Raises:
        UserError: the source does not exist, is empty or broken; the sentence names file and line.
    """
    kind, _, name = source.partition(":")
    if kind == "package" and name:
        yield from _packaged_text(name)
    elif kind == "dataset" and name:
        for row in _dataset(name):
            yield _text_of(row, field, source)
    else:
        yield from _file_documents(Path(source), field)


def conversations(source: str) -> Iterator[list[dict[str, str]]]:
    """The conversations of a .jsonl or .parquet file or ``dataset:NAME``, each checked.

    Raises:
        UserError: the source does not exist, is empty or broken; the sentence names file and line.
    """
    kind, _, name = source.partition(":")
    rows = _dataset(name) if kind == "dataset" and name else _records(Path(source))
    number = 0
    for number, row in enumerate(rows, start=1):
        yield checked_messages(row, f"{source}, record {number}")
    if number == 0:
        raise UserError(f"{source}: holds no conversation; give one JSON object with `messages` a line.")


def checked_messages(row: Any, where: str) -> list[dict[str, str]]:
    """The messages of a record: roles and contents are strings, the assistant speaks last.

    Raises:
        UserError: they are not.
    """
    messages = row.get("messages") if isinstance(row, dict) else None
    if hasattr(messages, "tolist"):
        messages = messages.tolist()
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: has no `messages` list; give role and content of each turn.")
    checked = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError(
                f"{where}: every message needs a role (system, user or assistant) and a content string."
            )
        checked.append({"role": role, "content": content})
    if checked[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message must be the assistant's.")
    return checked


def packaged_file(package: str, suffix: str) -> Path | None:
    """A file that an installed package carries, found without importing the package."""
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"package:{package}: the package is not installed; install it (pip install {package})."
        ) from None
    found = [file for file in files if str(file).endswith(suffix)]
    return Path(str(found[0].locate())) if found else None


def _file_documents(path: Path, field: str) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{path}: holds no {', '.join(TEXT_SUFFIXES)} file.")
        for file in files:
            yield from _file_documents(file, field)
    elif path.suffix in (".txt", ".md"):
        yield _read(path)
    else:
        number = 0
        for number, row in enumerate(_records(path), start=1):
            yield _text_of(row, field, f"{path}, record {number}")
        if number == 0:
            raise UserError(f"{path}: is empty; give text to distil on.")


def _records(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        try:
            file = pyarrow.parquet.ParquetFile(path)
            for batch in file.iter_batches():
                yield from batch.to_pylist()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file.") from None
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}).") from None
    elif path.suffix == ".jsonl":
        for number, line in enumerate(_read(path).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error}); mend the line.") from None
    else:
        if not path.exists():
            raise UserError(f"{path}: no such file.")
        raise UserError(f"{path}: unknown kind of file; give .txt, .jsonl or .parquet.")


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; give text to distil on.")
    return text


def _text_of(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: has no text in the field {field!r}; set data.text.text_field.")
    return text


def _dataset(name: str) -> Iterator[Any]:
    import datasets

    try:
        yield from datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"dataset:{name}: cannot be loaded ({reason}).") from error


def _packaged_text(name: str) -> Iterator[str]:
    if name == "pydoc-topics":
        import pydoc_data.topics

        yield from (pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    elif name == "python-docstrings":
        yield from _docstrings(Path(sysconfig.get_path("stdlib")))
    else:
        raise UserError(f"package:{name}: no such text; choose pydoc-topics or python-docstrings.")


def _docstrings(folder: Path) -> Iterator[str]:
    """One document a module of the standard library: its docstrings of a few lines and more, in order."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if parts[0] in ("site-packages", "test", "idlelib", "lib2to3", "turtledemo") or "tests" in parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        kept = [text for text in found if text and len(text) >= 200]
        if kept:
            yield "\n\n".join(kept)


TOPICS = [
    "rain",
    "the moon",
    "bread",
    "bicycles",
    "sleep",
    "music",
    "volcanoes",
    "trees",
    "glass",
    "money",
    "maps",
    "bees",
    "tea",
    "football",
    "rivers",
    "batteries",
    "clouds",
    "chess",
    "gardens",
    "whales",
    "paper",
    "magnets",
    "salt",
    "trains",
    "bridges",
    "winter",
    "coffee",
    "libraries",
    "dreams",
    "compost",
    "the heart",
    "gravity",
    "photography",
    "honey",
    "deserts",
    "kites",
    "earthquakes",
    "lighthouses",
    "the alphabet",
    "soap",
]
QUESTIONS = (
    "What is interesting about {}?",
    "Explain {} to a child in one sentence.",
    "Write one sentence about {}.",
    "Give me a tip about {}.",
)
EVERYDAY_TOPICS = ("computers", "food", "health", "history", "literature", "money", "movies", "science")
"""Files of chatterbot-corpus that ask about the world; the others tease a robot about itself."""


def everyday_prompts() -> Iterator[str]:
    """Short questions about the world: those of chatterbot-corpus (BSD licence), and plain ones made here."""
    yield from (question.format(topic) for question in QUESTIONS for topic in TOPICS)

    try:
        files = importlib.metadata.distribution("chatterbot-corpus").files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "prompts:everyday: the package chatterbot-corpus is not installed; "
            "install it (pip install chatterbot-corpus)."
        ) from None
    for file in sorted(files, key=str):
        if "/english/" not in str(file) or file.stem not in EVERYDAY_TOPICS:
            continue
        values = yaml.safe_load(Path(str(file.locate())).read_text(encoding="utf-8"))
        for exchange in values.get("conversations", []):
            question = exchange[0]
            if isinstance(question, str) and 12 <= len(question) <= 120:
                yield question.strip()


def reasoning_prompts(seed: int) -> Iterator[str]:
    """Short procedural questions of reasoning-gym (Apache-2.0)."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "prompts:reasoning-gym: the package reasoning-gym is not installed; "
            "install it (pip install reasoning-gym)."
        ) from None
    for name in ("basic_arithmetic", "leg_counting", "word_sorting", "calendar_arithmetic"):
        for entry in reasoning_gym.create_dataset(name, size=200, seed=seed):
            question = entry["question"].strip()
            if len(question) <= 300:
                yield question
