"""martlet phone: what it serves, whom it lets in, what it takes; over real sockets and real TLS."""

import hashlib
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cryptography import x509
from phone_site import Site
from release_artifacts import example_artifacts, example_recipe, example_stage_times

from pipeline import phone, release, report, web
from pipeline.artifacts import Store
from pipeline.errors import UserError

RESULT: dict[str, Any] = {
    "device": {
        "user_agent": "Mozilla/5.0 (Linux; Android 16; Pixel 11) <script>",
        "platform": "Android",
        "platform_version": "16.0.0",
        "model": "Pixel 11",
        "architecture": None,
        "mobile": True,
        "processors": 8,
        "memory_gb": 8,
        "screen": "412x915@2.6",
        "webgpu": None,
        "threads_allowed": True,
    },
    "measurement": {
        "file": "martlet-99m-instruct-q4_k_m.gguf",
        "format": "gguf",
        "quantization": "q4_k_m",
        "bytes": 81_000,
        "runtime": "llama.cpp in WebAssembly",
        "threads": 4,
        "load_s": 0.61,
        "ttft_s": 1.25,
        "prefill_tokens_per_s": 104.5,
        "prefill_std": 2.5,
        "decode_tokens_per_s": 21.25,
        "decode_std": 0.5,
        "memory_bytes": 190_000_000,
        "repetitions": 3,
        "prompt_tokens": 130,
        "generated_tokens": 32,
    },
}


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    page = tmp_path / "dist"
    page.mkdir()
    (page / "index.html").write_text("<!doctype html><title>page</title>")
    (page / "engine.wasm").write_bytes(b"\0asm")
    monkeypatch.setattr(web, "BUILT", page)
    store = Store(tmp_path / "store", report=lambda line: None)
    recipe = example_recipe()
    artifacts = example_artifacts(store, recipe)
    return release.run(recipe, artifacts, tmp_path / "release", store, example_stage_times(artifacts))


@pytest.fixture
def here(released: Path, tmp_path: Path) -> Iterator[Site]:
    site = Site(released, None, tmp_path)
    yield site
    site.close()


@pytest.fixture
def lan(released: Path, tmp_path: Path) -> Iterator[Site]:
    site = Site(released, "a-token", tmp_path)
    yield site
    site.close()


def test_the_page_is_served_with_what_threads_need(here: Site) -> None:
    status, headers, body = here.ask("GET", "/web/?phone")
    assert (status, body) == (200, b"<!doctype html><title>page</title>")
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-embedder-policy"] == "require-corp"
    assert headers["x-content-type-options"] == "nosniff"
    assert here.ask("GET", "/web/engine.wasm")[1]["content-type"] == "application/wasm"
    status, headers, _ = here.ask("GET", "/")
    assert (status, headers["location"]) == (303, phone.START)


@pytest.mark.parametrize(
    "path",
    [
        "/web",
        "/Martlet-99M-Instruct-GGUF/",
        "/../store",
        "/web/../../store",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/web/..%2f..%2fstore",
        "//etc/passwd",
        "/manifest.json",
        "/.git/config",
    ],
)
def test_only_files_of_the_manifest_are_served(here: Site, path: str) -> None:
    assert here.ask("GET", path)[0] == 404


def test_a_link_out_of_the_release_is_not_followed(released: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (released / "web" / "engine.wasm").unlink()
    (released / "web" / "engine.wasm").symlink_to(tmp_path / "secret")
    assert "web/engine.wasm" not in phone.released_files(released)


def test_one_device_gets_in_with_the_token_and_only_once(lan: Site) -> None:
    assert lan.ask("GET", "/web/")[0] == 403
    assert lan.post(RESULT)[0] == 403
    assert lan.ask("GET", "/?token=wrong")[0] == 403
    assert lan.ask("GET", "/?token=%C3%A9")[0] == 403
    status, headers, _ = lan.ask("GET", "/?token=a-token")
    assert (status, headers["location"]) == (303, phone.START)
    cookie, *flags = headers["set-cookie"].split("; ")
    assert {"httponly", "secure", "samesite=lax"} <= {flag.lower() for flag in flags}
    assert lan.ask("GET", "/web/", Cookie=cookie)[0] == 200
    assert lan.ask("GET", "/?token=a-token", Cookie=cookie)[0] == 303
    assert lan.ask("GET", "/?token=a-token")[0] == 403
    assert lan.ask("GET", "/web/", Cookie=f"{phone.COOKIE}=guess")[0] == 403


def test_the_certificate_names_the_address_and_its_key_is_private(lan: Site) -> None:
    certificate = x509.load_pem_x509_certificate(lan.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name) for name in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert lan.certificate.stat().st_mode & 0o077 == 0
    shown = ssl.DER_cert_to_PEM_cert(
        ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", lan.port)))
    )
    assert x509.load_pem_x509_certificate(shown.encode()) == certificate
    assert re.fullmatch("([0-9A-F]{2}:){31}[0-9A-F]{2}", lan.fingerprint)


def test_a_result_lands_in_the_report_and_the_release_stays_whole(here: Site, released: Path) -> None:
    status, _, body = here.post(RESULT, Origin=here.origin)
    assert status == 200, body
    faster = deepcopy(RESULT)
    faster["measurement"]["decode_tokens_per_s"] = 33.25
    assert here.post(faster)[0] == 200
    other = deepcopy(RESULT)
    other["device"]["model"] = "Pixel 12"
    assert here.post(other)[0] == 200
    facts = json.loads((released / "report.json").read_text())
    assert [entry["device"]["model"] for entry in facts["phones"]] == ["Pixel 11", "Pixel 12"]
    assert facts["phones"][0]["decode_tokens_per_s"] == 33.25
    schema = json.loads((Path(report.__file__).parent / "schemas" / "report.schema.json").read_text())
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(facts)] == []
    page = (released / "report.html").read_text()
    assert "Pixel 11, Android 16.0.0, 8 processors" in page
    assert "33.2 ± 0.50" in page
    assert "<script" not in page
    assert release.verify(released) == []
    assert (
        "Pixel 11, Android 16.0.0, 8 processors: martlet-99m-instruct-q4_k_m.gguf, 21.2 tok/s" in here.said[0]
    )


def with_mlc_folder(root: Path) -> dict[str, Any]:
    """Has the page offer an MLC folder; what a browser with WebGPU posts of it."""
    listed = root / "web" / "models.json"
    models = json.loads(listed.read_text())
    offered = {
        "file": "martlet-wasm32-webgpu.wasm",
        "format": "mlc",
        "quantization": "q4f32_1",
        "bytes": 70_000,
    }
    models["models"].append({"id": "mlc-q4f32_1", **offered})
    listed.write_text(json.dumps(models))
    result = deepcopy(RESULT)
    result["measurement"] |= {**offered, "runtime": "WebLLM on WebGPU", "threads": 1}
    result["device"]["webgpu"] = "qualcomm adreno-7xx"
    return result


def test_a_phone_with_webgpu_measures_the_mlc_folder(here: Site, released: Path) -> None:
    result = with_mlc_folder(released)
    status, _, body = here.post(result)
    assert status == 200, body
    facts = json.loads((released / "report.json").read_text())
    schema = json.loads((Path(report.__file__).parent / "schemas" / "report.schema.json").read_text())
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(facts)] == []
    assert "WebLLM on WebGPU" in (released / "report.html").read_text()


def test_speed_on_a_graphics_processor_made_of_software_is_not_taken(here: Site, released: Path) -> None:
    result = with_mlc_folder(released)
    before = (released / "report.json").read_bytes()
    result["device"]["webgpu"] = "google swiftshader"
    status, _, body = here.post(result)
    assert status == 422
    assert "device.webgpu: 'google swiftshader' is a graphics processor made of software" in body.decode()
    assert (released / "report.json").read_bytes() == before
    # What else the device measures is its processor's.
    cpu = deepcopy(RESULT)
    cpu["device"]["webgpu"] = "google swiftshader"
    assert here.post(cpu)[0] == 200


def result_with(part: str, key: str, value: Any) -> str:
    """A result in which one value is another."""
    broken = deepcopy(RESULT)
    broken[part][key] = value
    return json.dumps(broken)


def result_without(part: str, key: str) -> str:
    broken = deepcopy(RESULT)
    del broken[part][key]
    return json.dumps(broken)


JSON = {"Content_Type": "application/json"}
Request = tuple[str, str, str | bytes, dict[str, str], int, str]


def posted(body: str | bytes, sentence: str, status: int = 422, **headers: str) -> Request:
    """A result that is none."""
    return "POST", "/results", body, JSON | headers, status, sentence


NOT_RELEASED = "with this format, quantization and bytes is not in the release."
REQUESTS: dict[str, Request] = {
    "a file that is not there": ("GET", "/web/a.js", "", {}, 404, "There is no such file in this release."),
    "reading results": ("GET", "/results", "", {}, 404, "There is no such file in this release."),
    "another host": ("GET", "/web/", "", {"Host": "evil.example"}, 400, "Invalid host header"),
    "another method": ("DELETE", "/web/", "", {}, 405, "Method Not Allowed"),
    "another site": posted(
        json.dumps(RESULT),
        "Results are taken from the release's own page alone.",
        403,
        Origin="http://evil.example",
    ),
    "no JSON by its name": posted("{}", "Results are JSON.", 415, Content_Type="text/plain"),
    "too much": posted(
        b" " * (phone.LARGEST_BODY + 1), f"A result has at most {phone.LARGEST_BODY} bytes.", 413
    ),
    "nothing": posted("", "the body: Invalid JSON: EOF while parsing a value at line 1 column 0"),
    "a part": posted('{"dev', "the body: Invalid JSON: EOF while parsing a string at line 1 column 5"),
    "a list": posted("[]", "the body: Input should be an object"),
    "no text": posted(b"\xff\xfe", "the body: Invalid JSON: expected value at line 1 column 1"),
    "brackets without end": posted(
        "[" * 20_000, "the body: Invalid JSON: recursion limit exceeded at line 1 column 202"
    ),
    "an unknown key": posted(
        result_with("measurement", "extra", 1), "measurement.extra: Extra inputs are not permitted"
    ),
    "a missing key": posted(result_without("measurement", "file"), "measurement.file: Field required"),
    "another file": posted(
        result_with("measurement", "file", "another.gguf"),
        f"measurement.file: 'another.gguf' {NOT_RELEASED}",
    ),
    "another size": posted(
        result_with("measurement", "bytes", 1),
        f"measurement.file: 'martlet-99m-instruct-q4_k_m.gguf' {NOT_RELEASED}",
    ),
    "a negative speed": posted(
        result_with("measurement", "decode_tokens_per_s", -1),
        "measurement.decode_tokens_per_s: Input should be greater than 0",
    ),
    "not a number": posted(
        result_with("measurement", "decode_tokens_per_s", float("nan")),
        "measurement.decode_tokens_per_s: Input should be a finite number",
    ),
    "infinity": posted(
        result_with("measurement", "decode_tokens_per_s", float("inf")),
        "measurement.decode_tokens_per_s: Input should be a finite number",
    ),
    "text for a number": posted(
        result_with("measurement", "threads", "4"), "measurement.threads: Input should be a valid integer"
    ),
    "a long text": posted(
        result_with("device", "user_agent", "x" * 401),
        "device.user_agent: String should have at most 400 characters",
    ),
    "nothing for a truth value": posted(
        result_with("device", "mobile", None), "device.mobile: Input should be a valid boolean"
    ),
}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "sentence"), REQUESTS.values(), ids=list(REQUESTS)
)
def test_each_bad_request_has_its_sentence(
    here: Site,
    released: Path,
    method: str,
    path: str,
    body: str | bytes,
    headers: dict[str, str],
    status: int,
    sentence: str,
) -> None:
    before = (released / "report.json").read_bytes()
    found, _, said = here.ask(method, path, body.encode() if isinstance(body, str) else body, **headers)
    assert (found, said.decode()) == (status, sentence)
    assert (released / "report.json").read_bytes() == before
    assert here.said == []


def test_without_release_or_page_it_is_said(released: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no release of martlet"):
        phone.released_files(tmp_path)
    manifest = json.loads((released / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "web/" not in name}
    (released / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no web page"):
        phone.released_files(released)


def test_a_port_in_use_and_a_wrong_address_are_user_errors(released: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port}: cannot be listened on .*--port"):
            phone.serve(released, lan=False, port=port, say=lambda line: None)
    with pytest.raises(UserError, match="--address"):
        phone.serve(released, lan=False, port=0, say=lambda line: None, address="127.0.0.1")


@pytest.mark.parametrize("lan", [True, False])
def test_the_command_says_where_it_is_and_ends_with_ctrl_c(released: Path, lan: bool) -> None:
    command = [sys.executable, "-m", "flows.command_line", "phone", str(released), "--port", "0"]
    command += ["--lan", "--address", "127.0.0.1"] if lan else []
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as running:
        assert running.stdout is not None
        said = ""
        while "Ctrl-C ends." not in said:
            line = running.stdout.readline()
            assert line, said
            said += line
        link = re.search(r"^https?://127\.0\.0\.1:(\d+)/\S+$", said, re.MULTILINE)
        assert link is not None, said
        assert phone.qr_code(link[0]) in said
        here = ("127.0.0.1", int(link[1]))
        if lan:
            assert re.match(r"https://.*/\?token=[\w-]{22}$", link[0])
            certificate = ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(here, timeout=20))
            assert hashlib.sha256(certificate).hexdigest() in said.replace(":", "").lower()
        else:
            assert link[0] == f"http://127.0.0.1:{here[1]}/web/?phone"
            socket.create_connection(here, timeout=20).close()
        # Another address of this machine: what listens on all of them would answer there.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", here[1]), timeout=20)
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 0


def test_the_qr_code_holds_a_link_in_few_lines() -> None:
    drawn = phone.qr_code("https://192.168.100.200:65535/?token=" + "x" * 22).splitlines()
    assert len(drawn) < 24
    assert all(len(line) < 60 for line in drawn)
