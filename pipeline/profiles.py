"""Device profiles: a budget of memory and processor time, and what a file must reach within it."""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import UserError


class Profile(BaseModel):
    """One profile file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=60)
    memory_mb: int = Field(ge=16, description="Of the runtime and the model; what exceeds it is killed.")
    processors: float = Field(gt=0, description="Processor seconds a second.")
    threads: int = Field(ge=1)
    prompt_tokens: int = Field(64, ge=1)
    generated_tokens: int = Field(16, ge=1)
    min_decode_tokens_per_s: float = Field(gt=0)
    max_first_token_s: float | None = Field(
        None, gt=0, description="From opening the file, not in the page cache, to the first token."
    )


def load_profile(path: Path) -> Profile:
    """Reads and checks a profile.

    Raises:
        UserError: the file is missing or no YAML, or a key is unknown, missing or impossible.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the path of a device profile.") from None
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"{path}: not valid YAML; mend the syntax.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a profile is a mapping of keys to values; this file holds none.")
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: {key}: {problem['msg']}; profiles/ has examples.") from None
