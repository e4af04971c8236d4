"""The command line: ``martlet``."""

import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from export import quantizations
from export.errors import ExportError
from flows import store_commands
from flows.interrupts import (
    INTERRUPTED,
    closed_before_ending,
    ending_at_once,
    ending_with_server,
    leashed_children,
)
from pipeline.errors import EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_INTERRUPTED, GateFailed, UserError

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
SERVER_SECONDS = "600"
"""Seconds in which Prefect's embedded server must answer; it takes ten, and minutes on a crowded machine."""
WIDTH_OF_COMPARISON = 170
"""Columns of a terminal that the whole table of ``martlet compare`` takes."""
DEFAULT_RECIPE = Path("recipes/smollm2-135m-to-99m.yaml")

WELCOME = """martlet distils a big language model into a small one and ships it to devices.

A first run of every stage, on a small scale (minutes):

  martlet check recipes/smoke.yaml
  martlet ship recipes/smoke.yaml --release release-smoke
  martlet chat release-smoke

Then a model of your own: copy recipes/smollm2-135m-to-99m.yaml, whose comments explain the keys.

martlet --help lists the commands, martlet COMMAND --help explains one, and
martlet --install-completion teaches them to your shell."""

app = typer.Typer(
    help="martlet distils a big language model into a small one and ships it to devices.",
    pretty_exceptions_enable=False,
)
app.add_typer(store_commands.app, name="store")
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on the last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors and the result.")]
ReleaseOrFile = Annotated[
    Path,
    typer.Argument(
        metavar="RELEASE_OR_FILE",
        help="A release, a .gguf or .onnx file, or an MLC or Hugging Face folder.",
    ),
]
WhichFile = Annotated[
    str | None, typer.Option(help="Which of several: a part of its path, such as q4_k_m or ONNX.")
]
RecipePath = Annotated[Path, typer.Argument(help="Path of a recipe, a YAML file.")]


@app.callback(invoke_without_command=True)
def welcome(context: typer.Context) -> None:
    """What ``martlet`` alone says: how to begin."""
    if context.invoked_subcommand is None:
        print(WELCOME)


@app.command()
def ship(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RECIPE", help=f"Recipes, YAML files; {DEFAULT_RECIPE} if left out."),
    ] = None,
    store: Annotated[Path, typer.Option(help="Folder of finished stages.")] = Path("store"),
    release: Annotated[Path, typer.Option(help="Where the release is laid out.")] = Path("release"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe from teacher to release folder, or several one after the other.

    Example: martlet ship recipes/smoke.yaml --release release-smoke
    """
    paths = recipes or [DEFAULT_RECIPE]
    with ending_at_once(), leashed_children():
        plans = [check_recipe_file(path) for path in paths]
        with quiet_prefect(store), progress_shown(plans, paths, store, release, quiet) as live:
            from flows.distill_and_ship import distill_and_ship
            from flows.prefect_database import put_damaged_aside

            put_damaged_aside(store)
            several = [str(path) for path in paths] if len(paths) > 1 else None
            result = distill_and_ship(str(paths[0]), str(store), str(release), several)
    if as_json:
        print(json.dumps(result))
        return
    for each in result["releases"] if several else [result]:
        if quiet:
            print(each["release"])
        else:
            show_release(each, with_stages=not live)
    if several:
        print(result["comparison"] if quiet else f"Page:    {result['comparison']}")


@app.command()
def check(recipe: RecipePath = DEFAULT_RECIPE, as_json: AsJson = False) -> None:
    """Check a recipe and run nothing.

    Example: martlet check recipes/smoke.yaml
    """
    from pipeline.licences import unjudged

    plan = check_recipe_file(recipe)
    warn_unjudged(recipe, unjudged(plan))
    if as_json:
        print(json.dumps({"recipe": str(recipe), "name": plan.name, "valid": True}))
    else:
        print(f"{recipe}: valid ({plan.name}).")


@app.command()
def plan(
    recipe: RecipePath = DEFAULT_RECIPE,
    devices: Annotated[int, typer.Option(help="Accelerators that share the work.")] = 1,
    precision: Annotated[str | None, typer.Option(help="bf16 (float32 master weights) or fp32.")] = None,
    device_memory: Annotated[float | None, typer.Option(help="GB of one device, to say what fits.")] = None,
    tflops: Annotated[float | None, typer.Option(help="Sustained TFLOP/s of one device.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="Training tokens/s of all devices.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe will take, before anything runs.

    Example: martlet plan recipes/tinyswallow-1.5b.yaml --devices 8 --device-memory 80 --tflops 300
    """
    from pipeline import plan as planning
    from pipeline.recipe import load_recipe

    if precision not in (None, "bf16", "fp32"):
        raise UserError(f"--precision: there is no {precision!r}; choose bf16 or fp32.")
    if devices < 1:
        raise UserError(f"--devices: {devices} devices run nothing; give 1 or more.")
    for option, number in (("--tflops", tflops), ("--tokens-per-second", tokens_per_second)):
        if number is not None and number <= 0:
            raise UserError(f"{option}: {number} is no throughput; give a number above 0.")
    facts = planning.run(load_recipe(recipe), devices, precision, tokens_per_second, tflops, device_memory)
    if as_json:
        print(json.dumps(facts))
    else:
        show_plan(facts)


@app.command()
def compare(
    recipe: RecipePath = DEFAULT_RECIPE,
    objectives: Annotated[str, typer.Option(help="Objectives, separated by commas, or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    tokens: Annotated[
        int | None, typer.Option(help="Training tokens of a run; the recipe's if left out.")
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help="TAID with other settings, such as t_start=0.2,alpha=8/N; may be given again."),
    ] = None,
    store: Annotated[Path, typer.Option(help="Folder of finished stages.")] = Path("store"),
    output: Annotated[Path, typer.Option(help="Folder of the page and its JSON.")] = Path("comparison"),
    release: Annotated[
        Path | None, typer.Option(help="Release whose report is to show the comparison, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare objectives on one student.

    Example: martlet compare recipes/smoke.yaml --objectives taid,forward_kl --seeds 0,1
    """
    plan = check_recipe_file(recipe)
    from pipeline import compare as study
    from pipeline.artifacts import Store, in_use

    names = study.OBJECTIVES if objectives == "all" else [name for name in objectives.split(",") if name]
    entries = study.contenders(plan, [name.strip() for name in names], schedule or [], tokens)
    if release is not None:
        study.require_same_start(plan, release)
    numbers = whole_numbers("--seeds", seeds)
    with in_use(store):
        facts = study.run(Store(store, report=progress_line), plan, entries, numbers, tokens)
    files = study.write(facts, output)
    if release is not None:
        study.show_in_report(facts, release)
    if as_json:
        print(json.dumps({"files": [str(path) for path in files], "contenders": standings(facts)}))
    else:
        show_comparison(facts)
        Console().print(f"Page: {files[1]}", soft_wrap=True)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Hugging Face or adapter folder with safetensors.")],
    output: Annotated[Path, typer.Option(help="New folder that receives the files.")],
    format: Annotated[
        str,
        typer.Option(
            help="gguf, mlc or onnx, or several, separated by commas.",
            autocompletion=lambda: ["gguf", "mlc", "onnx"],
        ),
    ] = "gguf",
    quantization: Annotated[
        str | None,
        typer.Option(
            help="Quantizations, separated by commas; q4_k_m, q4f32_1 and int4 if left out.",
            autocompletion=lambda: [*quantizations.GGUF, *quantizations.MLC, *quantizations.ONNX],
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="First part of the file names.")] = None,
    pre_tokenizer: Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer.")] = None,
    importance_matrix: Annotated[
        Path | None, typer.Option(help="Text file that weighs the rounding errors of GGUF below q8_0.")
    ] = None,
    gptq: Annotated[
        Path | None, typer.Option(help="Text file on which GPTQ rounds the layers of ONNX's int4.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Export any Hugging Face folder, or an adapter merged into its model.

    Example: martlet export my-model --format gguf,onnx --quantization q8_0,q4_k_m,int4 --output exported
    """
    from pipeline import export_folder

    paths = export_folder.run(
        model,
        output,
        export_folder.wanted_of(format, quantization),
        name or model.resolve().name,
        pre_tokenizer=pre_tokenizer,
        importance_text=importance_matrix,
        gptq_text=gptq,
        progress=(lambda line: None) if quiet else progress_line,
    )
    if as_json:
        print(json.dumps([str(path) for path in paths]))
    else:
        for path in paths:
            print(path)


@app.command()
def validate(
    release: Annotated[
        Path | None, typer.Argument(help="Release folder; release if left out.", show_default=False)
    ] = None,
    store: Annotated[Path | None, typer.Option(help="A store, to check in place of a release.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of a release against its manifest, or every file of a store.

    Example: martlet validate release
    """
    if store is None:
        from pipeline.release import unjudged_licences, verify

        release = release or Path("release")
        damaged = verify(release)
        if not damaged:
            warn_unjudged(release, unjudged_licences(release))
        tell_problems(release, damaged, "every file is", as_json)
        return
    if release is not None:
        raise UserError("--store: is checked alone; leave the release out, or check it by itself.")
    from pipeline.inventory import problems

    found = problems(store)
    if as_json:
        print(json.dumps({"store": str(store), "problems": found}))
    elif found:
        print("\n".join(f"{problem}." for problem in found))
    if found:
        raise GateFailed(f"{store}: {len(found)} damaged; the next run makes what it needs of it anew.")
    if not as_json:
        print(f"{store}: every file is as it was written.")


@app.command()
def compare_releases(
    releases: Annotated[list[Path], typer.Argument(help="Release folders, two or more.")],
    output: Annotated[Path, typer.Option(help="Folder of the page and its JSON.")] = Path(
        "release-comparison"
    ),
    as_json: AsJson = False,
) -> None:
    """Put releases side by side on one page.

    Example: martlet compare-releases release release.previous-1
    """
    from pipeline import compare_releases as comparison

    facts = comparison.run(*releases)
    files = comparison.write(facts, output)
    if as_json:
        print(json.dumps({"files": [str(path) for path in files], "recipe": facts["recipe"]}))
    else:
        print(f"Page: {files[1]}")


@app.command()
def choose(
    release: Annotated[Path, typer.Argument(help="Release folder.")] = Path("release"),
    max_size: Annotated[str | None, typer.Option(help="Most on disk, such as 80MB.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Most memory at the peak, such as 300MB.")] = None,
    min_speed: Annotated[float | None, typer.Option(help="Least decoded tokens a second.")] = None,
    picture: Annotated[Path | None, typer.Option(help="SVG file to write.")] = Path("choice.svg"),
    as_json: AsJson = False,
) -> None:
    """Say which file of a release to ship, within budgets of size, memory and speed.

    Example: martlet choose release --max-size 85MB --min-speed 40
    """
    from pipeline import choose as choosing

    choice = choosing.choose(
        release,
        None if max_size is None else choosing.bytes_of(max_size, "--max-size"),
        None if max_memory is None else choosing.bytes_of(max_memory, "--max-memory"),
        min_speed,
    )
    if picture is not None:
        try:
            picture.write_text(choosing.picture(choice), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--picture: {picture}: cannot be written ({error.strerror}).") from None
    if as_json:
        print(json.dumps({**choice, "picture": None if picture is None else str(picture)}))
    else:
        show_choice(choice, release)
        if picture is not None:
            Console().print(f"Picture: {picture}", soft_wrap=True)
    if choice["ship"] is None:
        raise GateFailed(f"{release}: none of its {len(choice['files'])} files fits; raise a budget.")


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(help="Release folder.")] = Path("release"),
    signed_by: Annotated[
        Path | None,
        typer.Option(help="OpenSSH's file of allowed signers: one of them has to have signed it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a release's files, origin, bill of materials and, if asked to, signature.

    Example: martlet verify release
    """
    from pipeline.release import verify as damaged
    from pipeline.release import verify_inputs
    from pipeline.signing import signer

    problems = damaged(release) + verify_inputs(release)
    fine = "every file, the inputs and the bill of materials are"
    if signed_by is not None:
        try:
            fine = f"signed by {signer(release, signed_by)}; {fine}"
        except UserError as error:
            problems.append(str(error))
    tell_problems(release, problems, fine, as_json)


@app.command()
def sign(
    release: Annotated[Path, typer.Argument(help="Release folder.")] = Path("release"),
    key: Annotated[
        Path | None, typer.Option(help="SSH key: the private one, or the public one of an agent's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign a release with an SSH key; martlet verify --signed-by checks it.

    Example: martlet sign release --key ~/.ssh/id_ed25519
    """
    from pipeline.signing import sign as signed

    if key is None:
        raise UserError("--key is missing; give an SSH key (ssh-keygen -t ed25519 makes one).")
    signature = signed(release, key)
    if as_json:
        print(json.dumps({"release": str(release), "signature": str(signature)}))
    else:
        print(f"{release}: signed, in {signature}.")


@app.command()
def publish(
    release: Annotated[Path, typer.Argument(help="Release folder.")] = Path("release"),
    to: Annotated[str, typer.Option(help="hub or folder.")] = "hub",
    namespace: Annotated[str | None, typer.Option(help="User or organization on the hub.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where --to folder puts the repositories.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make new repositories public.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Publish; else only say what would be.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a release, one repository a model folder; says what it would do until you give --yes.

    Example: martlet publish release --namespace my-name
    """
    from pipeline.publish import plan, to_folder, to_hub

    if to not in ("hub", "folder"):
        raise UserError(f"--to: there is no {to!r}; choose hub or folder.")
    if to == "hub" and namespace is None and yes:
        raise UserError("--namespace is missing; give your name or an organization's on the hub.")
    if to == "folder" and folder is None:
        raise UserError("--folder is missing; say where the repositories go.")
    repositories = plan(release, namespace if to == "hub" else None)
    places: list[str] = []
    if yes and folder is not None and to == "folder":
        places = to_folder(repositories, folder, progress_line)
    elif yes:
        places = to_hub(repositories, not public, progress_line)
    if as_json:
        names = [repository.name for repository in repositories]
        print(json.dumps({"published": yes, "repositories": names, "places": places}))
    elif yes:
        print("\n".join(places))
    else:
        for repository in repositories:
            print(f"{repository.name}  {repository.files} files, {repository.bytes / 1e6:.1f} MB")
        print("Nothing was published; give --yes to do it.")


@app.command()
def chat(
    model: ReleaseOrFile = Path("release"),
    file: WhichFile = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Talk with any released file.

    Example: martlet chat release --file q4_k_m
    """
    from export.runtime import open_runtime
    from pipeline.chat import converse, find_model, tell

    found, others = find_model(model, file)
    check_before_opening(found)
    tell(f"{found}" + (f" (--file chooses another of {len(others) + 1})" if others else ""))
    converse(open_runtime(found, threads), max_tokens, temperature, seed)


@app.command()
def evaluate(
    model: ReleaseOrFile = Path("release"),
    file: WhichFile = None,
    tasks: Annotated[
        str, typer.Option(help="held_out_text, held_out_chats, or names of the harness, by commas.")
    ] = "held_out_text,held_out_chats",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of a task at most.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in a prompt; each task's own.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Source of held_out_text, as in a recipe; the run's own.")
    ] = None,
    chats: Annotated[
        str | None, typer.Option(help="Source of held_out_chats, as in a recipe; the run's own.")
    ] = None,
    store: Annotated[Path, typer.Option(help="Store that the release was made in.")] = Path("store"),
    output: Annotated[Path, typer.Option(help="JSON file of the results.")] = Path("evaluation.json"),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a released file by lm-evaluation-harness; a release's report shows the results.

    Example: martlet evaluate release --file q4_k_m --tasks held_out_text,held_out_chats
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "martlet evaluate needs lm-evaluation-harness, which is not installed; pip install --constraint "
            "constraints.txt lm-eval."
        )
    from export.runtime import open_runtime
    from pipeline import evaluate as evaluation
    from pipeline.artifacts import write_json
    from pipeline.chat import find_model

    found = find_model(model, file)[0].resolve()
    check_before_opening(found)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    release = evaluation.release_of(found)
    documents, conversations = evaluation.held_out(names, release, store, text, chats)
    report = (lambda line: None) if quiet else progress_line
    report(f"evaluate: {found}")
    facts = evaluation.run(
        open_runtime(found, threads), names, documents, conversations, limit, shots, report
    )
    if release is not None:
        evaluation.show_in_report(facts, found, release)
    write_json(output, {"model": str(found), **facts})
    if as_json:
        print(json.dumps({"output": str(output), "model": str(found), **facts}))
    else:
        show_evaluation(facts)
        Console().print(f"Results: {output}", soft_wrap=True)


@app.command()
def phone(
    release: Annotated[Path, typer.Argument(help="Release folder.")] = Path("release"),
    lan: Annotated[bool, typer.Option("--lan", help="Let one device of the local network in.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")] = 8443,
    address: Annotated[str | None, typer.Option(help="This machine's address in that network.")] = None,
    browser: Annotated[
        str | None, typer.Option(help="Drive the page here, with a phone's screen, in this Chromium.")
    ] = None,
    adb: Annotated[
        bool, typer.Option("--adb", help="Measure the GGUF files natively on an attached Android device.")
    ] = False,
    file: Annotated[
        str | None, typer.Option(help="With --browser, --adb: only files with this in their names.")
    ] = None,
    serial: Annotated[str | None, typer.Option(help="With --adb: which of several devices.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="With --adb: CPU threads.")] = 4,
) -> None:
    """Try a release in a browser or on a phone, which sends back how fast it is.

    Example: martlet phone release --lan
    """
    if lan + adb + (browser is not None) > 1:
        raise UserError("--lan, --browser, --adb: are three ways to run the files; give one of them.")
    if adb:
        from pipeline import android

        android.run(release, serial=serial, wanted=file, threads=threads, say=progress_line)
        return
    if browser is not None:
        from pipeline import browser_check

        browser_check.run(release, browser=browser, wanted=file, say=progress_line)
        return
    if file is not None:
        raise UserError("--file: is for --browser and --adb; the page itself offers every file.")
    from pipeline.phone import serve

    serve(release, lan=lan, port=port, say=lambda line: print(line, flush=True), address=address)


def tell_problems(release: Path, problems: list[str], fine: str, as_json: bool) -> None:
    """Says whether a release is as its manifest says.

    Args:
        release: release folder.
        problems: a sentence each.
        fine: what "as the manifest says" is said of without any.
        as_json: print all as JSON.

    Raises:
        GateFailed: there are problems; the sentence is the first.
    """
    if as_json:
        print(json.dumps({"release": str(release), "problems": problems}))
    if problems:
        raise GateFailed(problems[0] + (f" ({len(problems) - 1} more.)" if len(problems) > 1 else ""))
    if not as_json:
        print(f"{release}: {fine} as the manifest says.")


def check_before_opening(model: Path) -> None:
    """Checks a file or folder that may come from anywhere before its runtime reads it."""
    from export.untrusted import check_gguf, check_model_folder, check_onnx

    if model.is_dir():
        check_model_folder(model)
    elif model.suffix == ".gguf":
        check_gguf(model)
    elif model.suffix == ".onnx":
        check_onnx(model)
        check_model_folder(model.parent.parent if model.parent.name == "onnx" else model.parent)


def check_recipe_file(path: Path) -> Any:
    """Loads a recipe and checks the files that it names."""
    from pipeline.check import check_recipe
    from pipeline.recipe import load_recipe

    plan = load_recipe(path)
    check_recipe(plan, path)
    return plan


def warn_unjudged(path: Path, entries: list[str]) -> None:
    """Tells, where there are any, which licences of a recipe or a release martlet's table does not know."""
    from pipeline.licences import unjudged_sentence

    if entries:
        progress_line(f"warning: {path}: {unjudged_sentence(entries)}")


def progress_line(line: str) -> None:
    """One line on standard error, so that standard output stays the result."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_prefect(store: Path) -> Iterator[None]:
    """An embedded Prefect server with its data in the store, nothing sent out, no chatter."""
    try:
        (store / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{store}: the store cannot be written ({error.strerror}).") from None
    os.environ["PREFECT_HOME"] = str((store / "prefect").resolve())
    # A server that the user's shell points to is for `prefect deployment run`, not for this command.
    os.environ.pop("PREFECT_API_URL", None)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", SERVER_SECONDS)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
    for name in ("prefect", "httpx", "uvicorn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        log = store / "logs" / "prefect.log"
        with others_muted(log), warnings_kept(log.with_name("warnings.log")), ending_with_server(log):
            yield
    except (UserError, ExportError, GateFailed):
        raise
    except Exception as error:
        # Looked up only now: it loads more than commands that do not run should wait for.
        from pipeline.artifacts import space_ran_out

        if space_ran_out(store, error):  # Prefect's server keeps its database there, too
            raise UserError(
                f"{store}: no space is left on the disk; free space and start the same command again."
            ) from None
        if "ephemeral Prefect API server" not in str(error):
            raise
        raise UserError(
            f"Prefect's embedded server did not answer within {SERVER_SECONDS} s; free memory and CPU, and "
            "start the same command again."
        ) from None


@contextlib.contextmanager
def others_muted(log: Path) -> Iterator[None]:
    """Leaves standard error to this process's own Python code; what others write there goes into a file.

    Prefect starts its server with our standard error and in our process group, so Ctrl-C reaches it, too, and
    its traceback would stand before our sentence.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, ValueError):  # replaced by something that is no file
        descriptor = -1
    if descriptor != 2:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    shown = sys.stderr
    shown.flush()
    kept = os.dup(2)
    with log.open("ab") as file, os.fdopen(kept, "w", buffering=1, errors="backslashreplace") as ours:
        os.dup2(file.fileno(), 2)
        sys.stderr = ours
        try:
            yield
        finally:
            ours.flush()
            sys.stderr = shown
            os.dup2(kept, 2)


@contextlib.contextmanager
def warnings_kept(log: Path) -> Iterator[None]:
    """Writes Python's warnings into a file: libraries speak to programmers in them, not to who watches."""
    logger = logging.getLogger("py.warnings")
    handler = logging.FileHandler(log, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk has its own sentence
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logger.removeHandler(handler)
        logger.propagate = propagated
        handler.close()


@contextlib.contextmanager
def progress_shown(
    plans: list[Any], recipes: list[Path], store: Path, release: Path, quiet: bool
) -> Iterator[bool]:
    """Shows the flow's progress on standard error: one live view in a terminal, lines elsewhere, in CI, and
    with several recipes, nothing where quiet is wanted. The value is whether it is the live view."""
    progress = logging.getLogger("martlet")
    progress.setLevel(logging.INFO)
    progress.propagate = False
    console = Console(stderr=True)
    live = not quiet and console.is_terminal and not console.is_dumb_terminal and "CI" not in os.environ
    live = live and len(plans) == 1
    with contextlib.ExitStack() as stack:
        handler: logging.Handler = logging.NullHandler() if quiet else logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        if live:
            with console.status("Loading the libraries ..."):
                from flows.distill_and_ship import stage_names
                from flows.live_view import LiveView

            foot = [f"release: {release}", f"stages: {store}", f"logs: {store / 'logs'}"]
            view = LiveView(console, f"{plans[0].name}  ({recipes[0]})", stage_names(plans[0]), foot)
            handler = stack.enter_context(view)
            stack.enter_context(closed_before_ending(view.interrupted))
        progress.addHandler(handler)
        try:
            yield live
        finally:
            progress.removeHandler(handler)


def show_release(result: dict[str, Any], with_stages: bool) -> None:
    """The stages with their times, where the live view has not shown them, and where the release is."""
    from pipeline.pages import readable_number

    console = Console()
    if with_stages:
        table = Table(title="Stages", title_justify="left")
        table.add_column("stage")
        table.add_column("seconds", justify="right")
        table.add_column("")
        for stage in result["stages"]:
            cached = "from the store" if stage["cached"] else ""
            table.add_row(stage["name"], f"{stage['seconds']:.1f}", cached)
        console.print(table)
    table = Table(title="Files, with their mean KL to the model", title_justify="left")
    table.add_column("file", overflow="fold")
    for heading in ("MB", "mean KL", "tokens/s"):
        table.add_column(heading, justify="right")
    for file in result["files"]:
        speed = file["decode_tokens_per_s"]
        table.add_row(
            file["file"],
            f"{file['bytes'] / 1e6:.1f}",
            readable_number(file["mean_kl"]),
            readable_number(speed),
        )
    console.print(table)
    console.print(f"Release: {result['release']}", soft_wrap=True)
    console.print(f"Report:  {Path(result['release']) / 'report.html'}", soft_wrap=True)
    console.print(f"Talk:    martlet chat {result['release']}", soft_wrap=True)


def show_choice(choice: dict[str, Any], release: Path) -> None:
    """The files on the front, why the others are not, and the one to ship."""
    from pipeline.pages import readable_number

    console = Console()
    threads = choice["threads"]
    where = "" if threads is None else f", {threads} thread{'s' * (threads != 1)} on {choice['machine']}"
    table = Table(title=f"Files by size{where}", title_justify="left")
    table.add_column("file", overflow="fold")
    for heading in ("MB", "mean KL", "tokens/s", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for file in choice["files"]:
        speed, memory = file["decode_tokens_per_s"], file["peak_rss_bytes"]
        front = "no other beats it" if file["on_front"] else ""
        table.add_row(
            f"{file['format']} {file['quantization']}",
            f"{file['bytes'] / 1e6:.1f}",
            readable_number(file["mean_kl"]),
            readable_number(speed) + ("" if speed is None or file["reliable"] else " ?"),
            "" if memory is None else f"{memory / 1e6:.0f}",
            "ship this" if file["file"] == choice["ship"] else file["why_not"] or front,
        )
    console.print(table)
    if any(file["reliable"] is False for file in choice["files"]):
        console.print("? the machine was busy while this was timed.")
    if choice["ship"] is not None:
        path = next(iter(release.rglob(choice["ship"])), None)
        console.print(f"Ship:    {choice['ship'] if path is None else path}", soft_wrap=True)


def show_evaluation(facts: dict[str, Any]) -> None:
    """The results of an evaluation, one row a task and metric."""
    table = Table(title=f"lm-evaluation-harness {facts['lm_eval']}", title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in ("value", "± standard error", "documents"):
        table.add_column(heading, justify="right")
    for row in facts["results"]:
        error = row["standard_error"]
        table.add_row(
            row["task"],
            row["metric"],
            f"{row['value']:.4f}",
            "" if error is None else f"{error:.4f}",
            "" if row["documents"] is None else f"{row['documents']:,}",
        )
    Console().print(table)


def show_notes(error: BaseException) -> None:
    """What a child process said before it failed; it hangs on the error or on one of its causes."""
    cause: BaseException | None = error
    while cause is not None:
        for note in getattr(cause, "__notes__", []):
            print(note, file=sys.stderr)
        cause = cause.__cause__


def whole_numbers(option: str, text: str) -> list[int]:
    """Numbers separated by commas.

    Raises:
        UserError: one of them is no whole number from 0 on, or is there twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise UserError(f"{option}: {text!r} is no list of different whole numbers such as 0,1,2.")
    return [int(part) for part in parts]


def standings(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a comparison without their curves, nearest to the teacher first."""
    keys = ("label", "objective", "settings", "mean", "spread", "kl_difference")
    ranked = sorted(facts["contenders"], key=lambda entry: entry["mean"]["kl"])
    return [{key: entry[key] for key in keys} for entry in ranked]


def show_plan(facts: dict[str, Any]) -> None:
    """A plan as a table of what, how much, and where the number comes from."""

    def size(count: float) -> str:
        unit = next((name for name in ("kB", "MB", "GB") if count < 1000 * UNITS[name]), "TB")
        return f"{count / UNITS[unit]:.3g} {unit}"

    def giga(flops: float) -> str:
        return f"{flops / 1e9:.3g} GFLOP a token"

    teacher, student, tokens = facts["teacher"], facts["student"], facts["tokens"]
    memory, cache, disk = facts["memory"], facts["cache"], facts["disk"]
    table = Table(title=facts["recipe"], title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("teacher", f"{teacher['model']}: {teacher['parameters']:,} parameters")
    table.add_row("", f"{giga(teacher['forward_flops'] + teacher['head_flops'])}, forward")
    table.add_row("student", f"{student['model']}: {student['parameters']:,} parameters")
    table.add_row("", f"{giga(student['step_flops'])}, forward and backward")
    trimmed = "" if teacher["vocabulary"] == student["vocabulary"] else f", of {teacher['vocabulary']:,}"
    table.add_row("vocabulary", f"{facts['vocabulary']:,}{trimmed}")
    table.add_row(
        "tokens",
        f"{tokens['trained']:,} ({tokens['epochs']:g} x {tokens['train']:,}) in {tokens['steps']:,} steps of "
        f"{tokens['step']:,}; {tokens['held_out']:,} held out",
    )
    table.add_row("compute", f"{facts['flops']['total']:.3g} FLOP")
    hours = "state --tflops or --tokens-per-second" if facts["hours"] is None else f"{facts['hours']:.3g}"
    table.add_row("hours", hours)
    table.add_row(
        "memory per device",
        f"{size(memory['bytes'])} at the peak of a step ({memory['devices']} x {memory['precision']}): "
        + ", ".join(f"{kind} {size(count)}" for kind, count in memory["parts"].items() if count >= 1e6),
    )
    if "fits" in memory:
        fits = "fits" if memory["fits"] else "does not fit"
        table.add_row("", f"{fits} in {size(memory['device_bytes'])}")
    if cache["kind"] == "none":
        table.add_row(
            "teacher cache",
            f"none; hidden states would take {cache['hidden_bytes_per_token']:,} bytes a token, "
            f"{size(cache['hidden_bytes_per_token'] * (tokens['train'] + tokens['held_out']))}",
        )
    else:
        table.add_row(
            "teacher cache", f"{cache['bytes_per_token']:,} bytes a token, {size(cache['bytes'])} in all"
        )
    kinds = ", ".join(f"{kind} {size(count)}" for kind, count in disk.items() if kind != "total" and count)
    table.add_row("disk", f"{size(disk['total'])}: {kinds}")
    Console().print(table)


def show_comparison(facts: dict[str, Any]) -> None:
    """The table of a comparison, nearest to the teacher first."""
    from pipeline.compare import MEASURES

    console = Console()
    # A narrow terminal would cut every column to three letters; the page has them all.
    narrow = ("kl", "reverse_kl", "cross_entropy", "same_top")
    shown = MEASURES if console.width >= WIDTH_OF_COMPARISON else {key: MEASURES[key] for key in narrow}
    table = Table(
        title=f"{facts['tokens']:,} training tokens, seeds {', '.join(map(str, facts['seeds']))}",
        title_justify="left",
    )
    table.add_column("objective", no_wrap=console.width >= 80, overflow="fold")
    for heading in shown.values():
        table.add_column(heading, justify="right")

    def cell(key: str, line: dict[str, Any], spreads: dict[str, Any]) -> str:
        if line.get(key) is None:
            return ""
        scale = 1e-6 if key == "peak_memory_bytes" else 1
        text = f"{line[key] * scale:.4g}" + (" MB" if key == "peak_memory_bytes" else "")
        return text + (f" ± {spreads[key] * scale:.2g}" if spreads.get(key) is not None else "")

    rows = [(entry["label"], entry["mean"], entry["spread"]) for entry in standings(facts)]
    rows += [("student before", facts["before"], {}), ("teacher", facts["teacher"], {})]
    for label, line, spreads in rows:
        table.add_row(label, *(cell(key, line, spreads) for key in shown))
    console.print(table)


def run(command: Callable[[], Any]) -> int:
    """Runs a command; errors that are the user's become one sentence and an exit code."""
    try:
        command()
    except GateFailed as error:
        print(f"martlet: {error}", file=sys.stderr)
        return EXIT_GATE_FAILED
    except (UserError, ExportError) as error:
        show_notes(error)
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
    # Libraries' own bars would stand between our lines; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")

    def command() -> None:
        try:
            app(prog_name="martlet", standalone_mode=False)
        except typer.Abort:
            raise KeyboardInterrupt from None
        except TyperException as error:  # a wrong option or a missing argument
            problem = error.format_message().rstrip(".").split("\n")[0]
            raise UserError(f"{problem}; martlet --help lists the commands and their options.") from None

    sys.exit(run(command))


if __name__ == "__main__":
    main()
