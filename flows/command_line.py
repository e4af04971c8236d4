"""The command line: ``martlet``."""

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from export.errors import ExportError
from pipeline.errors import EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_INTERRUPTED, GateFailed, UserError

INTERRUPTED = "martlet: interrupted; the same command goes on where this one stopped."
DEFAULT_RECIPE = Path("recipes/smollm2-135m-to-99m.yaml")

app = typer.Typer(
    help="martlet distils a big language model into a small one and ships it to devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on the last line.")]
RecipePath = Annotated[Path, typer.Argument(help="Path of a recipe, a YAML file.")]


@app.command()
def ship(
    recipe: RecipePath = DEFAULT_RECIPE,
    store: Annotated[Path, typer.Option(help="Folder of finished stages.")] = Path("store"),
    release: Annotated[Path, typer.Option(help="Where the release is laid out.")] = Path("release"),
    as_json: AsJson = False,
) -> None:
    """Run a recipe from teacher to release folder. Example: martlet ship recipes/smoke.yaml"""
    check_recipe_file(recipe)
    with quiet_prefect(store):
        from flows.distill_and_ship import distill_and_ship

        result = distill_and_ship(str(recipe), str(store), str(release))
    if as_json:
        print(json.dumps(result))
    else:
        show_release(result)


@app.command()
def check(recipe: RecipePath = DEFAULT_RECIPE, as_json: AsJson = False) -> None:
    """Check a recipe and run nothing. Example: martlet check recipes/smoke.yaml"""
    plan = check_recipe_file(recipe)
    if as_json:
        print(json.dumps({"recipe": str(recipe), "name": plan.name, "valid": True}))
    else:
        print(f"{recipe}: valid ({plan.name}).")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder with safetensors.")],
    output: Annotated[Path, typer.Option(help="New folder that receives the files.")],
    format: Annotated[str, typer.Option(help="gguf, mlc or onnx.")] = "gguf",
    quantization: Annotated[str, typer.Option(help="Quantizations, separated by commas.")] = "q4_k_m",
    name: Annotated[str | None, typer.Option(help="First part of the file names.")] = None,
    pre_tokenizer: Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export any Hugging Face folder. Example: martlet export my-model --format gguf --output out"""
    wanted = [part.strip() for part in quantization.split(",") if part.strip()]
    name = name or model.resolve().name
    report = progress_line
    if format == "gguf":
        from export.gguf import export_gguf

        paths = export_gguf(model, output, name.lower(), wanted, pre_tokenizer=pre_tokenizer, progress=report)
    elif format == "onnx":
        from export.onnx import export_onnx

        paths = export_onnx(model, output, name, wanted, progress=report)
    elif format == "mlc":
        from export.mlc import export_mlc

        paths = [export_mlc(model, output / q, name, q, progress=report) for q in wanted]
    else:
        raise UserError(f"--format: there is no format {format!r}; choose gguf, mlc or onnx.")
    if as_json:
        print(json.dumps([str(path) for path in paths]))
    else:
        for path in paths:
            print(path)


@app.command()
def validate(
    release: Annotated[Path, typer.Argument(help="Release folder.")] = Path("release"),
    as_json: AsJson = False,
) -> None:
    """Check every file of a release against its manifest. Example: martlet validate release"""
    from pipeline.release import verify

    problems = verify(release)
    if as_json:
        print(json.dumps({"release": str(release), "problems": problems}))
    if problems:
        raise GateFailed(problems[0] + (f" ({len(problems) - 1} more.)" if len(problems) > 1 else ""))
    if not as_json:
        print(f"{release}: every file is as the manifest says.")


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="A .gguf or .onnx file, an MLC or a Hugging Face folder.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
) -> None:
    """Talk with any released file. Example: martlet chat release/NAME-Instruct-GGUF/name-q4_k_m.gguf"""
    from export.runtime import open_runtime
    from pipeline.chat import converse

    converse(open_runtime(model, threads), max_tokens)


def check_recipe_file(path: Path) -> Any:
    """Loads a recipe and checks the files that it names."""
    from pipeline.check import check_recipe
    from pipeline.recipe import load_recipe

    plan = load_recipe(path)
    check_recipe(plan, path)
    return plan


def progress_line(line: str) -> None:
    """One line on standard error, so that standard output stays the result."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_prefect(store: Path) -> Iterator[None]:
    """An embedded Prefect server with its data in the store, nothing sent out, no chatter."""
    store.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str((store / "prefect").resolve())
    # A server that the user's shell points to is for `prefect deployment run`, not for this command.
    os.environ.pop("PREFECT_API_URL", None)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
    for name in ("prefect", "httpx", "uvicorn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    progress = logging.getLogger("martlet")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    progress.setLevel(logging.INFO)
    progress.propagate = False
    progress.addHandler(handler)
    before = {number: signal.signal(number, stop_now) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
        progress.removeHandler(handler)


def stop_now(number: int, frame: FrameType | None) -> None:
    """Ends this process and its children at once.

    Ctrl-C reaches the embedded server, too; unwinding through Prefect would then wait for a server that is
    gone. Nothing is lost: checkpoints and finished stages are on disk, and what is half-made has no final
    name and is thrown away by the next run.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)


def show_release(result: dict[str, Any]) -> None:
    """The stages with their times, and where the release is."""
    console = Console()
    table = Table(title="Stages", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("")
    for stage in result["stages"]:
        table.add_row(stage["name"], f"{stage['seconds']:.1f}", "from the store" if stage["cached"] else "")
    console.print(table)
    table = Table(title="Files", title_justify="left")
    for heading in ("file", "MB", "mean KL to the model", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    for file in result["files"]:
        speed = file["decode_tokens_per_s"]
        table.add_row(
            file["file"],
            f"{file['bytes'] / 1e6:.1f}",
            f"{file['mean_kl']:.4f}",
            "" if speed is None else f"{speed:.1f}",
        )
    console.print(table)
    console.print(f"Release: {result['release']}", soft_wrap=True)
    console.print(f"Report:  {Path(result['release']) / 'report.html'}", soft_wrap=True)


def run(command: Callable[[], Any]) -> int:
    """Runs a command; errors that are the user's become one sentence and an exit code."""
    try:
        command()
    except GateFailed as error:
        print(f"martlet: {error}", file=sys.stderr)
        return EXIT_GATE_FAILED
    except (UserError, ExportError) as error:
        print(f"martlet: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as error:
        return int(error.code or 0) if not isinstance(error.code, str) else EXIT_BAD_INPUT
    except Exception as error:
        # Looked up only now: taid loads torch, and commands that need neither should not wait for it.
        from taid.errors import TaidError

        if not isinstance(error, TaidError):
            raise
        print(f"martlet: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def main() -> None:
    """Entry point of the ``martlet`` command."""

    def command() -> None:
        try:
            app(standalone_mode=False)
        except typer.Abort:
            raise KeyboardInterrupt from None
        except TyperException as error:  # a wrong option or a missing argument
            problem = str(error).rstrip(".").split("\n")[0]
            raise UserError(f"{problem}; martlet --help lists the commands and their options.") from None

    sys.exit(run(command))


if __name__ == "__main__":
    main()
