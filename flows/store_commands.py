"""``martlet store``: what a store holds, why something was computed again, and what may go."""

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError

DAY = 86_400
StorePath = Annotated[Path, typer.Option("--store", help="Folder of finished stages.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on the last line.")]

app = typer.Typer(
    help="List, explain and prune the finished stages of a store.\n\nExample: martlet store list",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_(store: StorePath = Path("store"), as_json: AsJson = False) -> None:
    """Show what a store holds.

    Example: martlet store list
    """
    from pipeline.inventory import entries, leftovers

    found = entries(store) + leftovers(store)
    if as_json:
        rows = [
            {
                "stage": entry.stage,
                "key": entry.key,
                "state": entry.state,
                "bytes": entry.bytes,
                "made": round(entry.made, 3),
                "used": round(entry.used, 3),
                "needed_by": list(entry.needed_by),
            }
            for entry in found
        ]
        print(json.dumps(rows))
        return
    table = Table()
    for heading in ("stage", "key", "MB", "unused days", "needed by"):
        table.add_column(heading, justify="right" if heading in ("MB", "unused days") else "left")
    for entry in found:
        unused = f"{(time.time() - entry.used) / DAY:.1f}"
        release = ", ".join(Path(path).name for path in entry.needed_by)
        note = release if entry.state == "finished" else f"({entry.state})"
        table.add_row(entry.stage, entry.shown, f"{entry.bytes / 1e6:.1f}", unused, note)
    Console().print(table)
    finished = sum(entry.state == "finished" for entry in found)
    rest = f" and {len(found) - finished} leftovers" if len(found) > finished else ""
    print(f"{store}: {finished} artifacts{rest}, {sum(entry.bytes for entry in found) / 1e6:.1f} MB")


@app.command()
def explain(
    artifact: Annotated[str, typer.Argument(help="STAGE, KEY or STAGE/KEY; of a stage the newest.")],
    store: StorePath = Path("store"),
    as_json: AsJson = False,
) -> None:
    """Say why an artifact was computed again.

    Example: martlet store explain distill
    """
    from pipeline.inventory import explain as reasons
    from pipeline.inventory import find

    entry = find(store, artifact)
    lines = reasons(store, entry)
    if as_json:
        print(json.dumps({"stage": entry.stage, "key": entry.key, "reasons": lines}))
    else:
        print("\n".join(lines))


@app.command()
def prune(
    store: StorePath = Path("store"),
    older_than: Annotated[float | None, typer.Option(help="Days since the last use.", min=0)] = None,
    keep: Annotated[float | None, typer.Option(help="Gigabytes that may remain.", min=0)] = None,
    forget: Annotated[Path | None, typer.Option(help="A release that is no longer needed.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; else only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what no release needs, by age and size.

    Example: martlet store prune --older-than 30
    """
    from pipeline.inventory import forget_release, prunable, unused
    from pipeline.inventory import prune as remove

    if older_than is None and keep is None:
        raise UserError("martlet store prune: say what may go: --older-than DAYS, --keep GIGABYTES, or both.")
    with unused(store) if yes else contextlib.nullcontext():
        if forget is not None:
            forget_release(store, forget)
        age = None if older_than is None else older_than * DAY
        chosen = prunable(store, age, None if keep is None else int(keep * 1e9))
        freed = remove(store, chosen) if yes else sum(entry.bytes for entry in chosen)
    if as_json:
        names = [f"{entry.stage}/{entry.key}" for entry in chosen]
        print(json.dumps({"removed": yes, "bytes": freed, "artifacts": names}))
        return
    for entry in chosen:
        note = "" if entry.state == "finished" else f" ({entry.state})"
        print(f"{entry.stage}/{entry.shown}{note}  {entry.bytes / 1e6:.1f} MB")
    what = "removed" if yes else "would go; give --yes to remove them"
    print(f"{store}: {len(chosen)} artifacts, {freed / 1e6:.1f} MB {what}")
