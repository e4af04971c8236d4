"""A plain static server."""

import functools
import http.server
import threading
import time
from pathlib import Path
from typing import Any


class Server:
    """Serves a folder the way ``python -m http.server`` does, without the headers that allow threads, and
    notes what is asked for. ``lost`` closes it, as when the network is gone.

    Args:
        folder: what is served.
        seconds: that a GGUF file takes, as over a slow network.
    """

    def __init__(self, folder: Path, seconds: float = 0.0):
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                super().do_GET()

            def copyfile(self, source: Any, outputfile: Any) -> None:
                if not (seconds and self.path.partition("?")[0].endswith(".gguf")):
                    super().copyfile(source, outputfile)
                    return
                parts = 20
                size = 1 + Path(source.name).stat().st_size // parts
                while part := source.read(size):
                    outputfile.write(part)
                    time.sleep(seconds / parts)

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
