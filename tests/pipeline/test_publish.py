"""Publishing, against a local fake of the hub's HTTP API and a real huggingface_hub."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from release_artifacts import edit_json, example_artifacts, example_recipe, example_stage_times

from flows.command_line import app, run
from pipeline import publish, release
from pipeline.artifacts import Store, with_own_digest
from pipeline.errors import GateFailed, UserError

SECRET = "hf_notToBeSeenAnywhere"
FAMILY = [
    "Martlet-99M",
    "Martlet-99M-Instruct",
    "Martlet-99M-Instruct-GGUF",
    "Martlet-99M-Instruct-q4f32_1-MLC",
    "Martlet-99M-Instruct-ONNX",
]


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory: what the endpoints that an upload uses do, as the hub's documentation says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.tokens: set[str | None] = set()
        self.failing_uploads = 0
        self.commits = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def send(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        hub, data, path = self.server, self.body(), self.path.split("?")[0]
        hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = (
                f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            )
            if name in hub.repositories:
                self.send({"error": "exists", "url": f"{hub.address}/{name}"}, 409)
                return
            hub.repositories[name] = {}
            hub.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.send({"url": f"{hub.address}/{name}", "id": name, "name": name})
        elif path == "/api/validate-yaml":
            self.send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(data)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > 1000 else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            self.send({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(data)["objects"]:
                answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in hub.blobs:
                    address = f"{hub.address}/blob/{wanted['oid']}"
                    answer["actions"] = {"upload": {"href": address, "header": {}}}
                objects.append(answer)
            self.send({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in data.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.repositories[name][value["path"]] = hub.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del hub.repositories[name][value["path"]]
            hub.commits += 1
            address = f"{hub.address}/{name}/commit/{hub.commits:040x}"
            self.send({"success": True, "commitOid": f"{hub.commits:040x}", "commitUrl": address})
        else:
            self.send({"error": f"unknown {path}"}, 404)

    def do_PUT(self) -> None:
        hub, data = self.server, self.body()
        oid = self.path.rpartition("/")[2]
        if hub.failing_uploads:
            hub.failing_uploads -= 1
            self.send({"error": "bad gateway"}, 400)
            return
        assert hashlib.sha256(data).hexdigest() == oid
        hub.blobs[oid] = data
        hub.uploads.append(oid)
        self.send({})

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models/")
        name, is_tree, _ = path.partition("/tree/")
        if is_tree:
            files = self.server.repositories[name].items()
            self.send(
                [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files]
            )
            return
        name = path.split("/revision/")[0]
        known = name in self.server.repositories
        self.send({"id": name, "sha": "0" * 40, "siblings": []} if known else {}, 200 if known else 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    store, recipe = Store(tmp_path / "store", report=lambda line: None), example_recipe()
    artifacts = example_artifacts(store, recipe)
    return release.run(recipe, artifacts, tmp_path / "release", store, example_stage_times(artifacts))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def silent(line: str) -> None:
    pass


def as_published(folder: Path) -> dict[str, bytes]:
    """A folder's files, in whose card a model of the same release has its namespace."""
    files = contents(folder)
    own = b"base_model: Martlet-99M-Instruct\n"
    assert (own in files["README.md"]) is folder.name.endswith(("-GGUF", "-MLC", "-ONNX"))
    files["README.md"] = files["README.md"].replace(own, own.replace(b"Mart", b"someone/Mart"))
    return files


def test_the_hub_holds_the_release_byte_for_byte(hub: FakeHub, released: Path) -> None:
    repositories = publish.plan(released, "someone")
    assert [each.name for each in repositories] == [f"someone/{name}" for name in FAMILY]
    publish.to_hub(repositories, True, silent, hub.address)
    assert list(hub.repositories) == [f"someone/{name}" for name in FAMILY]
    for name in FAMILY:
        uploaded = {k: v for k, v in hub.repositories[f"someone/{name}"].items() if k != ".gitattributes"}
        assert uploaded == as_published(released / name)
    assert all(hub.private.values())
    assert hub.tokens == {f"Bearer {SECRET}"}


def test_what_a_release_no_longer_has_leaves_the_hub(hub: FakeHub, released: Path) -> None:
    """Such as a quantization that was dropped because it failed its gate. The hub's own file stays."""
    name, attributes = "Martlet-99M-Instruct-GGUF", b"*.gguf filter=lfs\n"
    earlier = {"martlet-99m-instruct-q3_k_m.gguf": b"missed", "README.md": b"old", "more/notes.txt": b"old"}
    held = hub.repositories[f"someone/{name}"] = {".gitattributes": attributes, **earlier}
    publish.to_hub(publish.plan(released, "someone"), True, silent, hub.address)
    assert held == {".gitattributes": attributes, **as_published(released / name)}


def test_without_yes_nothing_is_sent(
    hub: FakeHub, released: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)

    def call(*options: str) -> tuple[int, str]:
        arguments = ["publish", str(released), "--to", "hub", *options]
        code = run(lambda: app(arguments, standalone_mode=False))
        return code, capsys.readouterr().out

    for options in ([], ["--namespace", "someone"]):
        code, out = call(*options)
        assert code == 0
        assert out.splitlines()[-1] == "Nothing was published; give --yes to do it."
        assert len(out.splitlines()) == len(FAMILY) + 1
    assert (hub.repositories, hub.uploads, hub.commits, hub.tokens) == ({}, [], 0, set())
    assert call("--yes")[0] == 2
    assert hub.tokens == set()
    assert call("--namespace", "someone", "--yes")[0] == 0
    assert len(hub.repositories) == hub.commits == len(FAMILY), "this hub is the one that is asked"


def test_an_interrupted_upload_goes_on(hub: FakeHub, released: Path) -> None:
    repositories = publish.plan(released, "someone")
    hub.failing_uploads = 1
    with pytest.raises(UserError, match=r"does not take it .*goes on where this one") as failed:
        publish.to_hub(repositories, True, silent, hub.address)
    assert SECRET not in str(failed.value)
    publish.to_hub(repositories, True, silent, hub.address)
    sent = list(hub.uploads)
    assert len(sent) == len(set(sent)), "a file was sent twice"
    publish.to_hub(repositories, True, silent, hub.address)
    assert hub.uploads == sent
    for name in FAMILY:
        uploaded = {k: v for k, v in hub.repositories[f"someone/{name}"].items() if k != ".gitattributes"}
        assert uploaded == as_published(released / name)


def test_without_a_token_nothing_is_asked(
    hub: FakeHub, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="set HF_TOKEN in the environment"):
        publish.to_hub(publish.plan(released, "someone"), True, silent, hub.address)
    assert hub.repositories == {}


def test_a_folder_receives_the_same_and_is_replaced_whole(released: Path, tmp_path: Path) -> None:
    target = tmp_path / "public"
    for _ in range(2):
        publish.to_folder(publish.plan(released), target, silent)
        assert sorted(path.name for path in target.iterdir()) == sorted(FAMILY)
        assert all(contents(target / name) == contents(released / name) for name in FAMILY)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        publish.to_folder(publish.plan(released), tmp_path / "file" / "deeper", silent)


def test_what_failed_a_gate_or_was_changed_is_not_published(released: Path) -> None:
    (released / "Martlet-99M" / "config.json").write_text("{}")
    with pytest.raises(GateFailed, match=r"config\.json: is damaged .*; nothing was published\."):
        publish.plan(released, "someone")


def test_a_report_of_a_failed_gate_is_not_published(released: Path) -> None:
    report = released / "report.json"
    edit_json(report, lambda facts: facts["fidelity"][0].update(passed=False))
    entry = {"sha256": hashlib.sha256(report.read_bytes()).hexdigest(), "bytes": report.stat().st_size}
    edit_json(released / "manifest.json", lambda value: value["files"]["report.json"].update(entry))
    edit_json(released / "manifest.json", lambda value: value.update(with_own_digest(value)))
    with pytest.raises(
        GateFailed, match=r"martlet-99m-instruct-f16\.gguf failed a gate; nothing was published"
    ):
        publish.plan(released, "someone")


@pytest.mark.parametrize("namespace", ["some one", "a/b", "-x", ""])
def test_names_that_the_hub_does_not_have(released: Path, namespace: str) -> None:
    with pytest.raises(UserError, match="--namespace: the hub has no repository named"):
        publish.plan(released, namespace)


def test_the_token_is_in_no_file_of_store_or_release(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    store, recipe = Store(tmp_path / "other", report=lambda line: None), example_recipe(seed=8)
    artifacts = example_artifacts(store, recipe)
    release.run(recipe, artifacts, tmp_path / "with-token", store, example_stage_times(artifacts))
    for name, data in contents(tmp_path).items():
        assert SECRET.encode() not in data, name
