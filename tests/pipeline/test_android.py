"""martlet phone --adb against a fake adb, and the program that it runs under qemu."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from release_artifacts import example_artifacts, example_recipe, example_stage_times
from transformers import AutoModelForCausalLM

from export import device_program
from export.gguf import export_gguf
from export.runtime import generate_greedily, open_runtime
from pipeline import android, release, report
from pipeline.artifacts import Artifact, Store, sha256_of_file, with_own_digest, write_json
from pipeline.errors import UserError

PROPERTIES = {
    "ro.product.cpu.abi": "arm64-v8a",
    "ro.product.manufacturer": "Maker",
    "ro.product.model": "Phone 11",
    "ro.build.version.release": "16",
}
ANSWER = {
    "processors": 8,
    "memory_bytes": 8_123_456_789.0,
    "system": "CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 | ",
    "weights_in": ["CPU_Mapped 80.05 MiB"],
    "threads": 4,
    "load_s": 0.25,
    "prompt_tokens": 120,
    "peak_rss_bytes": 120_000_000,
    "ttft_s": [1.0, 1.25, 1.5],
    "decode_s": [1.0, 1.6, 2.0],
}


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    store = Store(folder / "store", report=lambda line: None)
    recipe = example_recipe()
    artifacts = example_artifacts(store, recipe)
    return release.run(recipe, artifacts, folder / "release", store, example_stage_times(artifacts))


@pytest.fixture
def released(laid_out: Path, tmp_path: Path) -> Path:
    return shutil.copytree(laid_out, tmp_path / "release")


@pytest.fixture
def attach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts an adb with one device on PATH; its folder."""

    def attached(**facts: Any) -> Path:
        folder = tmp_path / "adb"
        (folder / "disk").mkdir(parents=True)
        shutil.copyfile(Path(__file__).with_name("fake_adb.py"), folder / "adb")
        (folder / "adb").chmod(0o755)
        known: dict[str, Any] = {"devices": {"P11": "device"}, "properties": PROPERTIES}
        (folder / "device.json").write_text(json.dumps(known | facts))
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return folder

    return attached


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """A device program that is a shell script."""

    def write(script: str) -> Path:
        path = tmp_path / "device_program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        return path

    return write


def measure(
    root: Path, program: Path | None, wanted: str | None = "q4_k_m", serial: str | None = None
) -> list[str]:
    said: list[str] = []
    android.run(root, serial=serial, wanted=wanted, threads=4, say=said.append, program=program)
    return said


def test_a_device_measures_and_is_left_as_it_was(
    released: Path, attach: Callable[..., Path], program: Callable[[str], Path], tmp_path: Path
) -> None:
    adb = attach()
    script = f"""ls > {tmp_path}/seen; echo "$@" >> {tmp_path}/seen; wc -c < model.gguf >> {tmp_path}/seen
cat prompt.txt >> {tmp_path}/seen; echo a warning; echo '{json.dumps(ANSWER)}'"""
    said = measure(released, program(script))
    (file,) = released.glob("*/*q4_k_m.gguf")
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen[:3] == ["device_program", "model.gguf", "prompt.txt"]
    assert seen[3] == "benchmark model.gguf prompt.txt 4 32 3"
    assert int(seen[4]) == file.stat().st_size
    assert seen[5] == android.TEXT
    assert list((adb / "disk").iterdir()) == []
    facts = json.loads((released / "report.json").read_text())
    (entry,) = facts["phones"]
    assert (entry["file"], entry["quantization"], entry["bytes"]) == (
        file.name,
        "q4_k_m",
        file.stat().st_size,
    )
    assert entry["device"]["model"] == "Maker Phone 11"
    assert (entry["device"]["memory_gb"], entry["device"]["processors"]) == (8.1, 8)
    assert entry["ttft_s"] == 1.25
    assert entry["prefill_tokens_per_s"] == pytest.approx((120 + 96 + 80) / 3)
    assert entry["decode_tokens_per_s"] == pytest.approx((32 + 20 + 16) / 3)
    assert entry["decode_std"] == pytest.approx(8.3267, rel=1e-4)
    assert entry["runtime"] == "llama.cpp, native: NEON, ARM_FMA, DOTPROD"
    schema = json.loads((Path(report.__file__).parent / "schemas" / "report.schema.json").read_text())
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(facts)] == []
    page = (released / "report.html").read_text()
    assert "Maker Phone 11, Android 16, 8 processors" in page
    assert "22.7 ± 8.3" in page
    assert release.verify(released) == []
    assert "Maker Phone 11, Android 16, 8 processors: " in said[-1]


def test_every_gguf_file_is_measured_and_again_replaces(
    released: Path, attach: Callable[..., Path], program: Callable[[str], Path]
) -> None:
    attach()
    for _ in range(2):
        measure(released, program(f"echo '{json.dumps(ANSWER)}'"), wanted=None)
    phones = json.loads((released / "report.json").read_text())["phones"]
    assert {entry["file"] for entry in phones} == {path.name for path in released.glob("*/*.gguf")}
    assert len(phones) == len(list(released.glob("*/*.gguf")))


QUESTION = "What is a swallow, and where does it spend the winter?"
ANSWER_TOKENS = 96
RUNS_NOT = "the benchmark program does not run on this device"
UNREADABLE = "the benchmark program ran, but its answer cannot be read"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo Illegal instruction >&2; exit 132", rf"{RUNS_NOT} \(status 132: Illegal instruction\).*2018"),
        ("kill -ILL $$", rf"{RUNS_NOT} \(status 132"),
        ("exit 126", rf"{RUNS_NOT} \(status 126"),
        ("kill -9 $$", "needs more memory than the device gives, and was killed"),
        (
            "echo 'llama.cpp cannot load the file.' >&2; exit 3",
            r"cannot be measured \(llama.cpp cannot load the file\)",
        ),
        ("echo hello", rf"{UNREADABLE} \('hello'\)"),
        ("true", UNREADABLE),
        (f"echo '{json.dumps(ANSWER | {'decode_s': []})}'", UNREADABLE),
        (f"echo '{json.dumps(ANSWER | {'load_s': float('nan')})}'", UNREADABLE),
    ],
)
def test_each_failure_has_its_own_sentence_and_the_device_is_cleaned_up(
    released: Path, attach: Callable[..., Path], program: Callable[[str], Path], script: str, sentence: str
) -> None:
    adb = attach()
    before = (released / "report.json").read_bytes()
    with pytest.raises(UserError, match=rf"^P11: .*{sentence}"):
        measure(released, program(script))
    assert list((adb / "disk").iterdir()) == []
    assert (released / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("device", "serial", "sentence"),
    [
        ({"devices": {}}, None, "no device is attached"),
        ({"devices": {"A": "device"}}, "B", "B is not attached"),
        (
            {"devices": {"A": "device", "B": "device"}},
            None,
            "--serial: 2 devices are attached; name one of A, B",
        ),
        ({"devices": {"A": "unauthorized"}}, None, "A: does not trust this computer"),
        ({"devices": {"A": "no permissions (user in plugdev group)"}}, None, "A: is no"),
        ({"devices": {"A": "offline"}}, None, "A: is offline"),
        (
            {"properties": {"ro.product.cpu.abi": "x86_64"}},
            None,
            "its processor is x86_64; over adb, only 64-bit ARM",
        ),
        ({"properties": {}}, None, "its processor is not named"),
        ({"full_at": ".gguf"}, None, r"q4_k_m\.gguf cannot be copied .*No space left on device\)"),
        ({"lost_at": "benchmark"}, None, r"the connection was lost \(error: device offline\)"),
    ],
)
def test_a_device_that_cannot_be_used_is_one_sentence(
    released: Path,
    attach: Callable[..., Path],
    program: Callable[[str], Path],
    device: dict[str, Any],
    serial: str | None,
    sentence: str,
) -> None:
    adb = attach(**device)
    with pytest.raises(UserError, match=sentence):
        measure(released, program("exit 1"), serial=serial)
    assert list((adb / "disk").iterdir()) == []


def test_what_is_left_on_a_lost_device_is_said(
    released: Path, attach: Callable[..., Path], program: Callable[[str], Path]
) -> None:
    adb = attach(lost_at="rm -rf")
    said: list[str] = []
    script = program(f"echo '{json.dumps(ANSWER)}'")
    android.run(released, serial="P11", wanted="q8_0", threads=1, say=said.append, program=script)
    assert re.match(
        r"/data/local/tmp/martlet-[0-9a-f]{16} is still on the device: P11: the connection", said[-1]
    )
    assert len(list((adb / "disk").iterdir())) == 1


def test_without_adb_or_file_it_is_said(
    released: Path, attach: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach()
    with pytest.raises(UserError, match=r"--file: 'q9' fits none of .*q8_0\.gguf"):
        measure(released, None, wanted="q9")
    with pytest.raises(UserError, match="is missing or no manifest of martlet"):
        measure(tmp_path, None)
    (file,) = released.glob("*/*q4_k_m.gguf")
    file.write_bytes(b"another")
    with pytest.raises(UserError, match="is not as the manifest says"):
        measure(released, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="adb is not installed"):
        measure(released, None, wanted="q8_0")


def test_the_prompt_is_the_pages() -> None:
    script = (Path(__file__).parents[2] / "web" / "src" / "app.js").read_text(encoding="utf-8")
    quoted = re.search(r"const CHECK_TEXT =\n(.*?);\n", script, re.DOTALL)
    assert quoted is not None
    assert "".join(re.findall(r'"(.*)"', quoted[1])) == android.TEXT


@pytest.fixture(scope="module")
def emulator() -> str:
    """qemu for 64-bit ARM, where the program is built or can be."""
    found = shutil.which("qemu-aarch64")
    if found is None:
        pytest.skip("qemu-aarch64 is not installed (apt-get install qemu-user)")
    if device_program.missing_tools() and not device_program.program_path().is_file():
        pytest.skip(f"not installed: {', '.join(device_program.missing_tools())}")
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_real_program_measures_a_real_file_on_an_emulated_processor(
    released: Path, attach: Callable[..., Path], emulator: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (file,) = released.glob("*/*q8_0.gguf")
    (made,) = export_gguf(tiny_model_dir, tmp_path / "gguf", "tiny", ["q8_0"], pre_tokenizer="smollm")
    shutil.copyfile(made, file)
    manifest = json.loads((released / "manifest.json").read_text())
    entry = manifest["files"][file.relative_to(released).as_posix()]
    entry |= {"sha256": sha256_of_file(file), "bytes": file.stat().st_size}
    write_json(released / "manifest.json", with_own_digest(manifest))
    adb = attach(emulator=[emulator, "-cpu", "max"])
    measure(released, None, wanted="q8_0")
    (phone,) = json.loads((released / "report.json").read_text())["phones"]
    runtime = open_runtime(file)
    assert phone["prompt_tokens"] == len(runtime.tokenize(android.TEXT))
    runtime.close()
    assert phone["device"]["processors"] == os.cpu_count()
    assert {"NEON", "DOTPROD"} <= set(phone["runtime"].replace(",", "").split())
    assert phone["decode_tokens_per_s"] > 0
    assert phone["threads"] == 4
    assert list((adb / "disk").iterdir()) == []
    # A processor that lacks the instructions that the program is built for, as old phones do.
    (adb / "device.json").write_text(
        json.dumps(
            {**json.loads((adb / "device.json").read_text()), "emulator": [emulator, "-cpu", "cortex-a53"]}
        )
    )
    with pytest.raises(UserError, match=f"{RUNS_NOT} .*status 132"):
        measure(released, None, wanted="q8_0")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_model_says_on_64_bit_arm_what_it_says_here(
    real_teacher: Artifact, emulator: str, tmp_path: Path
) -> None:
    """Teacher forcing: both processors read a question and this one's greedy answer. llama.cpp rounds what
    goes into each layer to eight bits, each processor in its own way, which moves logits of this model by
    one and more. So both are held against the file's own weights, run in float32 by torch: the other
    processor strays from them no further than this one does."""
    program = device_program.build(print)
    quantizations = ["q8_0", "q4_k_m"]
    folder = real_teacher.path / "model"
    for file in export_gguf(folder, tmp_path / "gguf", "real", quantizations, pre_tokenizer="smollm"):
        runtime = open_runtime(file, threads=len(os.sched_getaffinity(0)))
        prompt = runtime.chat_ids([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
        ids = [*prompt, *generate_greedily(runtime, prompt, ANSWER_TOKENS)]
        runtime.reset()
        logits = runtime.forward(ids)
        runtime.close()
        (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
        command = [emulator, "-cpu", "max", program, "rank", file, tmp_path / "ids.txt", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        top = np.array(answer["top"])
        places = np.arange(len(ids))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        with torch.no_grad():
            exact = model(torch.tensor([ids])).logits[0].numpy()
        here = logits.argmax(axis=1)
        error_here = np.sqrt(((logits[places, here] - exact[places, here]) ** 2).mean())
        error_there = np.sqrt(((answer["top_logit"] - exact[places, top]) ** 2).mean())
        same_here, same_there = ((exact.argmax(axis=1) == first).mean() for first in (here, top))
        behind = exact.max(axis=1) - exact[places, top]
        print(
            f"{file.name}, {len(ids)} tokens: first token as in float32 {same_there:.3f} there, "
            f"{same_here:.3f} here, at most {behind.max():.3f} logits behind; error of its logit "
            f"{error_there:.3f} there, {error_here:.3f} here"
        )
        assert len(top) == len(ids)
        assert error_there < 1.25 * error_here
        assert same_there > same_here - 0.05
        # A first token falls behind where two logits err by as much and to opposite sides.
        assert behind.max() < 2 * np.abs(logits - exact).max()
