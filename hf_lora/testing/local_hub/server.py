"""The HTTP server: connections that are kept, bodies of both kinds, faults on purpose."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hf_lora.testing.local_hub.answers import Answer, Call, Refused
from hf_lora.testing.local_hub.faults import Faults, Plan

__all__ = ["Request", "Server"]

NO_ANSWER = 0  # the status of a request whose connection was closed instead
_BODILESS = (204, 304)
_STATUS_FAULTS = {
    429: "Too many requests, please try again later.",
    500: "Internal server error.",
    503: "Service temporarily unavailable.",
}


@dataclass(frozen=True)
class Request:
    """What a client asked for and got.

    Attributes:
        method: `GET`, `HEAD`, `POST`, `PUT` or `DELETE`.
        path: Path and query, as they were sent.
        status: Status of the answer; 0 when the connection was closed instead.
        sent: Bytes in the body of the request.
        received: Bytes in the body of the answer.
    """

    method: str
    path: str
    status: int
    sent: int
    received: int

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class _Closed(Exception):
    """The connection is to be closed with nothing more said."""


class Server(ThreadingHTTPServer):
    """Serves on a free port of the loopback address, a thread for each connection.

    Args:
        respond: Carries a request out; None when there is no such route.
        faults: What goes wrong.

    Attributes:
        requests: What was asked for, in the order of the answers.
        unknown: `METHOD path` of requests that have no route.
        errors: Exceptions of the server's own threads.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, respond: Callable[[Call], Answer | None], faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond, self.faults = respond, faults
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.errors: list[BaseException] = []
        self.closing = threading.Event()
        self._connections: dict[threading.Thread, Any] = {}
        # shutdown() waits for one round
        self._loop = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._loop.start()

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"

    def server_bind(self) -> None:
        """Binds without asking for the name of this machine, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serves a connection in a thread of its own."""

        def serve() -> None:
            self.process_request_thread(request, client_address)
            self._connections.pop(thread, None)

        thread = threading.Thread(target=serve, daemon=True)
        self._connections[thread] = request
        thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Does nothing: a client may hang up, and other errors are caught where they happen."""

    def close(self) -> None:
        """Stops, closes every connection, and waits for their threads."""
        self.closing.set()
        self.shutdown()
        self._loop.join()
        for thread, connection in list(self._connections.items()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(10)
        self.server_close()

    def carry_out(self, call: Call) -> Answer:
        """Returns the answer to a request, and does what it asks."""
        line = f"{call.method} {call.target}"
        try:
            for callback in self.faults.callbacks(line):
                callback()
            found = self.respond(call)
        except Exception as error:  # shown by whoever closes the server, not lost in a thread
            self.errors.append(error)
            return Refused(500, f"{type(error).__name__}: {error}").answer()
        if found is not None:
            return found
        self.unknown.append(line)
        return Refused(404, f"this Hub does not know {line}").answer()


class _Handler(BaseHTTPRequestHandler):
    """One connection, for as many requests as the client sends over it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: object) -> None:
        """Says nothing on stderr."""

    def _body(self) -> bytes:
        """Returns the whole body, of a known length or in chunks, and leaves the next request."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            chunks = []
            while size := int(self._line().split(b";")[0], 16):
                chunks.append(self._exactly(size))
                self._line()
            while self._line().strip():  # trailers, up to the empty line
                pass
            return b"".join(chunks)
        return self._exactly(int(self.headers.get("Content-Length") or 0))

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise _Closed  # the client went away in the middle
        return line

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size) if size else b""
        if len(data) < size:
            raise _Closed
        return data

    def _serve(self) -> None:
        try:
            body = self._body()
        except (_Closed, ValueError, OSError):
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, self.path, headers, body)
        plan = self.server.faults.take(f"{call.method} {call.target}")
        try:
            self._answer(call, plan)
        except (_Closed, OSError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _serve

    def _answer(self, call: Call, plan: Plan | None) -> None:
        fault = plan.what if plan else None
        if fault == "drop":
            self._note(call, NO_ANSWER, 0)
            raise _Closed
        if plan and fault == "delay":
            self.server.closing.wait(plan.seconds)
        if plan and fault in _STATUS_FAULTS:
            answer = _refusal(plan)
        else:
            answer = self.server.carry_out(call)
        has_body = call.method != "HEAD" and answer.status not in _BODILESS
        body = answer.body if has_body else b""
        if fault == "drop-answer" or (fault == "cut" and not body):
            self._note(call, NO_ANSWER, 0)
            raise _Closed
        sent = body[: len(body) // 2] if fault == "cut" else body
        # noted first: once the client has the answer, its test may read what was asked
        self._note(call, answer.status, len(sent))
        self.wfile.write(self._head(answer) + sent)
        if fault == "cut":
            raise _Closed

    def _head(self, answer: Answer) -> bytes:
        self.send_response(answer.status)
        if answer.status not in _BODILESS:
            self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value.replace("\r", " ").replace("\n", " "))
        lines: list[bytes] = getattr(self, "_headers_buffer", [])
        head = b"".join(lines) + b"\r\n"
        lines.clear()
        return head

    def _note(self, call: Call, status: int, received: int) -> None:
        noted = Request(call.method, call.target, status, len(call.body), received)
        self.server.requests.append(noted)


def _refusal(plan: Plan) -> Answer:
    """Returns the answer of a fault that is a status."""
    status = int(str(plan.what))
    headers = {}
    if plan.seconds is not None:
        wait = str(round(plan.seconds))
        headers = {"Retry-After": wait}
        if status == 429:
            headers["RateLimit"] = f'"api";r=0;t={wait}'
    return Refused(status, _STATUS_FAULTS[status], headers=headers).answer()
