"""The recipe: one YAML file that says everything a run does. Unknown keys, wrong types and impossible
values are refused with one sentence that names file and key."""

import os
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from export import quantizations
from pipeline.errors import UserError

LARGEST_RECIPE = 2**20
"""Bytes."""
LARGEST_MAPPING = 10_000
"""Keys of one mapping of a recipe."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"


CALIBRATION = "calibration"
"""``export.importance_matrix`` or ``export.gptq`` for the recipe's own calibration split."""

SAMPLED_OBJECTIVES = (
    "taid",
    "cross_entropy",
    "forward_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "jensen_shannon",
    "total_variation",
)
WITHOUT_TEMPERATURE = ("cross_entropy", "curriculum_temperature")
"""Objectives that ``distill.temperature`` says nothing to: one has no teacher, one learns its own."""
"""Objectives that can be learned from ``teacher.cache: sampled``."""


# fmt: off
LANGUAGES = frozenset((
    "aa", "ab", "ae", "af", "ak", "am", "an", "ar", "as", "av", "ay", "az", "ba", "be", "bg", "bi", "bm",
    "bn", "bo", "br", "bs", "ca", "ce", "ch", "co", "cr", "cs", "cu", "cv", "cy", "da", "de", "dv", "dz",
    "ee", "el", "en", "eo", "es", "et", "eu", "fa", "ff", "fi", "fj", "fo", "fr", "fy", "ga", "gd", "gl",
    "gn", "gu", "gv", "ha", "he", "hi", "ho", "hr", "ht", "hu", "hy", "hz", "ia", "id", "ie", "ig", "ii",
    "ik", "io", "is", "it", "iu", "ja", "jv", "ka", "kg", "ki", "kj", "kk", "kl", "km", "kn", "ko", "kr",
    "ks", "ku", "kv", "kw", "ky", "la", "lb", "lg", "li", "ln", "lo", "lt", "lu", "lv", "mg", "mh", "mi",
    "mk", "ml", "mn", "mr", "ms", "mt", "my", "na", "nb", "nd", "ne", "ng", "nl", "nn", "no", "nr", "nv",
    "ny", "oc", "oj", "om", "or", "os", "pa", "pi", "pl", "ps", "pt", "qu", "rm", "rn", "ro", "ru", "rw",
    "sa", "sc", "sd", "se", "sg", "si", "sk", "sl", "sm", "sn", "so", "sq", "sr", "ss", "st", "su", "sv",
    "sw", "ta", "te", "tg", "th", "ti", "tk", "tl", "tn", "to", "tr", "ts", "tt", "tw", "ty", "ug", "uk",
    "ur", "uz", "ve", "vi", "vo", "wa", "wo", "xh", "yi", "yo", "za", "zh", "zu",
))
# fmt: on
"""The two-letter codes of ISO 639-1."""

NUMBERS = (int, float, int | None, float | None)


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors, and so are infinite numbers, which JSON cannot hold, and
    true or false where a number is asked, which Python would take for 1 and 0."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in NUMBERS:
            raise ValueError(f"input should be a number, not {str(value).lower()}")
        return value


class Teacher(Section):
    """The big model."""

    model: str = Field(
        description="Hugging Face name, local folder, or package:NAME for a GGUF that a package carries."
    )
    revision: str | None = Field(None, description="Commit or tag of a Hugging Face name.")
    trust_remote_code: bool = Field(False, description="Run code that the model's repository carries.")
    licence: str = Field("unknown", description="SPDX expression, carried into the model cards.")
    cache: Literal["none", "hidden", "sampled"] = Field(
        "hidden",
        description="hidden: the teacher's final hidden states are computed once and reused. sampled: of the "
        "training text, a few sampled tokens of each distribution (small, unbiased, noisier).",
    )
    cache_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Numbers of the cached hidden states; bfloat16 takes half the disk."
    )
    cache_samples: int = Field(32, ge=1, description="Tokens that a sampled cache keeps of a position.")


class Text(Section):
    """Plain text to distil on."""

    sources: list[str] = Field(
        min_length=1,
        description="Each a .txt, .jsonl or .parquet file, a folder of them, dataset:NAME for a `datasets` "
        "name, or package:NAME for text that an installed package carries.",
    )
    text_field: str = Field(
        "text", description="The field of JSON Lines, Parquet and datasets that holds the text."
    )
    licence: str = Field("unknown", description="SPDX expression, carried into the model cards.")
    sequence_length: int = Field(256, ge=8, description="Tokens of one packed training sequence.")
    train_tokens: int = Field(
        ge=1, description="Training tokens; fewer if the sources hold fewer is an error."
    )
    held_out_tokens: int = Field(
        10_240, ge=1, description="Tokens that training never sees and quality is measured on."
    )
    calibration_tokens: int = Field(
        4_096, ge=1, description="Tokens apart from both, by which layers and roundings are chosen."
    )


class Chats(Section):
    """Conversations for instruction tuning."""

    sources: list[str] = Field(
        min_length=1,
        description="Each a .jsonl or .parquet file or dataset:NAME with a `messages` field, "
        "or prompts:NAME for packaged or procedural prompts that the teacher answers.",
    )
    licence: str = Field("unknown", description="SPDX expression, carried into the model cards.")
    conversations: int = Field(ge=1, description="Training conversations.")
    held_out_conversations: int = Field(
        16, ge=1, description="Conversations that tuning never sees and quality is measured on."
    )
    max_tokens: int = Field(256, ge=16, description="Longer conversations are left out.")
    max_answer_tokens: int = Field(64, ge=1, description="Length of an answer that the teacher writes.")


class Data(Section):
    """What the student learns from."""

    text: Text = Field(description="Plain text to distil on.")
    chats: Chats = Field(description="Conversations to tune on.")


class Prune(Section):
    """A student made from the teacher by dropping the layers that change the hidden states least."""

    layers: int = Field(ge=1, description="Layers that remain.")


class Student(Section):
    """The small model: either an existing one or one pruned from the teacher."""

    model: str | None = Field(None, description="Hugging Face name or local folder of an existing student.")
    revision: str | None = Field(None, description="Commit or tag of a Hugging Face name.")
    licence: str = Field("unknown", description="SPDX expression, carried into the model cards.")
    prune: Prune | None = Field(None, description="In place of model: a student made from the teacher.")

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        if (self.model is None) == (self.prune is None):
            raise ValueError("give either model or prune, not both and not neither")
        return self


class Training(Section):
    """What every training stage shares."""

    learning_rate: float = Field(
        1e-3, gt=0, le=1, description="Of AdamW, at its highest; then it falls by a cosine."
    )
    batch_size: int = Field(4, ge=1, description="Sequences of one micro-batch.")
    gradient_accumulation: int = Field(1, ge=1, description="Micro-batches of an optimizer step.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    warmup_ratio: float = Field(
        0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this norm.")
    checkpoint_every: int = Field(25, ge=1, description="Optimizer steps between checkpoints.")
    freeze_embeddings: bool = Field(
        False, description="Embedding and tied head stay as they are: less to train, less to forget."
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        description="Seconds that one go at the training may take. It then ends with a checkpoint (with "
        "launch, at the last one), and the same command goes on from there; without it there is no limit.",
    )


class Generations(Section):
    """Batches that the student writes itself, as GKD does, or DistiLLM where adaptive."""

    share: float = Field(0.5, ge=0, le=1, description="Of the batches; with adaptive the one it starts from.")
    prompt_tokens: int = Field(32, ge=1, description="Tokens of a block that the student goes on from.")
    adaptive: bool = Field(
        False,
        description="DistiLLM: the share grows when the held-out cross-entropy rises, and more and more "
        "batches are replayed instead of written.",
    )
    share_step: float = Field(0.1, ge=0, le=1, description="What an adaptive share grows by.")
    tolerance: float = Field(0.1, ge=0, description="The rise of the cross-entropy that counts, in nats.")
    capacity: int = Field(1000, ge=1, description="Continuations that are kept for replay.")


class Distill(Training):
    """Distillation. Defaults of t_start, t_end, alpha and beta are the paper's."""

    objective: Literal[
        "taid",
        "cross_entropy",
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "total_variation",
        "skew_forward_kl",
        "skew_reverse_kl",
        "adaptive_kl",
        "decoupled_kd",
        "curriculum_temperature",
    ] = Field("taid", description="What is minimized; docs/papers.md has the formulas.")
    t_start: float = Field(
        0.4, ge=0, le=1, description="TAID's t in the first step: 0 is the student itself, 1 the teacher."
    )
    t_end: float = Field(1.0, ge=0, le=1, description="Its t in the last step.")
    alpha: float = Field(5e-4, ge=0, description="How far a falling loss moves t ahead of its line.")
    beta: float = Field(0.99, ge=0, lt=1, description="Momentum of the loss's relative change.")
    adaptive: bool = Field(True, description="Whether the loss moves t at all, or the line alone.")
    signal: Literal["loss", "divergence"] = Field(
        "loss",
        description="What moves t: the loss, or KL(p_t || student), which is the loss less p_t's entropy.",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Divides both models' logits in the loss, which is multiplied by its square; not for "
        "cross_entropy and curriculum_temperature.",
    )
    generations: Generations | None = Field(
        None, description="Batches that the student writes itself; needs teacher.cache: none."
    )
    control: bool = Field(False, description="Also train a cross-entropy-only control on the same tokens.")
    evaluate_every: int = Field(
        25, ge=1, description="Optimizer steps between held-out evaluations of the curve."
    )
    evaluate_tokens: int = Field(2_048, ge=1, description="Held-out tokens of such an evaluation.")

    @model_validator(mode="after")
    def t_rises(self) -> Self:
        if self.t_start > self.t_end:
            raise ValueError(
                f"t_start {self.t_start} is above t_end {self.t_end}; t rises from t_start to t_end"
            )
        if self.signal == "divergence" and self.t_start == 0:
            raise ValueError("signal divergence needs a t_start above 0, where the divergence is not zero")
        return self


class Pretrain(Training):
    """Continued pre-training on plain text after distillation."""

    tokens: int = Field(ge=1, description="Training tokens, taken from data.text.")


class Lora(Section):
    """Low-rank adapters, merged into the weights afterwards."""

    rank: int = Field(16, ge=1, description="Of the two matrices that stand for a weight's change.")
    alpha: int = Field(32, ge=1, description="The change is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of an adapter's inputs left out in training.")


class Instruct(Training):
    """Instruction tuning with loss on assistant turns only."""

    lora: Lora | None = Field(None, description="Train adapters only; without it all weights are trained.")


class Export(Section):
    """Formats and quantizations to ship."""

    gguf: list[str] = Field(
        default=["q8_0", "q5_k_m", "q4_k_m"],
        description="Quantizations for llama.cpp, beside the f16 that they are made from; [] for none.",
    )
    mlc: list[str] = Field(
        default=["q4f32_1"], description="Quantizations for MLC and WebLLM, a folder each; [] for none."
    )
    mlc_libraries: list[str] = Field(
        default=["x86_64-cpu"],
        description="What MLC libraries are compiled for: x86_64-cpu (gates and benchmark need it), "
        "aarch64-cpu (an archive of objects to link on or for such a system) and wasm32-webgpu (for WebLLM "
        "in browsers; needs Emscripten and a quantization in float32).",
    )
    onnx: list[str] = Field(
        default=["fp32", "int4"],
        description="Precisions for ONNX Runtime and transformers.js: fp32, fp16, int8, int4; [] for none.",
    )
    pre_tokenizer: str | None = Field(
        None,
        description="llama.cpp's name of the pre-tokenizer, for one that its converter does not recognise.",
    )

    importance_matrix: str | None = Field(
        None,
        description="Text that weighs the rounding errors of GGUF quantizations below q8_0: calibration for "
        "the recipe's own calibration split, or a text file; without it none is used.",
    )
    gptq: str | None = Field(
        None,
        description="Text on which GPTQ rounds the layers of ONNX's int4: calibration for the recipe's own "
        "calibration split, or a text file; without it k-quant rounds them, which needs none.",
    )
    timeout_s: float = Field(3600, gt=0, description="Seconds that one process of an export may take.")

    @model_validator(mode="after")
    def known(self) -> Self:
        for key, wanted, available in (
            ("gguf", self.gguf, quantizations.GGUF),
            ("mlc", self.mlc, quantizations.MLC),
            ("mlc_libraries", self.mlc_libraries, quantizations.MLC_LIBRARIES),
            ("onnx", self.onnx, quantizations.ONNX),
        ):
            for quantization in wanted:
                if quantization not in available:
                    raise ValueError(
                        f"{key}: there is no {quantization!r:.60}; choose from {', '.join(available)}"
                    )
            if len(set(wanted)) != len(wanted):
                raise ValueError(f"{key}: a quantization is listed twice")
        if self.mlc and "x86_64-cpu" not in self.mlc_libraries:
            raise ValueError("mlc_libraries: gates and benchmark run x86_64-cpu; add it")
        if quantizations.WEBGPU in self.mlc_libraries:
            for quantization in self.mlc:
                if quantizations.MLC[quantization][0] != "float32":
                    raise ValueError(
                        f"mlc_libraries: there is no {quantizations.WEBGPU} library of {quantization}; leave "
                        "one of them out, or take q4f32_1 or q0f32"
                    )
        if not (self.gguf or self.mlc or self.onnx):
            raise ValueError("nothing to export: list at least one quantization under gguf, mlc or onnx")
        return self


class Thresholds(Section):
    """A file that misses one of these fails the run."""

    mean_kl: float = Field(gt=0, description="Mean KL(torch || file) in nats per token, at most.")
    p99_kl: float | None = Field(
        None, gt=0, description="KL of the token at the 99 % quantile; without it that is no gate."
    )
    same_top: float = Field(
        0.0, ge=0, le=1, description="Share of tokens whose most likely token is the same, at least."
    )
    perplexity_ratio: float = Field(1.5, gt=1, description="Perplexity of the file over torch's, at most.")


class Validate(Section):
    """Gates of the exported files."""

    tokens: int = Field(2_048, ge=64, description="Held-out tokens that each file is run over.")
    default: Thresholds = Field(Thresholds(mean_kl=0.25), description="Thresholds of every file.")
    thresholds: dict[str, Thresholds] = Field(
        default_factory=dict, description="By quantization (q4_k_m, q4f32_1, int4, ...) in place of default."
    )
    timeout_s: float = Field(3600, gt=0, description="Seconds that the gates of one file may take.")


class Bench(Section):
    """Measurements of each file in its own runtime and process."""

    threads: int = Field(1, ge=1, description="CPU threads of the runtime that is measured.")
    prompt_tokens: int = Field(128, ge=1, description="Tokens of the prompt, whose speed is prefill's.")
    generated_tokens: int = Field(32, ge=1, description="Tokens written after it, whose speed is decode's.")
    repetitions: int = Field(5, ge=1, description="How often it is measured; the report has mean and spread.")
    settle_s: float = Field(
        0.1, ge=0, le=600, description="Seconds of rest between a file's warm-up and what is timed."
    )
    thread_sweep: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="Numbers of threads that speed is measured with beside ``threads``."
    )
    depths: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="Tokens in the cache already when decoding starts, for instance 0, 512, 2048."
    )
    cold_start: bool = Field(True, description="Also time the first token from a file not in the page cache.")
    profiles: list[str] = Field(
        default=[], description="Device profiles (profiles/*.yaml) to run each file under."
    )
    timeout_s: float = Field(1800, gt=0, description="Seconds that one measurement of one file may take.")
    max_cpu_pressure: float = Field(
        20.0,
        ge=0,
        le=100,
        description="Per cent of time that tasks waited for the CPU; above it timings are unreliable.",
    )


class Launch(Section):
    """Distillation as processes of its own, one for each device, started by torchrun."""

    processes: int = Field(1, ge=1, description="Training processes on each machine.")
    nodes: int = Field(1, ge=1, description="Machines.")
    rendezvous: str | None = Field(
        None, description="HOST:PORT of the first machine, where several of them meet."
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp", description="fsdp: the student's weights and optimizer are sharded (FSDP2; needs GPUs)."
    )
    shard_teacher: bool = Field(False, description="A live teacher's weights are sharded, too.")

    @model_validator(mode="after")
    def machines_meet(self) -> Self:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError("several nodes need a rendezvous, HOST:PORT of the first machine")
        return self


class Recipe(Section):
    """A whole run, from teacher to release."""

    name: Annotated[
        str, Field(pattern=NAME_PATTERN, description="NAME of the release folder's NAME-Instruct etc.")
    ]
    description: str = Field("", description="One sentence for the model cards and the report.")
    language: list[str] | None = Field(
        None,
        description="Languages of the model, ISO 639-1 codes such as en, for cards and GGUF files; without "
        "it en where all text comes from packages, else none.",
    )
    accept_licence_conflict: str | None = Field(
        None,
        min_length=1,
        description="Why licences that exclude each other may be mixed all the same; the cards show it.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of every random choice: shuffling, sampling, training.")
    threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        description="CPU threads of answers, exports and gates; measurements have bench.threads.",
    )
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default=[],
        description="Where distill, pretrain and instruct log to as well: tensorboard (event files in "
        "store/logs/tensorboard), wandb.",
    )
    teacher: Teacher = Field(description="The big model.")
    data: Data = Field(description="What the student learns from.")
    student: Student = Field(description="The small model.")
    distill: Distill = Field(Distill(), description="Distillation.")
    launch: Launch | None = Field(None, description="Several devices; without it one process trains.")
    pretrain: Pretrain | None = Field(None, description="More text after distillation; without it none.")
    instruct: Instruct = Field(description="Instruction tuning.")
    export: Export = Field(Export(), description="Formats and quantizations to ship.")
    validate_: Validate = Field(Validate(), alias="validate", description="Gates of the exported files.")
    bench: Bench = Field(Bench(), description="Measurements of the exported files.")

    @model_validator(mode="after")
    def student_of_known_code(self) -> Self:
        if self.teacher.trust_remote_code and self.student.prune is not None:
            raise ValueError(
                "student.prune: a teacher with teacher.trust_remote_code cannot be pruned, since no export "
                "knows its architecture; give student.model"
            )
        return self

    @field_validator("language", mode="before")
    @classmethod
    def languages_that_there_are(cls, value: Any) -> Any:
        for code in value if isinstance(value, list) else []:
            if code is False:
                raise ValueError('YAML reads no as false; write "no" in quotes for Norwegian')
            if isinstance(code, str) and code not in LANGUAGES:
                raise ValueError(
                    f"there is no ISO 639-1 code {shortened(code, 60)!r}; give two small letters, such as en"
                )
        return value

    @field_validator("name")
    @classmethod
    def no_dots(cls, name: str) -> str:
        if ".." in name:
            raise ValueError("a name may not contain '..'")
        return name

    @model_validator(mode="after")
    def samples_are_enough(self) -> Self:
        if self.teacher.cache == "sampled" and self.distill.objective not in SAMPLED_OBJECTIVES:
            raise ValueError(
                f"distill.objective: {self.distill.objective} needs more of the teacher than "
                f"teacher.cache: sampled keeps; set teacher.cache to hidden or choose from "
                f"{', '.join(SAMPLED_OBJECTIVES)}"
            )
        return self

    @model_validator(mode="after")
    def temperature_has_logits(self) -> Self:
        if self.distill.temperature == 1.0:
            return self
        if self.distill.objective in WITHOUT_TEMPERATURE:
            raise ValueError(
                f"distill.temperature: {self.distill.objective} takes none; leave it out, or choose another "
                "distill.objective"
            )
        if self.teacher.cache == "sampled":
            raise ValueError(
                "distill.temperature: sampled probabilities are those of temperature 1; leave it out, or set "
                "teacher.cache to hidden"
            )
        return self

    @model_validator(mode="after")
    def no_cache_knows_what_the_student_writes(self) -> Self:
        if self.distill.generations is not None and self.teacher.cache != "none":
            raise ValueError(
                "distill.generations: text that the student writes is in no cache; set teacher.cache to "
                f"none, not {self.teacher.cache}"
            )
        return self

    def slice(self, *sections: str) -> dict[str, Any]:
        """The named sections as plain JSON values: what a stage's result depends on."""
        dumped = self.model_dump(mode="json", by_alias=True)
        return {section: dumped[section] for section in sections}


def load_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe; relative paths in it are resolved against its folder.

    Raises:
        UserError: the file is missing, is no YAML, or a key is unknown, missing, of the wrong type or
            impossible.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_RECIPE + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); give the path of a YAML file.") from None
    if len(text) > LARGEST_RECIPE:
        raise UserError(f"{path}: is longer than {LARGEST_RECIPE} characters; a recipe has some thousand.")
    try:
        values = yaml.load(text, Loader=_Loader)
    except Exception as error:  # values of explicit types, such as !!int x, fail in ways of their own
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        deep = isinstance(error, RecursionError)
        problem = problem or ("nested too deeply" if deep else "a value is none of its type")
        raise UserError(f"{path}{where}: not valid YAML ({problem}); mend the syntax.") from None
    return recipe_of(values, path)


def recipe_of(values: Any, path: Path) -> Recipe:
    """The recipe of values that a file held; relative paths in it are resolved against the file's folder.

    Raises:
        UserError: as ``load_recipe``.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values; this file holds none.")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from None
    return _resolve_paths(recipe, path)


class _Loader(yaml.SafeLoader):
    """YAML's safe subset. Mappings that merge others, which merge others, may not grow without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > LARGEST_MAPPING:
            raise yaml.constructor.ConstructorError(
                None, None, f"a mapping has more than {LARGEST_MAPPING} keys", node.start_mark
            )


class _Shown(reprlib.Repr):
    """A value in a sentence. Aliases make a few lines of YAML a value that no memory holds as text."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxdict = self.maxlevel = 4
        self.maxstring = self.maxother = self.maxlong = 200


def shortened(text: str, length: int) -> str:
    """Text of at most so many characters; what is left out leaves three dots."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _first_problem(error: ValidationError) -> str:
    """One sentence for the first thing that is wrong, unknown keys first since they explain missing ones."""
    problems = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    problem = problems[0]
    key = shortened(".".join(str(part) for part in problem["loc"]) or "the recipe", 200)
    message = re.sub(r"^Value error, | after validation, not \d+$", "", problem["msg"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}; remove it or correct its spelling (docs/guide.md lists all keys)."
    if problem["type"] == "missing":
        return f"key {key} is missing; add it (docs/guide.md lists all keys)."
    shown = _Shown().repr(problem.get("input"))
    shown = shortened(shown, 60)
    if problem["type"] == "value_error":
        return f"{key}: {message}." if problem["loc"] else f"{message}."
    return f"{key}: {message[0].lower()}{message[1:]}, not {shown}."


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).suffix != ""


def _resolve_paths(recipe: Recipe, file: Path) -> Recipe:
    folder = file.resolve().parent

    def resolve(key: str, value: str) -> Path:
        try:
            path = (folder / Path(value).expanduser()).resolve()
            path.exists()  # names that no file can have
        except (OSError, ValueError, RuntimeError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
            raise UserError(f"{file}: {key}: {_Shown().repr(value)} is no path ({reason}).") from None
        return path

    def source(key: str, value: str) -> str:
        if ":" in value:
            return value
        path = resolve(key, value)
        return str(path) if _is_path(value) else value

    def model(key: str, value: str | None) -> str | None:
        if value is None or value.startswith("package:"):
            return value
        candidate = resolve(key, value)
        return str(candidate) if value.startswith((".", "/", "~")) or candidate.is_dir() else value

    weighing = {
        key: source if source in (None, CALIBRATION) else str(resolve(f"export.{key}", source))
        for key, source in (
            ("importance_matrix", recipe.export.importance_matrix),
            ("gptq", recipe.export.gptq),
        )
    }
    text, chats = (
        section.model_copy(update={"sources": [source(key, each) for each in section.sources]})
        for key, section in (
            ("data.text.sources", recipe.data.text),
            ("data.chats.sources", recipe.data.chats),
        )
    )
    profiles = [str(resolve("bench.profiles", each)) for each in recipe.bench.profiles]
    teacher = model("teacher.model", recipe.teacher.model)
    student = model("student.model", recipe.student.model)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"text": text, "chats": chats}),
            "bench": recipe.bench.model_copy(update={"profiles": profiles}),
            "teacher": recipe.teacher.model_copy(update={"model": teacher}),
            "student": recipe.student.model_copy(update={"model": student}),
            "export": recipe.export.model_copy(update=weighing),
        }
    )
