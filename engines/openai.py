"""The adapter of a server with OpenAI's HTTP interface: vLLM, SGLang, trtllm-serve and others.

Requests are sent by client processes (`engines.http_client`), which stamp what arrives. A chunk is
never taken for an engine step unless the server's own account proves it (`engines.told`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from engines import told
from engines.http_client import frame, frames
from speedbench.types import (
    UNKNOWN,
    Algorithm,
    EngineCounters,
    EngineDiedError,
    EngineInfo,
    EngineSettings,
    FinishReason,
    Request,
    Sampling,
    Served,
    ServerSettings,
    Step,
    Support,
    ToldAcceptance,
    UserError,
)
from speedbench.words import like

LOOKUP = ("NGRAM", "SUFFIX")
"""Algorithms of which a step may have no draft."""

STREAMS_PER_PROCESS = 500
"""One client process reads so many streams; a further one is started for more."""

FETCH_S = 20.0
"""What a server says of itself must come within this time."""

LARGEST_BYTES = 64 << 20
"""Of what a metrics address says, no more is read."""

PROBE = "probe"
"""The request that is made once, at the start, and not measured."""

POLL_S = 1.0
"""A poll returns at least so often, so that a run can be stopped while a server is silent."""

OURS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "stream", "stream_options", "n", "stop", "stop_token_ids", "ignore_eos",
    "return_token_ids", "return_spec_tokens_details", "cache_salt", "echo", "logprobs",
)  # fmt: skip
"""Request fields that the measurement itself sets."""

NEUTRAL: Mapping[str, object] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
}
"""What a server would otherwise take from the model's generation_config.json; sent where it has a
field for it."""

EXTENSIONS = frozenset(
    {"top_k", "stop_token_ids", "ignore_eos", "return_token_ids", "continuous_usage_stats"}
)
"""Fields beyond OpenAI's that are tried where a server does not list its own."""

KINDS = {"vllm": "vLLM", "sglang": "SGLang"}
"""Owner of a model at /v1/models -> the server's name."""

AS_TOLD = "as the server says"
AS_SAID = "as the user says"


class _RefusedError(Exception):
    """The server does not answer as it was asked to; one sentence."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a server says of itself; None or empty: not told.

    fields      of the request at our endpoint, empty where not listed
    speculates  whether it drafts; k: how many tokens
    width       drafts that it has checked at once: more than one are a tree
    """

    kind: str
    version: str
    root: str
    fields: frozenset[str]
    max_seq_len: int | None
    max_num_seqs: int | None
    prefix_cache: bool | None
    speculates: bool | None
    k: int | None
    width: int
    settings: Mapping[str, object]


@dataclass(slots=True)  # mutable: one request in flight
class _Live:
    request_id: str
    client: int
    stop_token_ids: Sequence[int]
    n_tokens: list[int] = field(default_factory=list)
    held: Step | None = None  # the newest chunk: it may be the last, which tells more


@dataclass(slots=True)  # mutable: it dies
class _Process:
    popen: subprocess.Popen[bytes]
    pipe: socket.socket
    log: Any
    buffer: bytearray = field(default_factory=bytearray)
    n_live: int = 0


class OpenaiEngine:
    """A server that was started by somebody else, asked over HTTP."""

    algorithms: Sequence[Algorithm] = get_args(Algorithm)
    versions = "any with streaming /v1/completions or /v1/chat/completions"
    owns_ranks = False
    node_args: Mapping[str, str] = {}
    max_concurrency: int | None = None
    samples_as_started = False
    remembers: Sequence[Algorithm] = ()
    forgets_prompts = True
    support: Mapping[Algorithm, Support] = {}  # the user's word for what the server runs
    flag_of: Mapping[str, str] = {}
    calibration_args: Mapping[Algorithm, Mapping[str, object]] = {}

    def __init__(self, settings: EngineSettings) -> None:
        if settings.server is None:
            raise UserError("a server is asked without --url: name the server")
        if importlib.util.find_spec("httptools") is None:
            raise UserError("httptools is not installed: pip install 'speedbench[server]'")
        self._settings = settings
        self._server = settings.server
        self._key_env = _key_variable(self._server)
        parts = urlsplit(self._server.url)
        self._parts = parts
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        self.base_url = f"{parts.scheme}://{parts.netloc}{prefix}"
        self.model = self._server.model
        self._is_chat = self._server.endpoint == "chat"
        self._path = "/v1/chat/completions" if self._is_chat else "/v1/completions"
        self._events: list[Step] = []
        self._answers: dict[int, tuple[int, bytes, str]] = {}
        self._busy: list[float] = []
        self._live: dict[int, _Live] = {}
        self._number = 0
        self._death: str | None = None
        self._k = 0 if settings.algorithm == "NONE" else settings.draft_length
        self._k_from = AS_SAID
        self._abouts: dict[str, Mapping[str, Any]] = {}
        self._told: Mapping[str, Any] = {}
        self._salt = uuid.uuid4().hex
        self._heads: dict[tuple[int, int], tuple[Sampling, bytes]] = {}
        self._processes: list[_Process] = []
        self._selector = selectors.DefaultSelector()
        try:
            for _ in range(_n_processes(settings.concurrency)):
                self._start_process(prefix)
            self._found = self._discover()
            self._refuse_unknown_sampling(settings.sampling)
            self._counts_usage, self._told = self._probe()
            self._k = self._draft_length()
        except EngineDiedError as error:
            self.close()
            raise UserError(str(error)) from None
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ the client processes

    def _start_process(self, prefix: str) -> None:
        ours, theirs = socket.socketpair()
        about = {
            "pipe": theirs.fileno(),
            "host": self._parts.hostname,
            "port": self._parts.port or (443 if self._parts.scheme == "https" else 80),
            "tls": self._parts.scheme == "https",
            "path": prefix,
            "api_key_env": self._key_env,
            "patience_s": self._server.patience_s,
        }
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        program = Path(__file__).with_name("http_client.py")
        popen = subprocess.Popen(
            [sys.executable, str(program), json.dumps(about)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        theirs.close()
        self._selector.register(ours, selectors.EVENT_READ, len(self._processes))
        self._processes.append(_Process(popen, ours, log))

    def _send(self, process: int, *message: object) -> None:
        try:
            self._processes[process].pipe.sendall(frame(message))
        except OSError:
            self._die_of(process)  # told by `poll`, after what arrived before

    def _die_of(self, process: int) -> None:
        if self._death is not None:
            return
        gone = self._processes[process]
        try:
            code: object = gone.popen.wait(5)
        except subprocess.TimeoutExpired:
            code = "unknown"
        gone.log.seek(0)
        lines = gone.log.read().decode("utf-8", "replace").strip().splitlines()
        cause = f": {lines[-1]}" if lines else ""
        how = f"signal {-code}" if isinstance(code, int) and code < 0 else f"exit code {code}"
        self._death = f"the client process that asks the server ended ({how}){cause}"

    def _receive(self, timeout_s: float | None) -> None:
        """Take what the client processes sent; wait so long for something."""
        for key, _ in self._selector.select(timeout_s):
            process = self._processes[key.data]
            try:
                data = process.pipe.recv(1 << 20)
            except OSError:
                data = b""
            if not data:
                self._selector.unregister(process.pipe)
                self._die_of(key.data)
                continue
            process.buffer += data
            for events in frames(process.buffer):
                for event in events:
                    self._take(event)

    def _take(self, event: tuple[Any, ...]) -> None:
        kind, *rest = event
        if kind == "chunk":
            self._chunk(*rest)
        elif kind == "end":
            self._end(*rest)
        elif kind == "fetched":
            number, status, body, error = rest
            self._answers[number] = (status, body, error)
        elif kind == "busy":
            self._busy.append(rest[0])
        else:
            self._death = f"the server is gone: {rest[0]}"

    # ------------------------------------------------------------ what the server says of itself

    def _fetch(self, path: str, method: str = "GET") -> tuple[int, bytes, str]:
        """Status, body and why there is none."""
        self._number += 1
        number = self._number
        self._send(0, "fetch", number, method, path, FETCH_S)
        while number not in self._answers:
            self._receive(None)
            if self._death is not None and number not in self._answers:
                raise EngineDiedError(self._death)
        return self._answers.pop(number)

    def _told_at(self, path: str) -> Any:
        """A JSON document, or None."""
        status, body, _ = self._fetch(path)
        try:
            return json.loads(body) if status == 200 else None
        except ValueError:
            return None

    def _discover(self) -> _Found:
        status, body, error = self._fetch("/v1/models")
        if error:
            raise UserError(f"{error}: start the server, or mend --url {self._server.url}")
        if status in (401, 403):
            named = self._key_env or "OPENAI_API_KEY, which is not set"
            raise UserError(
                f"the server at {self.base_url} wants another API key (HTTP {status}): it was "
                f"taken from {named}"
            )
        model = self._served_model(status, body)
        metrics = self._metrics()
        version = self._told_at("/version")
        info = self._told_at("/server_info") or self._told_at("/get_server_info")
        schema = self._told_at("/openapi.json")
        kind = KINDS.get(str(model.get("owned_by")), str(model.get("owned_by") or "not told"))
        return found(
            kind,
            model,
            fields_of(schema, self._path),
            version if isinstance(version, dict) else {},
            info if isinstance(info, dict) else {},
            metrics,
        )

    def _metrics(self) -> str:
        """Of the server, or of its workers; '' where one of these says nothing."""
        if self._server.metrics_url is None:
            status, body, _ = self._fetch("/metrics")
            return body.decode("utf-8", "replace") if status == 200 else ""
        texts = [text_at(one.strip()) for one in self._server.metrics_url.split(",")]
        return "\n".join(texts) if all(texts) else ""

    def _served_model(self, status: int, body: bytes) -> Mapping[str, Any]:
        try:
            models = {str(m["id"]): m for m in json.loads(body)["data"]} if status == 200 else None
        except (ValueError, KeyError, TypeError):
            models = None
        if models is None:
            raise UserError(
                f"{self.base_url}/v1/models lists no models (HTTP {status}): --url must name a "
                "server with OpenAI's interface"
            )
        if self.model not in models:
            raise UserError(
                f"--model is '{self.model}', the server has {', '.join(models) or 'none'}: use one "
                "of these"
            )
        model: Mapping[str, Any] = models[self.model]
        return model

    def _probe(self) -> tuple[bool, Mapping[str, Any]]:
        """One short request, which is not measured: whether tokens are counted by usage, and what
        the response tells beside them. Raises UserError."""
        listed = self._found.fields
        prompt = Request(PROBE, range(3, 11), 8, self._settings.sampling, (("user", "1 2 3 4"),))
        why = []
        for counts_usage in (False, True):
            if not counts_usage and listed and "return_token_ids" not in listed:
                continue
            self._counts_usage = counts_usage
            self._heads.clear()
            try:
                return counts_usage, self._asked(prompt)
            except _RefusedError as error:
                why.append(str(error))
        raise UserError(
            f"the server at {self.base_url} cannot be measured: {why[-1]}; it must stream, take "
            "what it is asked, and tell the token IDs of each chunk (return_token_ids) or running "
            "counts (stream_options.continuous_usage_stats): text alone tells no tokens"
        )

    def _asked(self, request: Request) -> Mapping[str, Any]:
        """What one request's response told. Raises _RefusedError."""
        self.submit(request)
        steps: list[Step] = []
        while not steps or steps[-1].finish_reason is None:
            steps += self.poll()
        self._events.clear()
        if steps[-1].error is not None:
            raise _RefusedError(steps[-1].error)
        return self._abouts.pop(request.request_id)

    def _draft_length(self) -> int:
        """K. Raises UserError where the user's word contradicts the server's."""
        asked = self._settings.algorithm
        known = told.draft_length(self._told)
        speculates = self._found.speculates if known is None else known > 0
        if asked == "NONE" and speculates:
            raise UserError(
                f"the server at {self.base_url} speculates, but --speculative_algorithm is NONE: "
                "name what it was started with"
            )
        if asked != "NONE" and speculates is False:
            raise UserError(
                f"the server at {self.base_url} does not speculate, but --speculative_algorithm is "
                f"{asked}: leave it out, or start the server with it"
            )
        if asked == "NONE":
            return 0
        if self._found.width > 1:
            raise UserError(
                f"the server at {self.base_url} drafts trees of width {self._found.width}, and a "
                "tree of drafts has no one draft length: start it with --speculative-eagle-topk 1 "
                "(of NGRAM: --speculative-ngram-max-bfs-breadth 1)"
            )
        k = known if known is not None else self._found.k
        said = self._settings.draft_length
        if k is not None and said not in (k, EngineSettings(model_dir="").draft_length):
            raise UserError(
                f"--draft_length is {said}, the server at {self.base_url} drafts {k}: leave it "
                "out, or start the server with it"
            )
        self._k_from = AS_SAID if k is None else AS_TOLD
        return said if k is None else k

    # ------------------------------------------------------------ requests

    def submit(self, request: Request) -> None:
        self._number += 1
        number = self._number
        process = min(range(len(self._processes)), key=lambda i: self._processes[i].n_live)
        head = self._head(request.sampling, request.max_tokens)
        if self._is_chat:
            messages = [{"role": role, "content": text} for role, text in request.messages]
            head += b',"messages":' + json.dumps(messages).encode()
            prompt = b""
        else:
            head += b',"prompt":'
            prompt = json.dumps(list(request.token_ids), separators=(",", ":")).encode()
        tail = f',"cache_salt":"{self._salt_of(number)}"}}' if self._is_salted else "}"
        self._live[number] = _Live(request.request_id, process, request.sampling.stop_token_ids)
        self._processes[process].n_live += 1
        self._send(
            process, "post", number, self._path, head, prompt, tail.encode(),
            len(request.token_ids), self._counts_usage, self._server.request_timeout_s,
        )  # fmt: skip

    @property
    def _is_salted(self) -> bool:
        """Prompts of other salts are not reused: the only way to keep a cache out, or to drop it,
        that every request can go."""
        return "cache_salt" in self._found.fields

    def _salt_of(self, number: int) -> str:
        return self._salt if self._settings.prefix_cache else f"{self._salt}{number}"

    def _head(self, sampling: Sampling, max_tokens: int) -> bytes:
        """The body but for its prompt, which is all that differs between requests."""
        key = (id(sampling), max_tokens)
        if key not in self._heads:
            fields = self._fields(sampling, max_tokens)
            self._heads[key] = (sampling, json.dumps(fields).encode()[:-1])
        return self._heads[key][1]

    def _fields(self, sampling: Sampling, max_tokens: int) -> dict[str, object]:
        listed = self._found.fields
        takes = listed or (EXTENSIONS if not self._counts_usage else frozenset())
        longest = "max_completion_tokens"
        if longest not in listed or "max_tokens" in listed:
            longest = "max_tokens"
        usage: dict[str, object] = {"include_usage": True}
        if self._counts_usage:
            usage["continuous_usage_stats"] = True
        fields: dict[str, object] = {
            "model": self.model,
            longest: max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": usage,
        }
        fields.update({name: value for name, value in NEUTRAL.items() if name in listed})
        if "top_k" in takes or sampling.top_k:
            fields["top_k"] = sampling.top_k or -1
        # With ignore_eos SGLang ignores stop ids, too: it is set only where there are none. An end
        # of the server's own, at no stop id of ours, is told as an error.
        if not sampling.stop_token_ids:
            if not listed or "ignore_eos" in listed:
                fields["ignore_eos"] = True
        elif "stop_token_ids" in takes:
            fields["stop_token_ids"] = list(sampling.stop_token_ids)
        if not self._counts_usage:
            fields["return_token_ids"] = True
        if "return_spec_tokens_details" in listed:
            fields["return_spec_tokens_details"] = True
        return {**fields, **sampling.extra}

    def _refuse_unknown_sampling(self, sampling: Sampling) -> None:
        listed = self._found.fields
        for name in sampling.extra:
            if name in OURS:
                raise UserError(
                    f"sampling_kwargs sets '{name}', which speedbench sets: use its flag"
                )
            if listed and name not in listed:
                raise UserError(f"the server has no request field '{name}'{like(name, listed)}")
        if sampling.top_k and listed and "top_k" not in listed:
            raise UserError("the server takes no top_k: leave --top_k out")

    def _chunk(self, number: int, time_ns: int, told_tokens: list[int] | int) -> None:
        live = self._live.get(number)
        if live is None:
            return
        known = isinstance(told_tokens, list)
        token_ids = told_tokens if isinstance(told_tokens, list) else [UNKNOWN] * told_tokens
        if not known and told_tokens == 0:
            return
        if live.held is not None:
            self._events.append(live.held)
        live.n_tokens.append(len(token_ids))
        live.held = Step(live.request_id, time_ns, token_ids, engine_steps=0)

    def _end(self, number: int, time_ns: int, error: str, about: Mapping[str, Any]) -> None:
        live = self._live.pop(number, None)
        if live is None:
            return
        self._processes[live.client].n_live -= 1
        if live.request_id == PROBE:
            self._abouts[live.request_id] = about
        reason = FINISH.get(str(about["finish_reason"]))
        acceptance = None
        if not error and live.held is None:
            error = "the server ended the request without a token"
        if not error and reason is None:
            error = f"the server ended the request: {about['finish_reason']}"
        if not error and reason == "stop":
            error = self._odd_end(live)
        if not error:
            try:
                acceptance = self._acceptance(about)
            except (ValueError, TypeError, KeyError) as fault:
                error = f"what the server says of its drafts contradicts itself ({fault})"
        if live.held is not None and not error:
            self._events.append(self._last(live, live.held, reason, acceptance, about))
            return
        if live.held is not None:
            self._events.append(live.held)
        self._events.append(
            Step(live.request_id, time_ns, (), 0, finish_reason="error", error=error)
        )

    def _odd_end(self, live: _Live) -> str:
        """Why a stop is none, or ''."""
        if live.held is None or live.request_id == PROBE:
            return ""
        if not live.stop_token_ids:
            return "the server ended the answer where nothing was to stop it: it has no ignore_eos"
        last = live.held.token_ids[-1]
        if last == UNKNOWN or last in live.stop_token_ids or not self._stops_at_ours():
            return ""
        return (
            f"the server stopped at token {last}, which is no end-of-sequence id here "
            f"({', '.join(map(str, live.stop_token_ids))})"
        )

    def _stops_at_ours(self) -> bool:
        return "stop_token_ids" in (self._found.fields or EXTENSIONS)

    def _acceptance(self, about: Mapping[str, Any]) -> ToldAcceptance | None:
        """What is told of one request, by the source that the probe found where it has no
        verification, and so no list of them."""
        found = told.acceptance(about)
        if found is None or found.n_verify or not self._told:
            return found
        known = told.acceptance(self._told)
        return found if known is None else replace(found, source=known.source)

    def _last(
        self,
        live: _Live,
        held: Step,
        reason: FinishReason | None,
        acceptance: ToldAcceptance | None,
        about: Mapping[str, Any],
    ) -> Step:
        merged, detail = self._steps_of(live.n_tokens, acceptance)
        served = Served(
            sent_ns=int(about["sent_ns"]),
            new_connection=bool(about["is_new"]),
            prompt_proof=about.get("prompt", ""),
            n_prompt_tokens=about.get("n_prompt"),
            n_cached_tokens=about.get("n_cached"),
            acceptance=acceptance,
            text=about["text"] if self._is_chat else None,
        )
        return held._replace(finish_reason=reason, merged=merged, detail=detail, served=served)

    def _steps_of(
        self, n_tokens: Sequence[int], acceptance: ToldAcceptance | None
    ) -> tuple[Sequence[int] | None, Sequence[tuple[int, int]] | None]:
        """Engine steps and (accepted, drafted) of every chunk, where the server proves them."""
        if self._k == 0:
            if self._found.speculates is False:  # a step makes one token
                return n_tokens, [(0, 0) if n == 1 else (UNKNOWN, UNKNOWN) for n in n_tokens]
            return None, None
        if list(n_tokens) == [1]:  # the prefill, of which no server tells a verification
            return [1], [(0, 0)]
        proven = (
            None
            if acceptance is None
            else told.steps_in(n_tokens, acceptance, self._k, self._settings.algorithm in LOOKUP)
        )
        return (None, None) if proven is None else proven

    def poll(self) -> Sequence[Step]:
        """As the protocol says, but empty after POLL_S without a step."""
        return self.poll_for(POLL_S)

    def poll_for(self, timeout_s: float) -> Sequence[Step]:
        until_s = time.monotonic() + timeout_s
        while not self._events and self._death is None:
            wait_s = until_s - time.monotonic()
            if wait_s <= 0:
                return ()
            self._receive(wait_s)
        if not self._events:
            raise EngineDiedError(self._death or "the server sends nothing any more")
        events, self._events = self._events, []
        return events

    def forget(self) -> None:
        """Drop the cached prompts of the warm-up: by another salt, or where there is none, as the
        server offers (vLLM in development mode, SGLang); whether it did is not known."""
        if self._is_salted:
            self._salt = uuid.uuid4().hex
        elif self._found.prefix_cache is not False:
            path = "/flush_cache" if self._found.kind == "SGLang" else "/reset_prefix_cache"
            self._fetch(path, "POST")

    def counters(self) -> EngineCounters | None:
        """None: a server's counters are of all whom it serves, and are read beside the run."""
        return None

    def client_busy(self) -> float | None:
        """Of the busiest second since this was asked last, the part of it that the busiest client
        process spent on a CPU: near 1, it read late."""
        self._busy.clear()
        for process in range(len(self._processes)):
            self._send(process, "busy")
        until_s = time.monotonic() + 5
        while len(self._busy) < len(self._processes) and self._death is None:
            if time.monotonic() > until_s:
                break
            self._receive(0.1)
        return max(self._busy, default=None)

    def describe(self) -> EngineInfo:
        said = self._found
        source = told.acceptance(self._told)
        settings: dict[str, object] = {
            "server": said.kind,
            "model": self.model,
            "root": said.root,
            "endpoint": self._server.endpoint,
            "templated_by": "the server" if self._is_chat else "speedbench",
            "request_fields": "as the server lists" if said.fields else "not listed by the server",
            "tokens_from": "running usage" if self._counts_usage else "token IDs",
            "acceptance_from": "not told" if source is None else source.source,
            "algorithm_from": AS_SAID,
            "stops": self._stops(),
            "prompts_forgotten": self._forgotten(),
            "client_processes": len(self._processes),
            **said.settings,
        }
        if self._k:
            settings["draft_length_from"] = self._k_from
        return EngineInfo(
            name="OPENAI",
            version=f"{said.kind} {said.version}",
            draft_length=self._k,
            max_seq_len=said.max_seq_len or self._settings.max_seq_len,
            max_num_seqs=said.max_num_seqs,
            prefix_cache=self._reuses_prompts(),
            tells_drafted=source is not None and source.source == told.DETAILED,
            settings=settings,
        )

    def _stops(self) -> str:
        return "at every end-of-sequence id" if self._stops_at_ours() else "where the server thinks"

    def _reuses_prompts(self) -> bool | None:
        if self._is_salted and not self._settings.prefix_cache:
            return False
        return self._found.prefix_cache

    def _forgotten(self) -> str:
        if self._is_salted:
            return (
                "each prompt has a salt of its own"
                if not self._settings.prefix_cache
                else ("the run has a salt of its own")
            )
        return "not known"

    def close(self) -> None:
        processes, self._processes = self._processes, []
        self._selector.close()
        for process in processes:
            process.pipe.close()  # the end of the pipe ends it
        for process in processes:
            try:
                process.popen.wait(2)
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            process.log.close()


FINISH: Mapping[str, FinishReason] = {"stop": "stop", "eos": "stop", "length": "length"}


# ---------------------------------------------------------------- pure parts


def _n_processes(concurrency: int) -> int:
    most = max(1, len(os.sched_getaffinity(0)) // 2)
    return min(most, -(-concurrency // STREAMS_PER_PROCESS))


def _key_variable(server: ServerSettings) -> str | None:
    """The environment variable that holds the API key, if there is one."""
    if server.api_key_env is None:
        return "OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else None
    key = os.environ.get(server.api_key_env)
    if not key:
        raise UserError(f"--api_key_env {server.api_key_env} is not set: export the key there")
    return server.api_key_env


def fields_of(schema: Any, path: str) -> frozenset[str]:
    """The fields of a request, from a server's OpenAPI document; empty where it lists none."""
    try:
        content = schema["paths"][path]["post"]["requestBody"]["content"]
        body = content["application/json"]["schema"]
        if "$ref" in body:
            body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        return frozenset(body["properties"])
    except (KeyError, TypeError):
        return frozenset()


def found(
    kind: str,
    model: Mapping[str, Any],
    fields: frozenset[str],
    version: Mapping[str, Any],
    info: Mapping[str, Any],
    metrics: str,
) -> _Found:
    """What the documents of a server say, each for what it is: /v1/models, OpenAPI, /version,
    SGLang's /server_info, Prometheus metrics."""
    longest = model.get("max_model_len") or info.get("context_length")
    speculates, k, cache, most = None, None, None, None
    width = 1
    settings: dict[str, object] = {}
    if kind == "SGLang" and "speculative_algorithm" in info:
        speculates = info["speculative_algorithm"] is not None
        n_checked = info.get("speculative_num_draft_tokens")
        width = _width(info)
        k = int(n_checked) - 1 if speculates and n_checked and width == 1 else None
        cache = None if "disable_radix_cache" not in info else not info["disable_radix_cache"]
        most = info.get("effective_max_running_requests_per_dp") or info.get("max_running_requests")
        for name in ("speculative_algorithm", "speculative_eagle_topk", "dtype", "device",
                     "attention_backend", "tp_size", "dp_size", "stream_interval"):  # fmt: skip
            if info.get(name) is not None:
                settings[name] = info[name]
    if "vllm:num_requests_running" in metrics:  # a gateway before it may own the models
        positions = set(re.findall(PER_POSITION, metrics))
        speculates = "vllm:spec_decode_num_drafts" in metrics
        k = len(positions) or None
        if cached := re.search(
            r'vllm:cache_config_info\{[^}]*enable_prefix_caching="(\w+)"', metrics
        ):
            cache = cached[1] == "True"
    return _Found(
        kind=kind,
        version=str(version.get("version") or info.get("version") or "of unknown version"),
        root=str(model.get("root") or ""),
        fields=fields,
        max_seq_len=None if longest is None else int(longest),
        max_num_seqs=None if most is None else int(most),
        prefix_cache=cache,
        speculates=speculates,
        k=k,
        width=width,
        settings=settings,
    )


def _width(info: Mapping[str, Any]) -> int:
    """Drafts that SGLang checks at once."""
    names = ["speculative_eagle_topk"]
    if info["speculative_algorithm"] == "NGRAM":
        names.append("speculative_ngram_max_bfs_breadth")
    return max([1, *(n for n in map(info.get, names) if type(n) is int)])


def text_at(address: str) -> str:
    """What another host than the server's answers, which is given no key; '' of none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=FETCH_S) as response:
            return bytes(response.read(LARGEST_BYTES)).decode("utf-8", "replace")
    except Exception:  # noqa: BLE001 - why it is silent, the scraper of the run says
        return ""


PER_POSITION = r'vllm:spec_decode_num_accepted_tokens_per_pos_total\{[^}]*position="(\d+)"'
