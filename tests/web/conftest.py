"""Fixtures of the page's tests: a small release with the built page, a static server, Chromium as a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from static_server import Server
from tokenizers import Tokenizer

from export.gguf import export_gguf
from export.onnx import export_onnx
from pipeline import web

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
NAME = "Tiny-Instruct"


@pytest.fixture(scope="session")
def page_built() -> None:
    if web.built_page() is None:
        # Where it can be built, a skip would hide that it was not, or that it is not seen.
        assert shutil.which("npm") is None, f"{web.BUILT} is not built; run make page"
        pytest.skip("web/dist is not built (needs Node.js 18 or later: make page)")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (apt-get install chromium)")


@pytest.fixture(scope="session")
def writing_model_dir(
    page_built: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny random Llama, kept from writing halves of characters and from ending its turn.

    Its head is its embedding: a row of zeros gives a logit of zero, and some other is always above.
    wllama cannot hand over the log probability of a token that is half of a character.
    """
    folder = tmp_path_factory.mktemp("writing") / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = load_file(folder / "model.safetensors")
    for token_id in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token_id], skip_special_tokens=True)
        if not text or "\ufffd" in text:
            weights["model.embed_tokens.weight"][token_id] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def release(writing_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release's model folders and its page, of a tiny random Llama."""
    folder = tmp_path_factory.mktemp("web") / "release"
    gguf = export_gguf(
        writing_model_dir, folder / f"{NAME}-GGUF", NAME.lower(), ["q8_0"], pre_tokenizer="smollm"
    )
    onnx = export_onnx(writing_model_dir, folder / f"{NAME}-ONNX", NAME, ["fp32"], threads=1)
    listings = {
        "gguf": [{"path": str(gguf[0]), "format": "gguf", "quantization": "q8_0"}],
        "onnx": [{"path": str(onnx[0]), "format": "onnx", "quantization": "fp32"}],
    }
    assert web.lay_out(folder, NAME, listings)
    return folder


@pytest.fixture
def server(release: Path) -> Iterator[Server]:
    running = Server(release)
    yield running
    running.lost()


@pytest.fixture(scope="session")
def playwright_here(page_built: None) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture
def flags() -> str:
    """Command line of the phone's browser."""
    return CHROMIUM_FLAGS


@pytest.fixture
def phone(playwright_here: Any, tmp_path: Path, flags: str) -> Iterator[Any]:
    """A browser context of a phone: touch, small screen, its own profile on disk."""
    descriptor = dict(playwright_here.devices["Pixel 7"])
    descriptor.pop("default_browser_type", None)
    context = playwright_here.chromium.launch_persistent_context(
        tmp_path / "profile",
        executable_path=CHROMIUM,
        args=flags.split(),
        headless=True,
        ignore_https_errors=True,
        **descriptor,
    )
    context.set_default_timeout(240_000)
    yield context
    context.close()
