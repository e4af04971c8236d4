"""The server of martlet phone on a free port, and a client that can say anything to it."""

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from pipeline import phone


class Site:
    """A running server and a client that can say anything."""

    def __init__(self, root: Path, token: str | None, folder: Path):
        self.said: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.encrypted = token is not None
        self.origin = f"{'https' if token else 'http'}://127.0.0.1:{self.port}"
        keys: dict[str, Any] = {}
        if token:
            self.certificate, self.fingerprint = phone.make_certificate("127.0.0.1", folder)
            keys = {"ssl_certfile": self.certificate, "ssl_keyfile": self.certificate}
        listed = phone.released_files(root)
        application = phone.make_application(
            root, listed, origin=self.origin, token=token, say=self.said.append
        )
        self._server = uvicorn.Server(
            uvicorn.Config(application, log_level="critical", lifespan="off", **keys)
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        if self.encrypted:
            context = ssl.create_default_context(cafile=str(self.certificate))
            connection: Any = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def post(self, value: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.ask(
            "POST", "/results", json.dumps(value).encode(), **{"Content_Type": "application/json", **headers}
        )

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
