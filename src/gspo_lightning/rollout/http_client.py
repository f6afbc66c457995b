"""JSON over HTTP to one rollout server, with a bound on the whole exchange."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from gspo_lightning.errors import UserError
from gspo_lightning.screen import visible

_MAX_ANSWER_BYTES = 1 << 30


class ServerError(Exception):
    """No usable answer: refused, cut off, too late, not 200, not JSON. Another server may succeed."""


class RequestRefusedError(Exception):
    """The server understood the request and refuses it (400, 401, 403, 413, 422), as every other would."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """One server. Its methods may be called from several threads; `abort` ends the exchanges of all of them."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")
            is_address = is_address and parts.path.isascii() and not re.search(r"\s", url)
        except ValueError:  # a port that is no number up to 65535, half an IPv6 address in brackets, a host like a..b
            is_address = False
        if not is_address or parts.query or parts.fragment:
            shown = url if "@" not in url else f"***@{url.rpartition('@')[2]}"  # without a name and password
            raise UserError(f"rollout.engine.urls: {shown!r} is not an address such as http://127.0.0.1:8000")
        if "@" in parts.netloc:
            raise UserError(
                f"rollout.engine.urls: the name and password of {parts.scheme}://***@{parts.hostname} are not sent; "
                "remove them, and put the servers' key into the variable that rollout.engine.api_key_env names"
            )
        self.url = url.rstrip("/")
        self._parts, self._api_key = parts, api_key
        self._open: dict[http.client.HTTPConnection, socket.socket | None] = {}
        """Exchanges in progress and, once connected, their sockets: after the headers of an answer that ends the
        connection, the connection itself no longer has one."""
        self._lock = threading.Lock()
        self._aborted = False

    def post(self, path: str, body: Any, timeout_s: float, *, is_json: bool = True) -> Any:
        """Sends JSON, returns JSON; None for an empty answer, or without ``is_json``: then only its status counts."""
        content = json.dumps(body).encode()
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=min(timeout_s, 10.0))
        with self._lock:
            if self._aborted:
                raise ServerError(f"{self.url}: not needed any more")
            self._open[connection] = None
        # A socket's timeout bounds each read; a server that answers a byte at a time needs a bound on the total.
        start = time.monotonic()
        alarm = threading.Timer(timeout_s, self._cut, [connection])
        alarm.daemon = True
        alarm.start()
        try:
            connection.connect()
            with self._lock:  # an abort or the alarm during the connect had no socket to cut
                if self._aborted:
                    raise ServerError(f"{self.url}: not needed any more")
                self._open[connection] = connection.sock
            if time.monotonic() - start >= timeout_s:
                raise TimeoutError
            connection.sock.settimeout(timeout_s)
            status, answer = self._send(connection, path, content)
            if time.monotonic() - start >= timeout_s:  # a body without its end looks like a shorter one
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() - start >= timeout_s
            why = f"no answer within {timeout_s:g} s" if late else visible(f"{type(error).__name__}: {error}")
            raise ServerError(f"{self.url}{path}: {why}") from error
        finally:
            alarm.cancel()
            with self._lock:
                del self._open[connection]
            connection.close()
        return self._decode(path, status, answer, is_json)

    def abort(self) -> None:
        """Cuts off every exchange in progress and refuses new ones until `revive`: each raises `ServerError`."""
        with self._lock:
            self._aborted = True
            connections = list(self._open)
        for connection in connections:
            self._cut(connection)

    def revive(self) -> None:
        """Allows exchanges again; call it when the threads of an aborted round have ended."""
        self._aborted = False

    def _cut(self, connection: http.client.HTTPConnection) -> None:
        """Ends an exchange, whatever it waits for."""
        with self._lock:
            connected = self._open.get(connection)
        if connected is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                connected.shutdown(socket.SHUT_RDWR)

    def _send(self, connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, bytes]:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        connection.request("POST", self._parts.path.rstrip("/") + path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(_MAX_ANSWER_BYTES)

    def _decode(self, path: str, status: int, answer: bytes, is_json: bool) -> Any:
        excerpt = visible(" ".join(answer[:300].decode(errors="replace").split()))
        if status in (400, 401, 403, 413, 422):
            raise RequestRefusedError(f"{self.url}{path} answered {status}: {excerpt}", status)
        if status != 200:
            raise ServerError(f"{self.url}{path} answered {status}: {excerpt}")
        if not answer or not is_json:
            return None
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ServerError(f"{self.url}{path} answered something that is not JSON: {excerpt}") from error
