"""A stand-in object store over loopback HTTP: as much of S3 as an anchor asks for, and bad days on demand."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 3
"""Objects in one answer to a listing; S3 has 1,000."""


class ObjectStore(ThreadingHTTPServer):
    """`objects`: by path, `bucket/key`. `puts`: how many were accepted. It understands no signature and checks none.

    `refuses`: every answer is this status. `hangs_for`: seconds before each answer. `forgets_to_answer`: so many PUTs
    are done, and the connection closed without a word.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.puts = 0
        self.refuses: int | None = None
        self.hangs_for = 0.0
        self.forgets_to_answer = 0
        self.lock = threading.Lock()

    def env(self) -> dict[str, str]:
        """What its clients find in their environment."""
        return {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "AWS_REGION": "eu-west-1",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
        }

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._has_a_bad_day():
            return
        with self.server.lock:
            if self.headers["If-None-Match"] == "*" and self._key in self.server.objects:
                self._answer(412)
                return
            self.server.objects[self._key] = body
            self.server.puts += 1
            forgets = self.server.forgets_to_answer > 0
            self.server.forgets_to_answer -= forgets
        if forgets:
            self.close_connection = True
        else:
            self._answer(200)

    def do_GET(self) -> None:
        if self._has_a_bad_day():
            return
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if "list-type" in query:
            self._answer(200, self._list(query))
        elif self._key in self.server.objects:
            self._answer(200, self.server.objects[self._key])
        else:
            self._answer(404)

    def _list(self, query: dict[str, str]) -> bytes:
        bucket = self._key.partition("/")[0]
        after = query.get("continuation-token") or query.get("start-after", "")
        keys = [
            path.removeprefix(f"{bucket}/") for path in sorted(self.server.objects) if path.startswith(f"{bucket}/")
        ]
        keys = [key for key in keys if key.startswith(query.get("prefix", "")) and key > after]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
            f"<Size>{len(self.server.objects[f'{bucket}/{key}'])}</Size></Contents>"
            for key in keys[:PAGE]
        )
        more = f"<NextContinuationToken>{escape(keys[PAGE - 1])}</NextContinuationToken>" if len(keys) > PAGE else ""
        return f"<ListBucketResult>{entries}{more}</ListBucketResult>".encode()

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _has_a_bad_day(self) -> bool:
        time.sleep(self.server.hangs_for)
        if self.server.refuses:
            self._answer(self.server.refuses)
        return self.server.refuses is not None

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
        """Nothing: what matters is in the objects."""


@contextmanager
def an_object_store() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield store
        finally:
            store.hangs_for = 0
            store.shutdown()
