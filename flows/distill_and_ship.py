"""The flow: a teacher and a recipe in, a release folder out. Its body is the list of stages."""

import base64
import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import psutil
from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError
from prefect.task_runners import ThreadPoolTaskRunner

from export import processes
from export.errors import ExportError
from flows.interrupts import ending_children, leashed_children
from pipeline import (
    bench,
    chats,
    choose,
    compare_releases,
    distill,
    exports,
    gptq,
    hidden_states,
    importance_matrix,
    instruct,
    preflight,
    prepare,
    pretrain,
    student,
    teacher,
    validate,
)
from pipeline import release as release_stage
from pipeline.artifacts import Artifact, Store, in_use
from pipeline.check import check_recipe
from pipeline.errors import GateFailed, Unreachable, UserError
from pipeline.licences import unjudged, unjudged_sentence
from pipeline.progress import Progress
from pipeline.recipe import Recipe, load_recipe
from taid import TaidError

FLOW_NAME = "distill-and-ship"
DEFAULT_RECIPE = "recipes/smollm2-135m-to-99m.yaml"
RETRY_SECONDS = (10, 60)
"""How long a stage waits before it asks a hub again, each time."""
BENCHMARK = "benchmark"
"""Tag of the tasks that measure; a concurrency limit of a Prefect server may name it."""
PROGRESS_SECONDS = 5.0
"""Between two changes of the progress that Prefect shows, within a stage."""
AT_ONCE = 2
"""Exports and gates side by side, where memory allows."""

logger = logging.getLogger("martlet")
"""Progress, one line at a time, which the command line shows on standard error. A record's ``stage`` names
the stage that speaks, its ``state`` says when that begins ("running") and ends ("done", or "cached")."""

speaking: ContextVar[str] = ContextVar("speaking", default="")
"""The stage that runs in this thread."""


def stage(function: Callable[..., Any], name: str, report: Callable[..., None]) -> Any:
    """A stage as a Prefect task that tells when it starts and what it took.

    The store decides what is computed again, so Prefect caches nothing. A stage is tried again only where a
    hub did not answer: bad input and a missed gate stay what they are.
    """

    @functools.wraps(function)
    def told(*arguments: Any, **keywords: Any) -> Any:
        token = speaking.set(name)
        try:
            report(f"{name} ...", state="running")
            started = time.monotonic()
            result = function(*arguments, **keywords)
            cached = getattr(result, "cached", False)
            how = "from the store" if cached else f"{time.monotonic() - started:.1f} s"
            report(f"{name}: done, {how}", state="cached" if cached else "done")
            return result
        except Unreachable as error:
            tried = runtime.task_run.run_count or 1
            if tried <= len(RETRY_SECONDS):
                report(f"warning: {error} It is tried again in {RETRY_SECONDS[tried - 1]} s.")
            raise
        finally:
            speaking.reset(token)

    return task(
        name=name,
        tags=[BENCHMARK] if name.startswith("bench ") else [],
        cache_policy=NO_CACHE,
        retries=len(RETRY_SECONDS),
        retry_delay_seconds=list(RETRY_SECONDS),
        retry_condition_fn=trying_again_may_help,
        persist_result=False,
    )(told)


def trying_again_may_help(task: Any, task_run: Any, state: Any) -> bool:
    """Whether a stage failed because a hub did not answer."""
    return isinstance(state.data, Unreachable)


def stage_names(plan: Recipe) -> list[str]:
    """The stages that the flow goes through with this recipe, in its order."""
    formats = [name for name in exports.FORMATS if getattr(plan.export, name)]
    return [
        *("teacher", "prepare", "student", "preflight", "chats"),
        *(["hidden states"] if plan.teacher.cache != "none" else []),
        "distill",
        *(["control"] if plan.distill.control else []),
        *(["pretrain"] if plan.pretrain is not None else []),
        "instruct",
        *(["importance matrix"] if importance_matrix.wanted(plan) else []),
        *(["GPTQ"] if gptq.wanted(plan) else []),
        *(f"{step} {name}" for step in ("export", "validate", "bench") for name in formats),
        "release",
    ]


class IntoRunLog(logging.Handler):
    """Puts a record into the log of the Prefect run that it was written in."""

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record up."""
        with contextlib.suppress(MissingContextError):
            get_run_logger().log(record.levelno, record.getMessage())


@contextlib.contextmanager
def logging_children() -> Iterator[None]:
    """While it lasts, what child processes say stands in the run's log, too, when they have ended."""
    handler, logger = IntoRunLog(), processes.logger
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # to a console that Prefect's own handler writes to already
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.setLevel(level)
        logger.removeHandler(handler)


def showing_progress(title: str, stages: list[str]) -> Callable[[str, str, str | None], None]:
    """Shows how far a run is as a Prefect artifact: stages done, and the part of the one that counts.

    Args:
        title: what is run.
        stages: names of all stages.

    Returns:
        What is to be told each line, its stage and, where it changes, that stage's state.
    """
    artifact = cast(UUID, create_progress_artifact(0.0, key="progress", description=title))
    parts = dict.fromkeys(stages, 0.0)
    changed = time.monotonic()

    def take(line: str, stage: str, state: str | None) -> None:
        nonlocal changed
        if state in ("done", "cached"):
            parts[stage] = 1.0
        elif isinstance(line, Progress) and stage in parts and time.monotonic() > changed + PROGRESS_SECONDS:
            parts[stage] = line.done / max(1, line.total)
        else:
            return
        changed = time.monotonic()
        update_progress_artifact(artifact, 100 * sum(parts.values()) / len(parts), f"{title}: {line}")

    return take


def run_name() -> str:
    """Name of a flow run: recipe and student, of each recipe."""
    names = []
    parameters = runtime.flow_run.parameters
    for path in map(Path, parameters.get("recipes") or [parameters["recipe"]]):
        try:
            names.append(f"{path.stem}: {load_recipe(path).name}")
        except UserError:
            # The flow itself says what is wrong with the recipe.
            names.append(path.stem)
    return ", ".join(names)


@flow(
    name=FLOW_NAME,
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=AT_ONCE),  # type: ignore[arg-type]
    persist_result=False,
)
@ending_children()
@leashed_children()
@logging_children()
def distill_and_ship(
    recipe: str = DEFAULT_RECIPE,
    store: str = "store",
    release: str = "release",
    recipes: list[str] | None = None,
) -> dict[str, Any]:
    """Distils, tunes, exports, proves, measures and lays out a release; of several recipes one after the
    other.

    Args:
        recipe: path of the recipe, a YAML file.
        store: folder of finished stages; nothing in it is computed twice.
        release: where the release is laid out.
        recipes: paths of several recipes, in place of ``recipe``. Each release is laid out in a folder of
            ``release`` named like its recipe says, and ``release/comparison`` compares them.

    Returns:
        ``{"release": path, "stages": [{"name", "seconds", "cached"}], "files": [{"file", "bytes", "mean_kl",
        "decode_tokens_per_s"}]}``; of several recipes ``{"releases": [such values], "comparison": path of the
        page or None}``.

    Raises:
        UserError: the recipe or something that it names is wrong.
        GateFailed: an exported file is no longer the model.
    """
    if not recipes:
        with in_use(Path(store)):
            return ship(Path(recipe), Path(store), Path(release))
    paths = [Path(each) for each in recipes]
    plans = [load_recipe(path) for path in paths]
    for plan, path in zip(plans, paths, strict=True):
        check_recipe(plan, path)
    if len({plan.name for plan in plans}) < len(plans):
        raise UserError(f"{paths[0].parent}: two of the recipes have the same name; give each its own.")
    if (Path(release) / release_stage.MANIFEST).exists():
        raise UserError(f"{release}: is the release of one recipe; give another folder for several.")
    # One at a time: memory is what one of them needs, and what they have in common is computed once.
    done, failures = [], []
    with in_use(Path(store)):
        for plan, path in zip(plans, paths, strict=True):
            try:
                done.append(ship(path, Path(store), Path(release) / plan.name))
            except (UserError, ExportError, TaidError, GateFailed) as error:
                failures.append(error)
                logger.warning(f"warning: {path}: {error}", extra={"stage": "", "state": None})
    comparison = None
    if len(done) > 1:
        facts = compare_releases.run(*(Path(each["release"]) for each in done))
        comparison = str(compare_releases.write(facts, Path(release).resolve() / "comparison")[1])
        create_markdown_artifact(key="comparison", markdown=f"[Comparison]({Path(comparison).as_uri()})")
    if failures:
        more = f" ({len(failures)} of {len(plans)} recipes failed.)"
        raise type(failures[0])(f"{failures[0]}{more if len(plans) > 1 else ''}")
    return {"releases": done, "comparison": comparison}


def ship(recipe: Path, store: Path, release: Path) -> dict[str, Any]:
    """One recipe from teacher to release folder, in the flow run that this is called in; see
    ``distill_and_ship``."""
    run_logger = get_run_logger()
    plan = load_recipe(recipe)
    check_recipe(plan, recipe)
    show = showing_progress(plan.name, stage_names(plan))

    def report(line: str, state: str | None = None) -> None:
        run_logger.info(line)
        logger.info(line, extra={"stage": speaking.get(), "state": state})
        show(line, speaking.get(), state)

    def step(function: Callable[..., Any], name: str) -> Any:
        return stage(function, name, report)

    if not_judged := unjudged(plan):
        report(f"warning: {recipe}: {unjudged_sentence(not_judged)}")
    shelf = Store(store, report=report)
    made: dict[str, Artifact] = {}

    made["teacher"] = step(teacher.run, "teacher")(shelf, plan)
    made["text"] = step(prepare.run, "prepare")(shelf, plan, made["teacher"])
    made["student"] = step(student.run, "student")(shelf, plan, made["teacher"], made["text"])
    made["preflight"] = step(preflight.run, "preflight")(shelf, plan, made["student"])
    made["chats"] = step(chats.run, "chats")(shelf, plan, made["teacher"])
    if plan.teacher.cache != "none":
        made["hidden_states"] = step(hidden_states.run, "hidden states")(
            shelf, plan, made["teacher"], made["text"], made["student"]
        )

    materials = (made["teacher"], made["student"], made["text"], made.get("hidden_states"))
    made["distill"] = step(distill.run, "distill")(shelf, plan, *materials, plan.distill.objective)
    if plan.distill.control:
        made["control"] = step(distill.run, "control")(shelf, plan, *materials, "cross_entropy")
    base = made["distill"]
    if plan.pretrain is not None:
        base = made["pretrain"] = step(pretrain.run, "pretrain")(shelf, plan, base, made["text"])
    made["instruct"] = step(instruct.run, "instruct")(shelf, plan, made["teacher"], base, made["chats"])

    formats = [name for name in exports.FORMATS if getattr(plan.export, name)]
    if importance_matrix.wanted(plan):
        made["importance_matrix"] = step(importance_matrix.run, "importance matrix")(
            shelf, plan, made["instruct"], made["text"]
        )
    if gptq.wanted(plan):
        made["gptq"] = step(gptq.run, "GPTQ")(shelf, plan, made["instruct"], made["text"])
    # A format's gates do not wait for the other formats' exports.
    beside = fits_beside(made["instruct"])
    exporting, judging = {}, {}
    for name in formats:
        exporting[name] = step(exports.run, f"export {name}").submit(
            shelf, plan, made["instruct"], name, made.get("importance_matrix"), made.get("gptq")
        )
        if not beside:
            exporting[name].wait()
    for name in formats:
        judging[name] = step(validate.run, f"validate {name}").submit(
            shelf,
            plan,
            made["instruct"],
            exporting[name],
            made["text"],
            made["chats"],
            threads=max(1, plan.threads // AT_ONCE) if beside else plan.threads,
        )
        if not beside:
            judging[name].wait()
    made |= {name: future.result() for name, future in exporting.items()}
    made |= {f"fidelity_{name}": future.result() for name, future in judging.items()}
    show_fidelity(made, formats)
    for name in formats:
        if validate.failures_of(made[f"fidelity_{name}"]):
            missed = {"stage": f"validate {name}", "state": "failed"}
            logger.info(f"validate {name}: a gate was missed", extra=missed)
    validate.require_passed([made[f"fidelity_{name}"] for name in formats])

    # One after the other and nothing beside them: they are measured.
    for name in formats:
        made[f"device_{name}"] = step(bench.run, f"bench {name}")(shelf, plan, made[name], made["text"])
    show_device(made, formats)

    stages = [
        {"name": name, "seconds": round(artifact.seconds, 1), "cached": artifact.cached}
        for name, artifact in made.items()
    ]
    folder = step(release_stage.run, "release")(
        recipe=plan, artifacts=made, release_root=release, store=shelf, stage_times=stages
    )
    create_markdown_artifact(
        key="release",
        markdown=f"**{plan.name}** is in [{folder}]({folder.resolve().as_uri()}); "
        f"[the report]({(folder / 'report.html').resolve().as_uri()}) shows what it is worth.",
    )
    show_picture(folder)
    speed = {entry["file"]: entry["decode_tokens_per_s"] for entry in rows(made, "device", formats)}
    files = [
        {
            "file": entry["file"],
            "bytes": entry["bytes"],
            "mean_kl": entry["mean_kl"],
            "decode_tokens_per_s": speed.get(entry["file"]),
        }
        for entry in rows(made, "fidelity", formats)
    ]
    return {"release": str(folder), "stages": stages, "files": files}


def fits_beside(instruct: Artifact) -> bool:
    """Whether memory allows ``AT_ONCE`` exports or gates: each holds the weights a few times over and a
    gigabyte of libraries."""
    weights = sum(path.stat().st_size for path in (instruct.path / "model").glob("*.safetensors"))
    return psutil.virtual_memory().available > AT_ONCE * (4 * weights + 2**30)


def rows(made: dict[str, Artifact], kind: str, formats: list[str]) -> list[dict[str, Any]]:
    """The entries of all formats' ``fidelity.json`` or ``device.json``."""
    return [
        entry
        for name in formats
        for entry in json.loads((made[f"{kind}_{name}"].path / f"{kind}.json").read_text(encoding="utf-8"))
    ]


def show_fidelity(made: dict[str, Artifact], formats: list[str]) -> None:
    """The fidelity table as a Prefect artifact."""
    columns = ("file", "quantization", "bytes", "mean_kl", "p99_kl", "same_top", "perplexity_ratio", "passed")
    table = [{column: entry.get(column) for column in columns} for entry in rows(made, "fidelity", formats)]
    create_table_artifact(key="fidelity", table=table, description="Each file against the model in torch.")


def show_device(made: dict[str, Artifact], formats: list[str]) -> None:
    """The device table as a Prefect artifact."""
    columns: tuple[str, ...] = ("file", "runtime", "threads", "load_s", "ttft_s", "prefill_tokens_per_s")
    columns += ("decode_tokens_per_s", "rss_anon_bytes", "rss_file_bytes", "peak_rss_bytes", "reliable")
    table = [{column: entry.get(column) for column in columns} for entry in rows(made, "device", formats)]
    create_table_artifact(key="device", table=table, description="Each file on this machine's CPU.")


def show_picture(release: Path) -> None:
    """Files by size, KL and speed as a Prefect artifact, the picture within its address: the server's page
    reads no file of this machine."""
    picture = choose.picture(choose.choose(release)).replace("<svg ", '<svg style="background:white" ', 1)
    create_image_artifact(
        "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode(),
        key="files",
        description="Each file's size, mean KL and speed; the ring marks the one to ship.",
    )


if __name__ == "__main__":
    print(json.dumps(distill_and_ship(), indent=2))
