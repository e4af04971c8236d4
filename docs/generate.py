"""Pages of the site that are made from the code itself, and pictures that are computed when it is built."""

import importlib.util
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altair
import torch
import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flows.command_line import app
from pipeline.pages import BLUE, FONT_SIZE, ORANGE, svg
from pipeline.recipe import Recipe
from taid import AdaptiveInterpolation

ROOT = Path(__file__).parents[1]
MUTATIONS = ROOT / "tests" / "export" / "test_mutations.py"
MODULES = {
    "taid": (
        *("objectives", "schedule", "fused", "teacher", "sampled", "student", "trainer", "checkpoints"),
        *("generated", "vocabulary", "errors"),
    ),
    "export": ("gguf", "mlc", "onnx", "ollama", "quantizations", "tensors", "runtime", "errors"),
}


def on_files(files: Files, config: Any) -> Files:
    """MkDocs' hook: adds the generated pages."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' hook: puts the pictures where a page says ``<!-- picture: NAME -->``."""
    for name, draw in PICTURES.items():
        mark = f"<!-- picture: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, f"<figure>{draw()}</figure>")
    return markdown


def pages() -> dict[str, str]:
    """Text of each generated page, by its path below docs/."""
    schemas = sorted((ROOT / "pipeline" / "schemas").glob("*.schema.json"))
    return {
        "reference/commands.md": commands(),
        "reference/recipe.md": recipe(),
        "reference/schemas.md": schema_page(schemas),
        "reference/mutations.md": mutations(),
        **{f"reference/{schema.name}": schema.read_text(encoding="utf-8") for schema in schemas},
        **{f"reference/{package}.md": python_page(package) for package in MODULES},
        "examples/taid_by_hand.md": notebook(ROOT / "examples" / "taid_by_hand.ipynb"),
    }


def commands() -> str:
    """Every command with its arguments and options."""
    lines = ["# Commands", "", "Generated from the program; `martlet COMMAND --help` says the same."]
    group: Any = typer.main.get_command(app)
    for name, command in leaves(group, ""):
        about, _, example = (command.help or "").partition("Example:")
        lines += ["", f"## martlet {name}", "", about.strip(), ""]
        lines += ["```", example.strip(), "```", ""] if example else []
        lines += ["| argument or option | default | meaning |", "| --- | --- | --- |"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            is_argument = parameter.param_type_name == "argument"
            names = (
                (parameter.metavar or parameter.name.upper()) if is_argument else ", ".join(parameter.opts)
            )
            default = "" if parameter.default in (None, False, ...) else f"`{parameter.default}`"
            if parameter.required:
                default = "required"
            lines.append(f"| `{names}` | {default} | {getattr(parameter, 'help', None) or ''} |")
    return "\n".join(lines) + "\n"


def mutations() -> str:
    """The ways in which the tests break exported files and the gate that catches each, out of the tests."""
    specification = importlib.util.spec_from_file_location("mutations", MUTATIONS)
    assert specification is not None
    assert specification.loader is not None
    tests: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tests)
    tables = {"GGUF": tests.GGUF, "ONNX": tests.ONNX, "ONNX int4": tests.INT4, "MLC": tests.MLC}
    rows = [(format, what, gate) for format, table in tables.items() for what, (_, gate) in table.items()]
    for name, (_, _, gate) in tests.BIASED.items():
        format, what = name.split(": ", 1)
        rows.append((format.upper(), what, gate))
    about = (
        f"Generated from `{MUTATIONS.relative_to(ROOT)}`: {len(rows)} ways to break an exported file. The "
        "tests break a sound file in each way, load it in its own runtime and ask that the named gate is "
        "missed; [what each gate catches](../explanations/gates.md) says what the gates are."
    )
    lines = ["# Broken files and their gates", "", about, ""]
    lines += ["| format | what is broken | gate that catches it |", "| --- | --- | --- |"]
    lines += [f"| {format} | {what} | {gate} |" for format, what, gate in rows]
    return "\n".join(lines) + "\n"


def leaves(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups in it, with their whole names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def recipe() -> str:
    """Every key of a recipe, section by section, from the classes that check it."""
    lines = ["# Recipe", "", "Generated from the classes that check a recipe. Unknown keys are errors."]
    for path, section in sections(Recipe, ""):
        lines += ["", f"## {path or 'The recipe itself'}", "", (section.__doc__ or "").strip(), ""]
        lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for name, field in section.model_fields.items():
            key = field.alias or name
            cells = (
                f"`{key}`",
                _type(field.annotation, f"{path}.{key}" if path else key),
                _default(field),
                field.description or "",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section of the recipe and all below it, with their paths."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = [field.annotation, *typing.get_args(field.annotation)]
        for candidate in inner:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                key = field.alias or name
                yield from sections(candidate, f"{path}.{key}" if path else key)


def _type(annotation: Any, path: str) -> str:
    """What a key takes, in words; a section is a link to its table."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{path}](#{path.replace('.', '')})"
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is typing.Annotated:
        return _type(inner[0], path)
    if origin is list:
        return f"list of {_type(inner[0], path)}"
    if origin is dict:
        return f"mapping to {_type(inner[1], path)}"
    if inner:  # X | None
        return f"{_type(inner[0], path)} or nothing"
    return {"str": "text", "int": "integer", "float": "number", "bool": "`true` or `false`"}[
        annotation.__name__
    ]


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        if field.default_factory is None:
            return "required"
        return "none" if field.default_factory is dict else "depends on the machine"
    if isinstance(field.default, BaseModel):
        return "its own"
    if field.default in (None, "", []):
        return "none"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def schema_page(schemas: list[Path]) -> str:
    """What the JSON files of a release hold, from their schemas."""
    lines = ["# Files of a release", "", "Generated from the JSON Schemas, which are part of the package."]
    for path in schemas:
        schema = json.loads(path.read_text(encoding="utf-8"))
        lines += ["", f"## {path.name.replace('.schema', '')}", ""]
        lines += [schema.get("description", ""), "", f"[{path.name}]({path.name})", ""]
        lines += ["| key | type | meaning |", "| --- | --- | --- |"]
        for key, value in schema["properties"].items():
            kind = value.get("type", "constant" if "const" in value else "object")
            kind = " or ".join(kind) if isinstance(kind, list) else kind
            lines.append(f"| `{key}` | {kind} | {value.get('description', '')} |")
    return "\n".join(lines) + "\n"


def python_page(package: str) -> str:
    """The public names of a package, by module."""
    blocks = [f"# {package}", "", f"::: {package}", "    options: {members: false}", ""]
    for module in MODULES[package]:
        blocks += [f"::: {package}.{module}", ""]
    return "\n".join(blocks)


def notebook(path: Path) -> str:
    """A notebook as a page: its text, its code, and what the code printed when the tests ran it."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output["text"]) for output in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed}```")
    parts.append(f"The notebook is `examples/{path.name}`; the tests run it.")
    return "\n\n".join(parts) + "\n"


def interpolation_picture() -> str:
    """The target between a student's and a teacher's distribution for four values of t."""
    words = ["rain", "snow", "sun", "wind", "a", "the"]
    student = torch.tensor([1.2, 0.4, 1.8, 0.2, 1.0, 0.6])
    teacher = torch.tensor([3.6, 2.4, 0.4, 0.8, -0.6, -1.0])
    values = [
        {"t": f"t = {t:g}", "word": word, "probability": float(p)}
        for t in (0.0, 0.4, 0.7, 1.0)
        for word, p in zip(words, ((1 - t) * student + t * teacher).softmax(-1), strict=True)
    ]
    chart = (
        altair.Chart(altair.Data(values=values))
        .mark_bar(color=BLUE)
        .encode(
            x=altair.X("word:N", sort=words, title=None),
            y=altair.Y("probability:Q", title="probability", axis=altair.Axis(tickCount=4)),
        )
        .properties(width=190, height=110)
        # Two beside each other: four would be too small on a phone.
        .facet(
            facet=altair.Facet(
                "t:N", title=None, header=altair.Header(labelColor="currentColor", labelFontSize=FONT_SIZE)
            ),
            columns=2,
        )
    )
    return svg(chart, "The target of TAID for t = 0 (the student), 0.4, 0.7 and 1 (the teacher)")


def schedule_picture() -> str:
    """t over a run, linear and adaptive, with the loss that drives the adaptive part."""
    total = 200
    values = []
    for name, adaptive, alpha in (("linear", False, 0.0), ("adaptive, alpha 10 / N", True, 10 / total)):
        schedule = AdaptiveInterpolation(t_start=0.4, alpha=alpha, adaptive=adaptive)
        for step in range(1, total + 1):
            schedule.update(5.0 * 0.985**step, step, total)
            values.append({"step": step, "t": schedule.t, "schedule": name})
    legend = altair.Legend(title=None, orient="top", labelLimit=300)
    names = ["linear", "adaptive, alpha 10 / N"]
    chart = (
        altair.Chart(altair.Data(values=values))
        .mark_line(strokeWidth=2)
        .encode(
            x=altair.X("step:Q", title="optimizer step"),
            y=altair.Y("t:Q", scale=altair.Scale(domain=[0, 1])),
            color=altair.Color(
                "schedule:N", scale=altair.Scale(domain=names, range=[BLUE, ORANGE]), legend=legend
            ),
            strokeDash=altair.StrokeDash(
                "schedule:N", scale=altair.Scale(domain=names, range=[[1, 0], [5, 3]]), legend=legend
            ),
        )
        .properties(width=480, height=220)
    )
    return svg(chart, "t over 200 steps of a run whose loss falls by 1.5 per cent a step")


PICTURES: dict[str, Callable[[], str]] = {
    "interpolation": interpolation_picture,
    "schedule": schedule_picture,
}
