"""The client process of a server under test: HTTP/1.1 streams, each read stamped at the socket.

A program of its own, started by `engines.openai`; standard library and httptools (a C parser) only.
What a read brings is stamped before anything is parsed, and all sockets that are ready are read and
stamped before the first of them is parsed. Nothing is ever sent twice.

Frames on the pipe, both ways: 4 bytes of length, then `marshal`. To the client: a tuple, see
`Client.ask`. From it: a list of events,
  ("chunk", number, time_ns, token_ids or their count)   what one read brought of one stream
  ("end", number, time_ns, error or "", about)           nothing more comes; see `Stream.about`
  ("fetched", number, status, body, error)
  ("busy", fraction)        of a second's CPU time, in the busiest second since asked last
  ("gone", why)             the server cannot be reached any more
The end of the pipe ends the process.
"""

from __future__ import annotations

import asyncio
import json
import marshal
import os
import resource
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import Coroutine
from typing import Any

FLUSH_S = 0.02
"""Chunks wait so long for others, so that few frames wake the measuring process; an end does not
wait."""

IDLE_S = 2.0
"""Older idle connections are not used: servers close them (uvicorn after 5 s), and a request that
met that moment would be lost."""

ERROR_BYTES = 4096
ERROR_CHARS = 300

MOST = 2**31
"""Token IDs and counts of tokens are below this: they are stored as int32."""

LENGTH = struct.Struct("<I")


def frame(message: Any) -> bytes:
    data = marshal.dumps(message)
    return LENGTH.pack(len(data)) + data


def frames(buffer: bytearray) -> list[Any]:
    """The whole messages at the start of `buffer`, which are taken off it."""
    found, start = [], 0
    while len(buffer) - start >= LENGTH.size:
        (n,) = LENGTH.unpack_from(buffer, start)
        if len(buffer) - start - LENGTH.size < n:
            break
        start += LENGTH.size
        found.append(marshal.loads(memoryview(buffer)[start : start + n]))
        start += n
    del buffer[:start]
    return found


class BadStreamError(Exception):
    """What the server sent cannot be measured; one sentence."""


class Stream:
    """One streamed request: what was told of it so far.

    prompt  the token IDs as they stand in the body; b"" if it holds text
    """

    def __init__(self, number: int, prompt: bytes, n_prompt: int, *, counts_usage: bool) -> None:
        self.number = number
        self._prompt = prompt
        self._n_prompt = n_prompt
        self._counts_usage = counts_usage
        self._buffer = b""
        self._n_usage = 0
        self.n_tokens = 0
        self.status = 0
        self.is_events = False
        self.body = b""
        self.is_done = False
        self.finish_reason = ""
        self.text: list[str] = []
        self.about: dict[str, Any] = {}

    def take(self, data: bytes) -> tuple[list[int], int]:
        """Read events; the token IDs in them, and how many tokens they stand for."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        token_ids: list[int] = []
        n_tokens = 0
        for line in lines:
            if not line.startswith(b"data:") or self.is_done:
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.is_done = True
                continue
            try:
                event = json.loads(payload)
                ids, n = self._event(event)
            except BadStreamError:
                raise
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                shown = payload[:80].decode("utf-8", "replace")
                raise BadStreamError(
                    f"the server sent an event that cannot be read ({type(error).__name__}: "
                    f"{error}): {shown}"
                ) from None
            token_ids += ids
            n_tokens += n
        self.n_tokens += n_tokens
        return token_ids, n_tokens

    def _event(self, event: dict[str, Any]) -> tuple[list[int], int]:
        if event.get("error"):
            raise BadStreamError(f"the server broke off: {message_in(event)}")
        ids: list[int] = []
        usage = event.get("usage")
        for choice in event.get("choices") or ():
            self._prompt_told(choice)
            ids += _token_ids(choice.get("token_ids") or ())
            if choice.get("finish_reason"):
                self.finish_reason = str(choice["finish_reason"])
            delta = choice.get("delta")
            if delta is not None:  # of a chat
                self.text.append(delta.get("content") or "")
        if usage:
            self._usage_told(usage)
        for name in ("metrics", "sglext"):
            if isinstance(event.get(name), dict):
                self.about[name] = event[name]
        if not self._counts_usage:
            return ids, len(ids)
        if not event.get("choices"):  # the total at the end says nothing of when they came
            return ids, 0
        if (usage or {}).get("completion_tokens") is None and _holds_text(event["choices"]):
            raise BadStreamError("the server sent text without a running count of its tokens")
        n_before, self._n_usage = self._n_usage, int(self.about.get("n_output", 0))
        if self._n_usage < n_before:
            raise BadStreamError(
                f"the server counted {n_before} token(s) of an answer, and then {self._n_usage}"
            )
        return ids, self._n_usage - n_before

    def _usage_told(self, usage: dict[str, Any]) -> None:
        self.about["n_prompt"] = _count(usage.get("prompt_tokens"))
        if usage.get("completion_tokens") is not None:
            self.about["n_output"] = _count(usage["completion_tokens"])
        details = usage.get("prompt_tokens_details") or {}
        if details.get("cached_tokens") is not None:
            self.about["n_cached"] = _count(details["cached_tokens"])

    def _prompt_told(self, choice: dict[str, Any]) -> None:
        """A server that returns the prompt proves which tokens it was."""
        told = choice.get("prompt_token_ids")
        if not told or not self._prompt or "prompt" in self.about:
            return
        if json.dumps(told, separators=(",", ":")).encode() != self._prompt:
            raise BadStreamError(
                f"the server says that it was asked other tokens than were sent ({len(told)} "
                f"instead of {self._n_prompt}, or changed ones)"
            )
        self.about["prompt"] = "echoed"

    def fault(self) -> str:
        """Why what came is not a whole answer, or ''."""
        if self.status != 200:
            return f"HTTP {self.status}: {message_of(self.body) or 'without a message'}"
        if not self.is_events:
            return "the server did not stream its answer (it is no text/event-stream)"
        if not self.finish_reason:
            return f"the stream ended after {self.n_tokens} token(s) without a reason to"
        told = self.about.get("n_output")
        if told is not None and told != self.n_tokens:
            return (
                f"the chunks hold {self.n_tokens} token(s), the server counts {told}: some were "
                "lost, or it counts others"
            )
        n_prompt = self.about.get("n_prompt")
        if self._prompt and n_prompt is not None and n_prompt != self._n_prompt:
            return f"the server counts {n_prompt} prompt tokens, {self._n_prompt} were sent"
        if self._prompt and n_prompt is not None:
            self.about.setdefault("prompt", "counted")
        return ""


def _holds_text(choices: list[dict[str, Any]]) -> bool:
    return any(
        choice.get("text") or any((choice.get("delta") or {}).get(name) for name in TEXTS)
        for choice in choices
    )


TEXTS = ("content", "reasoning_content", "reasoning")
"""Of a chat's delta."""


def _token_ids(told: Any) -> list[int]:
    """Raises ValueError for what a record of steps could not hold."""
    if not isinstance(told, (list, tuple)):
        raise ValueError("its token_ids are no list")
    if not all(type(token) is int and 0 <= token < MOST for token in told):
        raise ValueError("its token_ids are no token IDs")
    return list(told)


def _count(told: Any) -> int | None:
    if told is not None and not (type(told) is int and 0 <= told < MOST):
        raise ValueError(f"it counts {told!r:.40} tokens")
    return told


def message_of(body: bytes) -> str:
    """What a server says of an error, in a line."""
    try:
        return message_in(json.loads(body))
    except (ValueError, RecursionError):
        return " ".join(body.decode("utf-8", "replace").split())[:ERROR_CHARS]


def message_in(told: Any) -> str:
    for name in ("error", "message", "detail"):
        if isinstance(told, dict) and told.get(name):
            return message_in(told[name])
    return " ".join(str(told).split())[:ERROR_CHARS]


class Connection(asyncio.Protocol):
    """One connection; it carries one request at a time."""

    def __init__(self, client: Client) -> None:
        import httptools

        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._client.arrived(self, time.monotonic_ns(), data)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.arrived(self, time.monotonic_ns(), None)

    # ------------------------------------------------------------ called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.exchange is not None:
            self.exchange.header(name, value)

    def on_headers_complete(self) -> None:
        if self.exchange is not None:
            self.exchange.begin(self._parser.get_status_code())

    def on_body(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.body(data)

    def on_message_complete(self) -> None:
        exchange = self.exchange
        if exchange is None or exchange.is_interim:
            return
        if self._parser.should_keep_alive():
            self._client.keep(self)
        else:
            self.close()
        exchange.complete()

    # ------------------------------------------------------------ called by the client

    def feed(self, time_ns: int, data: bytes | None) -> None:
        """What was read, or None at the end of the connection."""
        exchange = self.exchange
        if data is None or exchange is None:
            self.close()
            if exchange is not None:
                exchange.lost()
            return
        exchange.time_ns = time_ns
        try:
            self._parser.feed_data(data)
            exchange.read()
        except BadStreamError as error:
            exchange.fail(str(error))
        except Exception as error:  # noqa: BLE001 - the parser's own kinds: not HTTP
            cause = error.__cause__ or error.__context__
            told = cause if isinstance(cause, BadStreamError) else None
            exchange.fail(str(told or f"the server's answer is not HTTP ({error})"))

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    @property
    def is_usable(self) -> bool:
        fresh = time.monotonic() - self.idle_since_s < IDLE_S
        return self.transport is not None and not self.transport.is_closing() and fresh

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Exchange:
    """One request and what comes back, on one connection.

    waits  its failure is told only when the server can be reached again
    """

    waits = True

    def __init__(self, client: Client, number: int, request: bytes, timeout_s: float) -> None:
        self._client = client
        self.number = number
        self._request = request
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._is_ended = False
        self.is_interim = False
        self.time_ns = 0
        self.sent_ns = 0
        self.is_new = False
        self._timer = client.loop.call_later(timeout_s, self._expire)

    def start(self) -> None:
        connection = self._client.idle()
        if connection is None:
            self._client.keep_task(self._connect())
        else:
            self._use(connection)

    async def _connect(self) -> None:
        self.is_new = True
        try:
            connection = await self._client.connect()
        except Exception as error:  # noqa: BLE001 - of the network, or of TLS
            if self.waits:
                await self._client.reached_again()
            self.time_ns = time.monotonic_ns()
            self.fail(f"no connection to {self._client.place}: {reason(error)}")
            return
        if self._is_ended:
            connection.close()
        else:
            self._use(connection)

    def _use(self, connection: Connection) -> None:
        self._connection, connection.exchange = connection, self
        self.sent_ns = time.monotonic_ns()
        connection.send(self._request)

    def _expire(self) -> None:
        self.time_ns = time.monotonic_ns()
        self.fail(f"no end within --request_timeout of {self._timeout_s:g} s{self._so_far()}")

    def _so_far(self) -> str:
        return ""

    def header(self, name: bytes, value: bytes) -> None:
        """One header of the answer."""

    def begin(self, status: int) -> None:
        """The headers are whole."""
        self.is_interim = 100 <= status < 200
        if not self.is_interim:
            self.status(status)

    def status(self, status: int) -> None:
        raise NotImplementedError

    def body(self, data: bytes) -> None:
        raise NotImplementedError

    def read(self) -> None:
        """All of one read was parsed."""

    def complete(self) -> None:
        raise NotImplementedError

    def lost(self) -> None:
        self.time_ns = time.monotonic_ns()
        self.fail(f"the server closed the connection{self._so_far()}")

    def fail(self, error: str) -> None:
        if self._is_ended:
            return
        if self._connection is not None:
            self._connection.close()
        self._end()
        self.failed(self._client.redacted(error))

    def failed(self, error: str) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Nothing more is told of it."""
        self._is_ended = True
        self._timer.cancel()
        if self._connection is not None:
            self._connection.exchange = None


class Post(Exchange):
    """A request whose answer is streamed."""

    def __init__(self, client: Client, request: bytes, timeout_s: float, stream: Stream) -> None:
        super().__init__(client, stream.number, request, timeout_s)
        self._stream = stream
        self._ids: list[int] = []
        self._n = 0

    def _so_far(self) -> str:
        if not self._stream.status:
            return " before it answered" if self.sent_ns else ""
        return f" after {self._stream.n_tokens} token(s)"

    def header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._stream.is_events = value.lower().startswith(b"text/event-stream")

    def status(self, status: int) -> None:
        self._stream.status = status
        self._stream.about["answered_ns"] = self.time_ns

    def body(self, data: bytes) -> None:
        stream = self._stream
        if stream.status != 200 or not stream.is_events:
            stream.body = (stream.body + data)[:ERROR_BYTES]
            return
        ids, n = stream.take(data)
        self._ids += ids
        self._n += n

    def read(self) -> None:
        self._tell_chunk()

    def _tell_chunk(self) -> None:
        """What one read brought is one chunk: the times within it cannot be told apart."""
        if self._n or self._ids:
            told = self._ids if len(self._ids) == self._n else self._n
            self._client.tell(("chunk", self.number, self.time_ns, told))
            self._ids, self._n = [], 0

    def complete(self) -> None:
        self._tell_chunk()
        if self._is_ended:
            return
        self._end()
        self._tell_end(self._stream.fault())

    def lost(self) -> None:
        if self._stream.is_done:  # an answer may end with its connection
            self.complete()
        else:
            super().lost()

    def failed(self, error: str) -> None:
        self._tell_chunk()
        self._tell_end(error)

    def _tell_end(self, error: str) -> None:
        stream = self._stream
        about = {
            **stream.about,
            "sent_ns": self.sent_ns,
            "is_new": self.is_new,
            "status": stream.status,
            "finish_reason": stream.finish_reason,
            "text": "".join(stream.text),
        }
        error = self._client.redacted(error)
        self._client.tell(("end", self.number, self.time_ns, error, about), at_once=True)


class Fetch(Exchange):
    """A request for what the server says of itself."""

    waits = False

    def __init__(self, client: Client, number: int, request: bytes, timeout_s: float) -> None:
        super().__init__(client, number, request, timeout_s)
        self._status = 0
        self._body = bytearray()

    def status(self, status: int) -> None:
        self._status = status

    def body(self, data: bytes) -> None:
        self._body += data

    def complete(self) -> None:
        if not self._is_ended:
            self._end()
            self._tell("")

    def failed(self, error: str) -> None:
        self._tell(error)

    def _tell(self, error: str) -> None:
        event = ("fetched", self.number, self._status, bytes(self._body), error)
        self._client.tell(event, at_once=True)


def reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__


class Client:
    """All connections to one server, and the pipe to the measuring process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, about: dict[str, Any]) -> None:
        self.loop = loop
        self._host, self._port = about["host"], about["port"]
        self._tls = ssl.create_default_context() if about["tls"] else None
        self._key = os.environ.get(about["api_key_env"] or "", "").strip()
        self._path = about["path"]
        self._patience_s = about["patience_s"]
        self._idle: list[Connection] = []
        self._inbox: list[tuple[Connection, int, bytes | None]] = []
        self._events: list[Any] = []
        self._flush_at: asyncio.TimerHandle | None = None
        self._pipe: asyncio.Transport | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reaching: asyncio.Task[None] | None = None
        self._busiest = 0.0

    @property
    def place(self) -> str:
        return f"{self._host}:{self._port}"

    def redacted(self, text: str) -> str:
        return text.replace(self._key, "<redacted>") if len(self._key) > 3 else text

    # ------------------------------------------------------------ connections

    def idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.close()
        return None

    def keep(self, connection: Connection) -> None:
        connection.exchange = None
        connection.idle_since_s = time.monotonic()
        self._idle.append(connection)

    async def connect(self) -> Connection:
        _, connection = await self.loop.create_connection(
            lambda: Connection(self), self._host, self._port, ssl=self._tls
        )
        connection.idle_since_s = time.monotonic()
        return connection

    async def reached_again(self) -> None:
        """Hold a failure back until the server can be reached, so that one that restarts does not
        fail every request that is left; after a while tell that it is gone."""
        if self._reaching is None or self._reaching.done():
            self._reaching = self.keep_task(self._reach())
        await asyncio.shield(self._reaching)

    async def _reach(self) -> None:
        give_up_s = time.monotonic() + self._patience_s
        while True:
            await asyncio.sleep(min(0.5, self._patience_s / 4))
            try:
                self.keep(await asyncio.wait_for(self.connect(), self._patience_s))
            except Exception as error:  # noqa: BLE001 - of the network, or of TLS
                if time.monotonic() < give_up_s:
                    continue
                why = f"no connection to {self.place} for {self._patience_s:g} s: {reason(error)}"
                self.tell(("gone", why), at_once=True)
            return

    def keep_task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self._tasks.discard)
        return task

    def arrived(self, connection: Connection, time_ns: int, data: bytes | None) -> None:
        """Kept until every socket that is ready now was read."""
        if not self._inbox:
            self.loop.call_soon(self._drain)
        self._inbox.append((connection, time_ns, data))

    def _drain(self) -> None:
        inbox, self._inbox = self._inbox, []
        for connection, time_ns, data in inbox:
            connection.feed(time_ns, data)

    # ------------------------------------------------------------ the pipe

    def tell(self, event: tuple[Any, ...], *, at_once: bool = False) -> None:
        self._events.append(event)
        if at_once:
            if self._flush_at is not None:
                self._flush_at.cancel()
            self._flush_at = self.loop.call_later(0, self._flush)
        elif self._flush_at is None:
            self._flush_at = self.loop.call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._flush_at = None
        events, self._events = self._events, []
        assert self._pipe is not None
        self._pipe.write(frame(events))

    def begin(self, pipe: asyncio.Transport) -> None:
        self._pipe = pipe
        self.keep_task(self._watch())

    async def _watch(self) -> None:
        """How busy this process is: one that is always busy reads late."""
        while True:
            cpu_s, now_s = time.process_time(), time.monotonic()
            await asyncio.sleep(1)
            spent_s = time.process_time() - cpu_s
            self._busiest = max(self._busiest, spent_s / (time.monotonic() - now_s))

    def ask(self, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "post":
            number, path, head, prompt, tail, n_prompt, counts_usage, timeout_s = rest
            stream = Stream(number, prompt, n_prompt, counts_usage=counts_usage)
            request = self._request("POST", path, head + prompt + tail)
            Post(self, request, timeout_s, stream).start()
        elif kind == "fetch":
            number, method, path, timeout_s = rest
            request = self._request(method, path, b"", fetch=True)
            Fetch(self, number, request, timeout_s).start()
        elif kind == "busy":
            self.tell(("busy", self._busiest), at_once=True)
            self._busiest = 0.0

    def _request(self, method: str, path: str, body: bytes, *, fetch: bool = False) -> bytes:
        host = f"[{self._host}]" if ":" in self._host else self._host
        lines = [
            f"{method} {self._path}{path} HTTP/1.1",
            f"Host: {host}:{self._port}",
            "User-Agent: speedbench",
            f"Accept: {'*/*' if fetch else 'text/event-stream'}",
            "Accept-Encoding: identity",
        ]
        if body or method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        if self._key:
            lines.append(f"Authorization: Bearer {self._key}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Pipe(asyncio.Protocol):
    """Messages from the measuring process; its end is this process's end, too."""

    def __init__(self, client: Client, ended: asyncio.Future[None]) -> None:
        self._client = client
        self._ended = ended
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._client.begin(transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        for message in frames(self._buffer):
            self._client.ask(message)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


async def serve(about: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    client = Client(loop, about)
    pipe = socket.socket(fileno=about["pipe"])
    await loop.create_connection(lambda: Pipe(client, ended), sock=pipe)
    await ended


def main() -> None:
    # The measuring process decides what a signal to the whole group means; its end ends this one.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(serve(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
