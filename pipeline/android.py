"""The phone check by cable: an attached Android device runs a release's GGUF files natively over adb."""

import re
import secrets
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export import device_program
from pipeline import phone
from pipeline import release as release_stage
from pipeline.artifacts import sha256_of_file
from pipeline.errors import UserError

REMOTE = "/data/local/tmp"
"""Where the user of adb may write and run programs."""
GENERATED_TOKENS, REPETITIONS = 32, 3
"""Those of the release's page."""
TEXT = (
    "The swallow builds its nest of mud under the roof of a barn and comes back to it every spring. "
    "Before the rain it flies low over the meadow, because the insects that it eats stay near the "
    "ground. In autumn it gathers with others on the wires along the road, and one morning all of them "
    "are gone. They cross the sea and the desert and spend the winter where it is warm. People have "
    "watched this for thousands of years and still do not know everything about how such a small bird "
    "finds its way. Some say that it remembers the shape of the coast, others that it feels where north "
    "is. Perhaps it does both, and"
)
"""The prompt, the same as the page's."""
SECONDS = 60.0
"""What a command that only asks may take."""
COPY_SECONDS = RUN_SECONDS = 1800.0

Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


class Answer(BaseModel):
    """What ``device_program benchmark`` prints."""

    model_config = ConfigDict(extra="forbid", strict=True)

    processors: Count
    memory_bytes: Annotated[float, Field(gt=0)]
    system: str
    weights_in: list[str]
    threads: Count
    load_s: Seconds
    prompt_tokens: Count
    peak_rss_bytes: Count
    ttft_s: Annotated[list[Seconds], Field(min_length=1)]
    decode_s: Annotated[list[Seconds], Field(min_length=1)]


class Adb:
    """One attached device.

    Raises:
        UserError: adb is not installed, or there is no device, none that can be used, or several.
    """

    def __init__(self, serial: str | None):
        """
        Args:
            serial: the device's serial number; None where only one is attached.
        """
        found = shutil.which("adb")
        if found is None:
            raise UserError(
                "--adb: adb is not installed; install Android's platform tools (apt-get install adb)."
            )
        self._program = found
        listed = self._run(["devices"], SECONDS)
        if listed.returncode:
            raise UserError(f"adb devices: failed ({last_line(listed)}); mend the installation of adb.")
        # Before it stand lines about the daemon, if adb had to start it.
        lines = listed.stdout.partition("List of devices attached")[2].splitlines()
        states = dict(line.split(maxsplit=1) for line in lines if line.strip())
        if serial is None and len(states) > 1:
            raise UserError(f"--serial: {len(states)} devices are attached; name one of {', '.join(states)}.")
        self.serial = serial or next(iter(states), "")
        state = states.get(self.serial, "").split(" ")[0]
        if not state:
            which = f"{serial} is not attached" if serial else "no device is attached"
            raise UserError(f"--adb: {which}; connect it and allow USB debugging.")
        if state == "unauthorized":
            raise UserError(
                f"{self.serial}: does not trust this computer; allow USB debugging on its screen."
            )
        if state != "device":
            raise UserError(f"{self.serial}: is {state}; connect it anew.")

    def shell(self, command: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
        """Runs a command line on the device.

        Raises:
            UserError: the device is gone, or the time is over.
        """
        done = self._run(["-s", self.serial, "shell", command], seconds)
        if done.returncode and re.match(r"(adb: )?error: |adb: ", done.stderr):
            raise UserError(f"{self.serial}: the connection was lost ({last_line(done)}); connect it anew.")
        return done

    def ask(self, command: str) -> str:
        """Standard output of a command that has to succeed.

        Raises:
            UserError: it failed.
        """
        done = self.shell(command)
        if done.returncode:
            raise UserError(f"{self.serial}: refuses '{command}' ({last_line(done)}).")
        return done.stdout

    def push(self, file: Path, remote: str) -> None:
        """Copies a file to the device.

        Raises:
            UserError: it cannot be copied.
        """
        done = self._run(["-s", self.serial, "push", str(file), remote], COPY_SECONDS)
        if done.returncode:
            raise UserError(f"{self.serial}: {file.name} cannot be copied to the device ({last_line(done)}).")

    def _run(self, arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [self._program, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"adb {arguments[-1][:60]}: took longer than {seconds:g} s; look at the device and try again."
            ) from None


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said last, as part of a sentence."""
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = (errors or lines or [f"status {done.returncode}"])[-1]
    return said.rstrip(".")[-200:]  # the end of it says why


def run(
    release: Path,
    *,
    serial: str | None,
    wanted: str | None,
    threads: int,
    say: Callable[[str], None],
    program: Path | None = None,
) -> None:
    """Measures GGUF files of a release on an attached device; each result enters the report at once.

    Args:
        release: release folder.
        serial: of the device, where several are attached.
        wanted: a part of the name of the files that are meant; all by default.
        threads: CPU threads.
        say: told what happens.
        program: ``device_program`` for the device; built, or taken from this environment, by default.

    Raises:
        UserError: no release, no such file, no usable device, or a file that cannot be measured on it.
        ExportError: the program cannot be built.
    """
    root = Path(release).resolve()
    files = released_gguf_files(root, wanted)
    adb = Adb(serial)
    device = describe(adb)
    program = program or device_program.build(say)
    with folder_on_device(adb, say) as folder, tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "prompt.txt"
        text.write_text(TEXT, encoding="utf-8")
        adb.push(program, f"{folder}/device_program")
        adb.push(text, f"{folder}/prompt.txt")
        adb.ask(f"chmod 755 {folder}/device_program")
        for file, facts in files:
            say(f"{adb.serial}: copying {file.name}, {facts['bytes'] / 1e6:.0f} MB")
            adb.push(file, f"{folder}/model.gguf")
            say(f"{adb.serial}: measuring {file.name}")
            say(phone.record(root, measure(adb, folder, facts, threads, device)))


def released_gguf_files(root: Path, wanted: str | None) -> list[tuple[Path, dict[str, Any]]]:
    """GGUF files of a release, smallest first, with {file, format, quantization, bytes}.

    Raises:
        UserError: the folder is no release, a file is not as its manifest says, or none fits.
    """
    manifest = release_stage.require_manifest(root)
    released = {Path(name).name: root / name for name in manifest["files"] if name.endswith(".gguf")}
    if not released:
        raise UserError(f"{root}: holds no GGUF file; over adb only those are measured.")
    fitting = {name: path for name, path in released.items() if (wanted or "").lower() in name.lower()}
    if not fitting:
        raise UserError(f"--file: {wanted!r} fits none of {', '.join(released)}.")
    found = []
    for name, path in fitting.items():
        entry = manifest["files"][path.relative_to(root).as_posix()]
        if not path.is_file() or sha256_of_file(path) != entry["sha256"]:
            raise UserError(f"{path}: is not as the manifest says; lay the release out again.")
        quantization = path.stem.rpartition("-")[2]
        found.append(
            (path, {"file": name, "format": "gguf", "quantization": quantization, "bytes": entry["bytes"]})
        )
    return sorted(found, key=lambda each: each[1]["bytes"])


def describe(adb: Adb) -> dict[str, Any]:
    """What Android says of the device, by the keys of ``phone.Device``.

    Raises:
        UserError: it is no 64-bit ARM.
    """
    properties = dict(re.findall(r"^\[([^]]+)]: \[([^]]*)]", adb.ask("getprop"), re.MULTILINE))
    abi = properties.get("ro.product.cpu.abi", "")
    if abi != "arm64-v8a":
        raise UserError(
            f"{adb.serial}: its processor is {abi or 'not named'}; over adb, only 64-bit ARM (arm64-v8a) is "
            "measured."
        )
    maker, model = (properties.get(f"ro.product.{part}", "") for part in ("manufacturer", "model"))
    return {
        "user_agent": None,
        "platform": "Android",
        "platform_version": properties.get("ro.build.version.release") or None,
        "model": model if model.lower().startswith(maker.lower()) else f"{maker} {model}".strip() or None,
        "architecture": abi,
        "mobile": True,
        "screen": None,
        "webgpu": None,
        "threads_allowed": True,
    }


@contextmanager
def folder_on_device(adb: Adb, say: Callable[[str], None]) -> Iterator[str]:
    """A new folder on the device, which is removed however the measurement ends."""
    folder = f"{REMOTE}/martlet-{secrets.token_hex(8)}"
    adb.ask(f"mkdir {folder}")
    try:
        yield folder
    finally:
        try:
            adb.ask(f"rm -rf {folder}")
        except UserError as error:
            say(f"{folder} is still on the device: {error}")


def measure(
    adb: Adb, folder: str, facts: dict[str, Any], threads: int, device: dict[str, Any]
) -> phone.Result:
    """Runs the program on ``model.gguf`` in the device's folder.

    Raises:
        UserError: the program does not run there, was killed, refuses the file, or its answer cannot be read.
    """
    command = f"./device_program benchmark model.gguf prompt.txt {threads} {GENERATED_TOKENS} {REPETITIONS}"
    done = adb.shell(f"cd {folder} && {command}", RUN_SECONDS)
    said, name, status = last_line(done), facts["file"], done.returncode
    if status in (2, 3):
        raise UserError(f"{adb.serial}: {name} cannot be measured ({said}).")
    if status == 128 + 9:
        raise UserError(f"{adb.serial}: {name} needs more memory than the device gives, and was killed.")
    if status:
        raise UserError(
            f"{adb.serial}: the benchmark program does not run on this device (status {status}: {said}); it "
            f"needs a processor of {device_program.ARCHITECTURE}, as phones have since about 2018."
        )
    try:
        answer = Answer.model_validate_json((done.stdout.strip().splitlines() or [""])[-1])
    except ValidationError:
        raise UserError(
            f"{adb.serial}: the benchmark program ran, but its answer cannot be read "
            f"({done.stdout.strip()[-80:]!r})."
        ) from None
    prefill = [answer.prompt_tokens / seconds for seconds in answer.ttft_s]
    decode = [GENERATED_TOKENS / seconds for seconds in answer.decode_s]
    built_with = re.findall(r"(\w+) = 1", answer.system)
    described = {**device, "processors": answer.processors, "memory_gb": round(answer.memory_bytes / 1e9, 1)}
    measurement = {
        **facts,
        "runtime": f"llama.cpp, native: {', '.join(built_with)}",
        "threads": answer.threads,
        "load_s": answer.load_s,
        "ttft_s": statistics.mean(answer.ttft_s),
        "prefill_tokens_per_s": statistics.mean(prefill),
        "prefill_std": statistics.stdev(prefill) if len(prefill) > 1 else 0.0,
        "decode_tokens_per_s": statistics.mean(decode),
        "decode_std": statistics.stdev(decode) if len(decode) > 1 else 0.0,
        "memory_bytes": answer.peak_rss_bytes,
        "repetitions": len(decode),
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": GENERATED_TOKENS,
    }
    return phone.Result.model_validate({"device": described, "measurement": measurement})
