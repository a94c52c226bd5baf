"""A scripted server with OpenAI's interface, in its own process on loopback.

What it does is a `Script`, which a test may replace while it runs. It writes HTTP by hand, so that
it can also do what no server should: break off, stall, send what is no event.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

VLLM_FIELDS = (
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "stream",
    "stream_options", "stop_token_ids", "ignore_eos", "return_token_ids", "cache_salt",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """How one request is answered.

    lengths       tokens of each engine step, over and over until `max_tokens`; [1, 3]: 1 3 1 3 ...
    prefill       the first step is one token of its own before these
    merge         how many steps each chunk holds, over and over
    wait_s        before each chunk
    told          what is told of acceptance: detailed, summary, sglang or ""
    last_accepted what the last step accepted, where its end was cut
    n_drafted     draft tokens per verification
    ids, running  chunks tell token IDs; running counts
    total_at_end  the last chunk tells the total beside its text, and none before it tells a count
    fault         status, drop, reset, stall, malformed, halt, no_done, lose, no_stream, broken_off
    at            chunk before which the fault comes
    """

    lengths: Sequence[int] = (1, 3, 2, 4)
    prefill: bool = True
    merge: Sequence[int] = (1,)
    wait_s: float = 0.0
    told: str = ""
    last_accepted: int | None = None
    n_drafted: int = 3
    finish: str = "length"
    ids: bool = True
    running: bool = True
    total_at_end: bool = False
    usage: bool = True
    echo: bool = True
    n_prompt_more: int = 0
    n_output_more: int = 0
    fault: str = ""
    status: int = 500
    message: str = "the scripted server fails as told"
    at: int = 0
    text_head: bool = False


@dataclass(frozen=True)
class Script:
    """What the server says of itself, and how it answers: `replies[n]` for the n-th request after
    the script was set, `default` for others."""

    default: Reply = Reply()
    replies: dict[str, Reply] = field(default_factory=dict)
    models: Sequence[str] = ("m",)
    owned_by: str = "vllm"
    max_model_len: int | None = 4096
    version: str | None = "9.9"
    metrics: str | None = "vllm:num_requests_running 0\n"
    server_info: dict[str, Any] | None = None
    fields: Sequence[str] | None = VLLM_FIELDS
    key: str | None = None

    @staticmethod
    def of(values: dict[str, Any]) -> Script:
        replies = {n: Reply(**reply) for n, reply in values.pop("replies").items()}
        return Script(default=Reply(**values.pop("default")), replies=replies, **values)


def step_lengths(reply: Reply, max_tokens: int) -> list[int]:
    """Tokens that each engine step shows; the last is cut at the limit."""
    lengths = [1] if reply.prefill else []
    for n in cycle(reply.lengths):
        if sum(lengths) >= max_tokens:
            break
        lengths.append(min(n, max_tokens - sum(lengths)))
    return lengths


def full_lengths(reply: Reply, max_tokens: int) -> list[int]:
    """The same as the engine made them, the last one uncut: the lengths of its verifications."""
    shown = step_lengths(reply, max_tokens)
    n_later = len(shown) - reply.prefill
    whole = [n for n, _ in zip(cycle(reply.lengths), range(n_later), strict=False)]
    if reply.last_accepted is not None and whole:
        whole[-1] = reply.last_accepted + 1
    return whole


def tokens_of(prompt: Sequence[int], n: int) -> list[int]:
    """The answer to a prompt: counting on from its last token."""
    return [(prompt[-1] + 1 + i) % 100000 for i in range(n)]


class Server:
    def __init__(self) -> None:
        self.script = Script()
        self.n_posts = 0
        self.bodies: list[dict[str, Any]] = []
        self.connections: list[int] = []
        self.written: list[list[int]] = []
        self.n_connections = 0
        self.asked_for_metrics: dict[str, str] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        connection = self.n_connections
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self.answer(method, path, headers, body, writer, connection):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def answer(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        writer: asyncio.StreamWriter,
        connection: int,
    ) -> bool:
        """Whether the connection stays open."""
        if path == "/control":
            if method == "POST":
                self.script, self.n_posts = Script.of(json.loads(body)), 0
                self.bodies, self.connections, self.written = [], [], []
            state = {
                "bodies": self.bodies, "connections": self.connections,
                "asked_for_metrics": self.asked_for_metrics,
            }  # fmt: skip
            return await self.document(writer, 200, json.dumps(state))
        if path == "/written":
            return await self.document(writer, 200, json.dumps(self.written))
        script = self.script
        if script.key is not None and headers.get("authorization") != f"bearer {script.key}":
            told = f"wrong key {headers.get('authorization')}"
            return await self.document(writer, 401, json.dumps({"error": {"message": told}}))
        if method == "POST" and path.endswith("/completions"):
            self.n_posts += 1
            asked = json.loads(body)
            self.bodies.append(asked)
            self.connections.append(connection)
            reply = script.replies.get(str(self.n_posts - 1), script.default)
            return await self.stream(asked, reply, writer)
        if path == "/metrics":
            self.asked_for_metrics = headers
        status, text = self.about(path)
        return await self.document(writer, status, text)

    def about(self, path: str) -> tuple[int, str]:
        script = self.script
        documents: dict[str, str | None] = {"/metrics": script.metrics}
        documents["/v1/models"] = json.dumps(
            {
                "data": [
                    {"id": m, "owned_by": script.owned_by, "max_model_len": script.max_model_len}
                    for m in script.models
                ]
            }
        )
        if script.version is not None:
            documents["/version"] = json.dumps({"version": script.version})
        if script.server_info is not None:
            documents["/server_info"] = json.dumps(script.server_info)
        if script.fields is not None:
            ref = {"$ref": "#/components/schemas/Body"}
            post = {"post": {"requestBody": {"content": {"application/json": {"schema": ref}}}}}
            body = {"properties": {name: {} for name in script.fields}}
            documents["/openapi.json"] = json.dumps(
                {
                    "paths": {"/v1/completions": post, "/v1/chat/completions": post},
                    "components": {"schemas": {"Body": body}},
                }
            )
        text = documents.get(path)
        return (404, "{}") if text is None else (200, text)

    async def document(self, writer: asyncio.StreamWriter, status: int, text: str) -> bool:
        data = text.encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return True

    async def stream(self, asked: dict[str, Any], reply: Reply, writer: Any) -> bool:
        if reply.fault == "status":
            return await self.document(
                writer, reply.status, json.dumps({"error": {"message": reply.message}})
            )
        if reply.fault == "no_stream":
            return await self.document(writer, 200, json.dumps({"choices": []}))
        if reply.fault == "drop" and reply.at < 0:
            return False
        if reply.fault == "stall" and reply.at < 0:
            await asyncio.sleep(3600)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        written: list[int] = [time.monotonic_ns()]
        self.written.append(written)
        for index, data in enumerate(events(asked, reply)):
            if reply.fault and index == reply.at:
                if reply.fault in ("drop", "halt", "reset"):
                    await writer.drain()
                    if reply.fault == "halt":
                        writer.write(b"0\r\n\r\n")
                        return True
                    if reply.fault == "reset":
                        writer.transport.abort()
                    return False
                if reply.fault == "stall":
                    await writer.drain()
                    await asyncio.sleep(3600)
                if reply.fault == "malformed":
                    data = b'data: {"choices": [{"token_ids": [1,\n\n'
                if reply.fault == "broken_off":
                    data = b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'
                if reply.fault == "lose":
                    continue
                if reply.fault == "no_http":
                    writer.write(b"nonsense, not a chunk\r\n")
                    return False
            if reply.wait_s:
                await writer.drain()
                await asyncio.sleep(reply.wait_s)
            written.append(time.monotonic_ns())
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def events(asked: dict[str, Any], reply: Reply) -> Iterator[bytes]:
    """The events of one answer, each with its lines."""
    is_chat = "messages" in asked
    prompt = [len(m["content"]) for m in asked["messages"]] if is_chat else asked["prompt"]
    if isinstance(prompt, str):
        prompt = [len(prompt)]
    max_tokens = asked.get("max_tokens", 16)
    shown = step_lengths(reply, max_tokens)
    tokens = tokens_of(prompt, sum(shown))
    options = asked.get("stream_options") or {}
    steps, sizes = list(shown), []
    for n_steps in cycle(reply.merge):
        if not steps:
            break
        sizes.append(sum(steps[:n_steps]))
        steps = steps[n_steps:]
    n_prompt = len(prompt) + reply.n_prompt_more
    done = 0
    if reply.text_head or is_chat:
        head = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        yield event(head)
    for index, n in enumerate(sizes):
        ids = tokens[done : done + n]
        done += n
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        text = "".join(f" {t}" for t in ids)
        choice.update({"delta": {"content": text}} if is_chat else {"text": text})
        if asked.get("return_token_ids") and reply.ids:
            choice["token_ids"] = ids
            if index == 0 and reply.echo and not is_chat:
                choice["prompt_token_ids"] = prompt
        if index == len(sizes) - 1:
            choice["finish_reason"] = reply.finish
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        told: dict[str, Any] = {
            "id": "x", "object": kind, "model": asked["model"], "choices": [choice],
        }  # fmt: skip
        is_total = reply.total_at_end and index == len(sizes) - 1
        if is_total or (options.get("continuous_usage_stats") and reply.running):
            told["usage"] = {"prompt_tokens": n_prompt, "completion_tokens": done}
        yield event(told)
    if reply.told == "sglang":
        details = {
            "spec_correct_drafts_histogram": histogram(reply, max_tokens),
            "spec_verify_ct": len(full_lengths(reply, max_tokens)),
            "spec_num_proposed_drafts": reply.n_drafted * len(full_lengths(reply, max_tokens)),
        }
        yield event({"choices": [], "sglext": {"spec_tokens_details": details}})
    if reply.usage and options.get("include_usage"):
        usage: dict[str, Any] = {
            "choices": [],
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": done + reply.n_output_more,
            },
        }
        if reply.told in ("detailed", "summary"):
            usage["metrics"] = {"speculative_decoding": vllm_metrics(reply, max_tokens)}
        yield event(usage)
    if reply.fault != "no_done":
        yield b"data: [DONE]\n\n"


def histogram(reply: Reply, max_tokens: int) -> list[int]:
    whole = full_lengths(reply, max_tokens)
    return [sum(n == j + 1 for n in whole) for j in range(reply.n_drafted + 1)]


def vllm_metrics(reply: Reply, max_tokens: int) -> dict[str, Any]:
    """As vLLM's RequestSpecDecodeMetrics.to_dict writes them."""
    whole = full_lengths(reply, max_tokens)
    told: dict[str, Any] = {
        "acceptance_histogram": histogram(reply, max_tokens),
        "num_spec_steps": len(whole),
        "num_draft_tokens": reply.n_drafted * len(whole),
        "num_spec_tokens": reply.n_drafted,
    }
    if reply.told == "detailed" and whole:
        told["per_step_accepted"] = [n - 1 for n in whole]
        told["per_step_drafted"] = [reply.n_drafted] * len(whole)
    return told


def event(told: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(told).encode() + b"\n\n"


# ---------------------------------------------------------------- from a test's side


@dataclass(frozen=True)
class Running:
    """A server that was started."""

    url: str
    pid: int

    def play(self, script: Script) -> None:
        request = urllib.request.Request(
            f"{self.url}/control", json.dumps(dataclasses.asdict(script)).encode(), method="POST"
        )
        urllib.request.urlopen(request, timeout=10).read()

    def written(self) -> list[list[int]]:
        """Of every request since the script was set: when it was read, and when each event was
        written (monotonic, ns)."""
        with urllib.request.urlopen(f"{self.url}/written", timeout=60) as answer:
            found: list[list[int]] = json.load(answer)
        return found

    def state(self) -> dict[str, Any]:
        """The bodies of the requests since the script was set, and the connection of each; the
        headers of the last request for metrics."""
        with urllib.request.urlopen(f"{self.url}/control", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextmanager
def started(port: int = 0, certificate: Path | None = None) -> Iterator[Running]:
    """certificate: a PEM file with its key, for TLS."""
    words = [] if certificate is None else [str(certificate)]
    process = subprocess.Popen(
        [sys.executable, __file__, str(port), *words], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        scheme = "http" if certificate is None else "https"
        yield Running(f"{scheme}://127.0.0.1:{int(process.stdout.readline())}", process.pid)
    finally:
        process.kill()
        process.wait()


async def main(port: int, certificate: str | None = None) -> None:
    tls = None
    if certificate is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    server = await asyncio.start_server(
        Server().serve, "127.0.0.1", port, backlog=4096, limit=1 << 24, ssl=tls
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *sys.argv[2:]))
