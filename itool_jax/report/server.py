"""Serves a live report on this machine only, while the run goes on.

In: a function whose text changes whenever something has changed, and one that returns the report and its trees. Out: a
server on 127.0.0.1 until the user interrupts it. `/` is the page; `/report.json?have=STAMP` the report, or no content
if it is unchanged; `/tree?at=N` one tree.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from itool_jax.report import page
from itool_jax.system.untrusted import one_line

HOST, PORT, TRIES = "127.0.0.1", 8765, 20
NAMES = ("127.0.0.1", "localhost")
LEAST_SECONDS = 1.0
"""Minimum seconds between two checks of the run directory."""
SHARE = 0.1
"""Maximum share of time that the run's own machine spends on rebuilding the report."""

Stamp = Callable[[], str]
Content = Callable[[], tuple[dict[str, Any], list[str]]]


class Latest(NamedTuple):
    """The report as of the last check."""

    stamp: str
    report: dict[str, Any]
    trees: list[str]
    error: str | None


class Source:
    """Provider of the latest report; rereads the run directory only after a change."""

    def __init__(self, stamp: Stamp, content: Content):
        self.stamp, self.content = stamp, content
        self.lock, self.next_look = threading.Lock(), 0.0
        self.latest = Latest("", {}, [], None)

    def now(self) -> Latest:
        """Returns the latest report.

        If a file is damaged or still being written, returns the previous report with the error.
        """
        with self.lock:
            start = time.monotonic()
            if start >= self.next_look and (stamp := self.stamp()) != self.latest.stamp:
                try:
                    self.latest = Latest(stamp, *self.content(), None)
                except Exception as error:  # the page shows any error and goes on
                    self.latest = self.latest._replace(stamp=stamp, error=one_line(error))
                end = time.monotonic()
                self.next_look = end + max(LEAST_SECONDS, (end - start) / SHARE)
            return self.latest


def handler(source: Source) -> type[BaseHTTPRequestHandler]:
    """Returns the class that answers a browser's requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in NAMES:  # another site's name for this machine
                self._answer(403, "text/plain", "only requests to 127.0.0.1 or localhost are answered")
                return
            path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
            latest = source.now()
            report = {**latest.report, "stamp": latest.stamp, "error": latest.error}
            at = query.get("at", [""])[0]
            if path == "/":
                # The page requests trees one at a time.
                self._answer(200, "text/html", page.assemble(report, (), str(report.get("title", "report"))))
            elif path == "/report.json":
                known = query.get("have") == [latest.stamp]
                self._answer(204 if known else 200, "application/json", "" if known else page.as_json(report))
            elif path == "/tree" and at.isascii() and at.isdigit() and int(at[:9]) < len(latest.trees):
                self._answer(200, "application/json", latest.trees[int(at[:9])])
            else:
                self._answer(404, "text/plain", "page not found")

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Discards the log of requests."""

    return Handler


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores browsers that disconnect in the middle of a response."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def listen(source: Source, port: int = PORT) -> ThreadingHTTPServer:
    """Returns a server on `port`, or on the next free one; raises ValueError if none is free."""
    for number in range(port, port + TRIES):
        with contextlib.suppress(OSError):
            return _Server((HOST, number), handler(source))
    raise ValueError(f"ports {port} to {port + TRIES - 1} of {HOST} are all in use; stop another --watch")


def serve(stamp: Stamp, content: Content) -> int:
    """Serves until the user interrupts; returns the number of trees at that time."""
    source = Source(stamp, content)
    source.latest = Latest(stamp(), *content(), None)  # fails at once on a bad run directory
    with listen(source) as server:
        print(f"report at http://{HOST}:{server.server_port}/ (Ctrl-C stops the server)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return len(source.latest.trees)
