"""Where text and conversations come from: files, `datasets` names, and packages that are installed."""

import ast
import codecs
import importlib.metadata
import json
import platform
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml

from pipeline.artifacts import sha256_of_file
from pipeline.errors import UserError, hub_error

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
CHAT_SUFFIXES = (".jsonl", ".parquet")
PART_CHARACTERS = 8192
"""A plain text file longer than this is cut into documents of about this length, at blank lines."""
LONGEST_LINE = 2**26
"""Bytes of a line of JSON Lines."""
LARGEST_ROW_GROUP = 2**30
"""Bytes of a row group of Parquet, uncompressed: some kilobytes of a file can be gigabytes."""
SHUFFLE_BUFFER = 10_000
"""Rows among which a streamed data set is shuffled."""


def documents(source: str, field: str, seed: int = 0) -> Iterator[str]:
    """The documents of one text source, read as they are asked for.

    A record of JSON Lines, Parquet or a data set is a document. So is a plain text file, unless it is long:
    then it is cut at blank lines, so that one book can be split into training and held-out text.

    Args:
        source: a file, a folder of files, ``dataset:NAME``, ``dataset:NAME:CONFIGURATION`` or
            ``package:NAME``.
        field: the field that holds the text, where records have fields.
        seed: of the order in which a data set is streamed.

    Raises:
        UserError: the source does not exist, is empty or broken; the sentence names file and line.
    """
    kind, _, name = source.partition(":")
    if kind == "package" and name:
        yield from _packaged_text(name)
    elif kind == "dataset" and name:
        for number, row in enumerate(_dataset(name, seed), start=1):
            yield _text_of(row, field, f"{source}, record {number}")
    else:
        for file in _files(Path(source), TEXT_SUFFIXES):
            yield from _file_documents(file, field)


def conversations(source: str, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """The conversations of a .jsonl or .parquet file, a folder of them or ``dataset:NAME``, each checked.

    Raises:
        UserError: the source does not exist, is empty or broken; the sentence names file and line.
    """
    kind, _, name = source.partition(":")
    if kind == "dataset" and name:
        for number, row in enumerate(_dataset(name, seed), start=1):
            yield checked_messages(row, f"{source}, record {number}")
        return
    for file in _files(Path(source), CHAT_SUFFIXES):
        empty = True
        for where, row in _records(file, CHAT_SUFFIXES):
            empty = False
            yield checked_messages(row, where)
        if empty:
            raise UserError(f"{file}: holds no conversation; give one JSON object with `messages` a line.")


def source_digests(sources: list[str]) -> dict[str, str]:
    """What identifies the content of sources, so that changed data is never mistaken for the old.

    SHA-256 of each local file; the version of the package or of the Python that text and prompts come from.
    A data set of a hub has none: name a fixed one.
    """
    digests = {}
    for place, source in enumerate(sources):
        kind, _, name = source.partition(":")
        if kind == "package" and name:
            digests[source] = f"Python {platform.python_version()}"
        elif kind == "prompts" and name:
            package = "reasoning-gym" if name == "reasoning-gym" else "chatterbot-corpus"
            try:
                digests[source] = f"{package} {importlib.metadata.version(package)}"
            except importlib.metadata.PackageNotFoundError:
                digests[source] = f"{package} is not installed"
        elif kind == "dataset" and name:
            continue
        elif Path(source).exists():
            root = Path(source)
            files = [root] if root.is_file() else sorted(root.rglob("*"))
            for file in files:
                if file.is_file() and file.suffix in TEXT_SUFFIXES:
                    inside = file.name if file == root else file.relative_to(root).as_posix()
                    digests[f"{place}/{inside}"] = sha256_of_file(file)
    return digests


def checked_messages(row: Any, where: str) -> list[dict[str, str]]:
    """The messages of a record: roles and contents are strings, the assistant speaks last.

    Raises:
        UserError: they are not.
    """
    messages = row.get("messages") if isinstance(row, dict) else None
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
        checked.append({"role": role, "content": _encodable(content)})
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


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or all files of these kinds in a folder, in the order of their names."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
    if not files:
        raise UserError(f"{path}: this folder holds no {', '.join(suffixes)} file.")
    return files


def _file_documents(path: Path, field: str) -> Iterator[str]:
    empty = True
    if path.suffix in (".txt", ".md"):
        for part in _parts(path):
            empty = False
            yield part
    else:
        for where, row in _records(path, TEXT_SUFFIXES):
            empty = False
            yield _text_of(row, field, where)
    if empty:
        raise UserError(f"{path}: is empty; give text to distil on.")


def _parts(path: Path) -> Iterator[str]:
    """A text file as documents of about ``PART_CHARACTERS``, cut at a blank line, or at any line end where
    twice that length has none."""
    part: list[str] = []
    length = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                part.append(line)
                length += len(line)
                if length >= 2 * PART_CHARACTERS or (length >= PART_CHARACTERS and not line.strip()):
                    yield "".join(part).strip("\n")
                    part, length = [], 0
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    if "".join(part).strip():
        yield "".join(part).strip("\n")


def _records(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The records of a JSON Lines or Parquet file, each with the words that say where it stands."""
    if path.suffix == ".parquet":
        try:
            number = 0
            file = pyarrow.parquet.ParquetFile(path)
            groups = (file.metadata.row_group(place) for place in range(file.num_row_groups))
            if (largest := max((each.total_byte_size for each in groups), default=0)) > LARGEST_ROW_GROUP:
                raise UserError(
                    f"{path}: has a row group of {largest} bytes uncompressed; write it with ones of at "
                    f"most {LARGEST_ROW_GROUP}."
                )
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", row
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{path}: no such file.") from None
        except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: cannot be read as Parquet ({reason}).") from None
    elif path.suffix == ".jsonl":
        number = 0
        try:
            # As bytes: text lines would also end at the other line separators that JSON strings may hold.
            with path.open("rb") as lines:
                for number, line in enumerate(iter(partial(lines.readline, LONGEST_LINE + 1), b""), start=1):
                    if len(line) > LONGEST_LINE:
                        raise UserError(
                            f"{path}, line {number}: is longer than {LONGEST_LINE} bytes; split it."
                        )
                    line = line.removeprefix(codecs.BOM_UTF8).strip()
                    if line:
                        yield f"{path}, line {number}", json.loads(line)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file.") from None
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); mend the line.") from None
    else:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.")
        raise UserError(f"{path}: unknown kind of file; give {', '.join(suffixes)}.")


def _text_of(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: has no text in the field {field!r}; set data.text.text_field.")
    return _encodable(text)


def _encodable(text: str) -> str:
    """JSON can escape half a surrogate pair, which no encoding of text can hold; it becomes a ``?``."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _dataset(name: str, seed: int) -> Iterator[Any]:
    import datasets

    name, _, configuration = name.partition(":")
    empty = True
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
            empty = False
            yield row
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise hub_error(f"dataset:{name}: cannot be loaded ({reason}).", error) from error
    if empty:
        raise UserError(f"dataset:{name}: holds no rows in its split `train`.")


def _packaged_text(name: str) -> Iterator[str]:
    if name == "pydoc-topics":
        import pydoc_data.topics

        yield from (pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    elif name == "python-docstrings":
        yield from _docstrings(Path(sysconfig.get_path("stdlib")))
    else:
        raise UserError(f"package:{name}: no such text; choose pydoc-topics or python-docstrings.")


def _docstrings(folder: Path) -> Iterator[str]:
    """One document a module of the standard library: its docstrings of a few lines and more, in order, those
    left out that an earlier module has."""
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if (
            parts[0] in ("site-packages", "dist-packages", "test", "idlelib", "lib2to3", "turtledemo")
            or "tests" in parts
        ):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        kept = [text for text in dict.fromkeys(found) if text and len(text) >= 200 and text not in seen]
        seen.update(kept)
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
