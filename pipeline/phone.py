"""The phone check: serves a release's page to a device and takes what the device measured into the report.

On this machine alone unless asked for more. On the local network the connection is encrypted with a
certificate made on the spot (browsers allow threads only then), and only the first device that opens the
printed address gets in.
"""

import contextlib
import hmac
import io
import ipaddress
import json
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import segno
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline import release as release_stage
from pipeline import web
from pipeline.errors import UserError
from pipeline.pages import readable_device

LOOPBACK = "127.0.0.1"
COOKIE = "martlet_phone"
LARGEST_BODY = 32 * 1024
MOST_RESULTS = 200
START = "/web/?phone"
HEADERS = {
    # Without the first two no browser gives a page threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
SOFTWARE_GPUS = ("swiftshader", "llvmpipe", "lavapipe")
"""What WebGPU calls graphics processors that are programs."""
MEDIA_TYPES = {
    ".mjs": "text/javascript",
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
}

Word = Annotated[str, Field(max_length=400)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Device(_Strict):
    """The device in its browser's own words, or in Android's where no browser took part; null is what they
    do not tell."""

    user_agent: Word | None
    platform: Word | None
    platform_version: Word | None
    model: Word | None
    architecture: Word | None
    mobile: bool
    processors: Count | None
    memory_gb: Positive | None
    screen: Word | None
    webgpu: Word | None
    threads_allowed: bool


class Measurement(_Strict):
    """One file measured by the page or over adb; the units are those of ``report.json``'s ``device``."""

    file: Word
    format: Literal["gguf", "mlc", "onnx"]
    quantization: Word
    bytes: Annotated[int, Field(gt=0)]
    runtime: Word
    threads: Annotated[int, Field(ge=1, le=1024)]
    load_s: NotNegative
    ttft_s: Positive
    prefill_tokens_per_s: Positive
    prefill_std: NotNegative
    decode_tokens_per_s: Positive
    decode_std: NotNegative
    memory_bytes: Annotated[int, Field(gt=0)] | None
    repetitions: Count
    prompt_tokens: Count
    generated_tokens: Count


class Result(_Strict):
    """What a device posts."""

    device: Device
    measurement: Measurement


def serve(
    release: Path, *, lan: bool, port: int, say: Callable[[str], None], address: str | None = None
) -> None:
    """Serves the page of a release until the process is interrupted.

    Args:
        release: release folder with a page.
        lan: on the local network, encrypted and for one device, instead of on this machine alone.
        port: TCP port; 0 takes a free one.
        say: told the address, the QR code and each result.
        address: address of this machine to listen on, for machines with several; found by itself otherwise.

    Raises:
        UserError: the folder is no release or has no page, or the address or port cannot be had.
    """
    root = Path(release).resolve()
    listed = released_files(root)
    if lan:
        host = address or lan_address()
    elif address:
        raise UserError("--address: is for --lan alone; without it the page is served on this machine only.")
    else:
        host = LOOPBACK
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"{host}, port {port}: cannot be listened on ({error.strerror or error}); give another --port"
            f"{' or --address' if lan else ''}."
        ) from None
    token = secrets.token_urlsafe(16) if lan else None
    shown = f"[{host}]" if ":" in host else host
    origin = f"{'https' if lan else 'http'}://{shown}:{listening.getsockname()[1]}"
    link = f"{origin}/?token={token}" if lan else origin + START
    with listening, tempfile.TemporaryDirectory(prefix="martlet-phone-") as private:
        keys: dict[str, Any] = {}
        if lan:
            certificate, fingerprint = make_certificate(host, Path(private))
            keys = {"ssl_certfile": certificate, "ssl_keyfile": certificate}
        say(qr_code(link))
        say(link)
        if lan:
            say(
                "Open it on a device in the same network; it lets one device in. The browser will say that "
                f"it does not know the certificate: it was made just now, its SHA-256 is {fingerprint}."
            )
        say("Ctrl-C ends.")
        application = make_application(root, listed, origin=origin, token=token, say=say)
        # Ctrl-C is how it ends; uvicorn raises the signal again after it has closed the connections.
        with contextlib.suppress(KeyboardInterrupt):
            make_server(application, **keys).run(sockets=[listening])


def make_server(application: Starlette, **keys: Any) -> uvicorn.Server:
    """A quiet server of the web application; ``keys`` are uvicorn's settings for encryption."""
    settings = uvicorn.Config(
        application,
        log_level="critical",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        **keys,
    )
    return uvicorn.Server(settings)


def released_files(root: Path) -> set[str]:
    """Paths of a release's files by its manifest: nothing else is served.

    Raises:
        UserError: no release, or one without a page.
    """
    manifest = release_stage.read_manifest(root)
    if manifest is None:
        raise UserError(f"{root}: is no release of martlet; give a release folder.")
    if f"{web.FOLDER}/index.html" not in manifest["files"]:
        raise UserError(
            f"{root}: has no web page, because none was built when it was laid out; install Node.js 18 or "
            "later with npm, run make page, and ship again."
        )
    return {name for name in manifest["files"] if (root / name).resolve().is_relative_to(root)}


def make_application(
    root: Path, listed: set[str], *, origin: str, token: str | None, say: Callable[[str], None]
) -> Starlette:
    """The web application.

    Args:
        root: release folder.
        listed: files of it that may be served, as relative POSIX paths.
        origin: scheme, host and port under which it is reached; other hosts are refused.
        token: lets the first device in that brings it; None lets everyone in.
        say: told each result.
    """
    secret = secrets.token_urlsafe(32)
    lock = threading.Lock()
    unused = [token] if token else []

    def admitted(request: Request) -> bool:
        return token is None or hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), secret.encode())

    def enter(request: Request) -> Response:
        if admitted(request):
            return RedirectResponse(START, status_code=303)
        offered = request.query_params.get("token", "")
        with lock:
            if not unused or not hmac.compare_digest(offered.encode(), unused[0].encode()):
                return PlainTextResponse(
                    "This address is used up or wrong. Start martlet phone again for a new one.", 403
                )
            unused.clear()
        response = RedirectResponse(START, status_code=303)
        response.set_cookie(COOKIE, secret, httponly=True, secure=True, samesite="lax")
        return response

    def file(request: Request) -> Response:
        name = request.path_params["name"]
        name = f"{name}index.html" if name == f"{web.FOLDER}/" else name
        if not admitted(request):
            return PlainTextResponse("This address lets another device in, or none yet.", 403)
        if name not in listed:
            return PlainTextResponse("There is no such file in this release.", 404)
        path = root / name
        if not path.is_file():
            return PlainTextResponse("This file of the release is missing.", 404)
        return FileResponse(path, media_type=MEDIA_TYPES.get(path.suffix))

    async def results(request: Request) -> Response:
        if not admitted(request):
            return PlainTextResponse("This address lets another device in, or none yet.", 403)
        if request.headers.get("origin", origin) != origin:
            return PlainTextResponse("Results are taken from the release's own page alone.", 403)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return PlainTextResponse("Results are JSON.", 415)
        body = b""
        try:
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    return PlainTextResponse(f"A result has at most {LARGEST_BODY} bytes.", 413)
        except ClientDisconnect:
            return PlainTextResponse("Cut off.", 400)
        try:
            result = Result.model_validate_json(body)
            with lock:
                line = add_result(root, result)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            key = ".".join(str(part) for part in first["loc"]) or "the body"
            return PlainTextResponse(f"{key}: {first['msg']}", 422)
        except UserError as error:
            return PlainTextResponse(str(error), 422)
        say(line)
        return JSONResponse({"taken": True})

    async def with_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    host = origin.partition("://")[2].rsplit(":", 1)[0]
    return Starlette(
        routes=[
            Route("/", enter, methods=["GET"]),
            Route("/results", results, methods=["POST"]),
            Route("/{name:path}", file, methods=["GET"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"]),
            Middleware(BaseHTTPMiddleware, dispatch=with_headers),
        ],
    )


def add_result(root: Path, result: Result) -> str:
    """Takes a measurement into ``report.json`` (key ``phones``), ``report.html`` and the manifest.

    A second measurement of the same file on the same device replaces the first.

    Returns:
        One line that says what was measured.

    Raises:
        UserError: the file is not in the release, its speed is that of a graphics processor made of software,
            or the release has too many results.
    """
    measured = result.measurement
    adapter = (result.device.webgpu or "").lower()
    if measured.format == "mlc" and any(name in adapter for name in SOFTWARE_GPUS):
        raise UserError(
            f"device.webgpu: {result.device.webgpu!r} is a graphics processor made of software; its speed "
            "says nothing of a device and is not taken."
        )
    offered = json.loads((root / web.FOLDER / "models.json").read_text(encoding="utf-8"))["models"]
    known = [
        model
        for model in offered
        if all(model[key] == getattr(measured, key) for key in ("file", "format", "quantization", "bytes"))
    ]
    if not known:
        raise UserError(
            f"measurement.file: {measured.file!r} with this format, quantization and bytes is not in the "
            "release."
        )
    return record(root, result)


def record(root: Path, result: Result) -> str:
    """As ``add_result``, for a file that is known to be in the release."""
    measured = result.measurement
    entry = {
        "device": result.device.model_dump(),
        **measured.model_dump(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def take(facts: dict[str, Any]) -> None:
        phones = [
            earlier
            for earlier in facts.get("phones", [])
            if (earlier["device"], earlier["file"], earlier["threads"])
            != (entry["device"], entry["file"], entry["threads"])
        ]
        if len(phones) >= MOST_RESULTS:
            raise UserError(f"report.json: holds {MOST_RESULTS} results already; ship again to begin anew.")
        facts["phones"] = [*phones, entry]

    release_stage.change_report(root, take)
    return (
        f"{readable_device(entry['device'])}: {measured.file}, "
        f"{measured.decode_tokens_per_s:.1f} tok/s decode, {measured.prefill_tokens_per_s:.1f} prefill, "
        f"{measured.threads} threads; in report.html."
    )


def lan_address() -> str:
    """The address by which this machine reaches other networks (no packet is sent to find it).

    Raises:
        UserError: it has none but its own loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: only the routing table is asked
            found = str(probe.getsockname()[0])
        except OSError:
            found = LOOPBACK
    if ipaddress.ip_address(found).is_loopback:
        raise UserError("--lan: this machine has no address in a network; connect it, or give --address.")
    return found


def make_certificate(host: str, folder: Path) -> tuple[Path, str]:
    """A certificate for an address, signed by itself, good for a day.

    Returns:
        Path of a PEM file with key and certificate, readable for its owner alone, and the certificate's
        SHA-256 in groups as browsers show it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "martlet phone")])
    now = datetime.now(UTC)
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        alternative = x509.DNSName(host)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
    return path, certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def qr_code(link: str) -> str:
    """A link as a QR code of block characters, dark on light terminals and readable on dark ones."""
    drawn = io.StringIO()
    segno.make(link, micro=False).terminal(out=drawn, compact=True, border=2)
    return drawn.getvalue().rstrip("\n")
