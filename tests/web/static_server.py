"""A plain static server."""

import functools
import http.server
import threading
from pathlib import Path
from typing import Any


class Server:
    """Serves a folder the way ``python -m http.server`` does, without the headers that allow threads, and
    notes what is asked for. ``lost`` closes it, as when the network is gone."""

    def __init__(self, folder: Path):
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                super().do_GET()

            def log_message(self, *arguments: Any) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.origin = f"http://127.0.0.1:{self._server.server_port}"

    def lost(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
