"""Server metrics: what a server's /metrics says while we measure it.

`Scraper` starts a process beside a measurement and ends it; `python -m speedbench.server_metrics`
is that process. It scrapes before the first request, every second, and after the last one, and
stores every series as it was told. Whatever goes wrong in it costs samples only. What the samples
mean is `server_counters`' question.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from speedbench import server_counters, store
from speedbench.beside import Beside, Parts, say
from speedbench.processes import give_way
from speedbench.prometheus import FormatError, Sample, parse

INTERVAL_S = 1.0
SCRAPE_TIMEOUT_S = 5.0
SETTLE_S = 0.2
"""Servers count a token a moment after they have sent it: between scrapes until they agree."""
SETTLED_WITHIN_S = 3.0
LARGEST_BYTES = 64 << 20
PATHS = ("/metrics", "/prometheus/metrics")
"""Where servers have them: vLLM, SGLang, Dynamo; and trtllm-serve, whose /metrics is JSON."""
ACCEPT = "text/plain; version=0.0.4"


class Scraper(Beside):
    """Scrapes a server.

    addresses  where the metrics are; empty: look for them beside the server
    sources    where they were found, for the manifest
    """

    what = "the scraper"
    module = "speedbench.server_metrics"
    end_timeout_s = 30.0

    def __init__(
        self,
        directory: Path,
        *,
        server: str,
        addresses: Sequence[str],
        session: int,
        why_not: str = "",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(environ, why_not)
        self._directory, self._server, self._addresses = directory, server, tuple(addresses)
        self._session = session

    @property
    def sources(self) -> Sequence[str]:
        return tuple(self.told.get("sources", ()))

    def _words(self) -> Sequence[str]:
        words = [str(self._directory.resolve()), "--session", str(self._session)]
        words += [word for address in self._addresses for word in ("--address", address)]
        return [*words, "--server", self._server]


def addresses_of(metrics_url: str | None) -> tuple[str, ...]:
    """The addresses of `--metrics_url`: several, of a server of several workers, by commas."""
    return tuple(filter(None, (one.strip() for one in (metrics_url or "").split(","))))


# ---------------------------------------------------------------- the process


class NoMetricsError(Exception):
    """Why a server's metrics cannot be read: one sentence."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one address said at one time, or why it said nothing."""

    source: int
    time_ns: int
    took_ns: int
    samples: Sequence[Sample]
    error: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """The scraping process. Says one line once it scrapes, or why it does not."""
    parser = argparse.ArgumentParser(prog="python -m speedbench.server_metrics")
    parser.add_argument("directory", type=Path)
    for name in ("session", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--address", action="append", default=[])
    given = parser.parse_args(argv)
    give_way()
    try:
        addresses = tuple(given.address) or (discovered(given.server),)
        recorder = Recorder(given.directory, given.session)
        for one in settled(addresses):
            if one.error:
                raise NoMetricsError(f"{shown(addresses[one.source])} {one.error}")
            recorder.take(one)
        recorder.write()
    except NoMetricsError as reason:
        return say({"why_not": str(reason)})
    except Exception as error:  # noqa: BLE001 - told, where it would be lost otherwise
        return say({"why_not": f"the scraper failed ({type(error).__name__}: {error})"})
    say({"why_not": "", "sources": [shown(address) for address in addresses]})
    _watch(addresses, recorder, lambda: os.getppid() != given.parent)
    return 0


def _watch(addresses: Sequence[str], recorder: Recorder, orphaned: Callable[[], bool]) -> None:
    """Scrape and write every second until the input ends or the parent is gone; then once more,
    until what is counted has settled."""
    due_s = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            due_s = max(due_s + INTERVAL_S, time.monotonic())
            if selector.select(max(0.0, due_s - time.monotonic())) or orphaned():
                break
            for source, address in enumerate(addresses):
                recorder.take(_without_buckets(scrape(source, address)))
            recorder.write()
    for one in settled(addresses):
        recorder.take(one)
    recorder.write()


def settled(
    addresses: Sequence[str],
    ask: Callable[[int, str], Scrape] | None = None,
    within_s: float = SETTLED_WITHIN_S,
) -> list[Scrape]:
    """Scrapes of all addresses until two in a row count the same, or until time is up: every one
    of them that was made."""
    ask = ask or scrape
    made = [ask(source, address) for source, address in enumerate(addresses)]
    end_s = time.monotonic() + within_s
    before = [server_counters.counted(one.samples) for one in made]
    while time.monotonic() < end_s:
        time.sleep(SETTLE_S)
        again = [ask(source, address) for source, address in enumerate(addresses)]
        made += again
        now = [server_counters.counted(one.samples) for one in again]
        if now == before:
            break
        before = now
    return made


def _without_buckets(one: Scrape) -> Scrape:
    samples = [s for s in one.samples if s.kind != "histogram" or not s.name.endswith("_bucket")]
    return Scrape(one.source, one.time_ns, one.took_ns, samples, one.error)


def scrape(source: int, address: str) -> Scrape:
    """Ask once. A failure is one sentence that goes on from the address."""
    asked_ns = time.monotonic_ns()
    samples: Sequence[Sample] = ()
    why = ""
    try:
        samples = parse(_text(address))
    except FormatError as error:
        why = f"did not answer with Prometheus text: {error}"
    except NoMetricsError as error:
        why = str(error)
    return Scrape(source, asked_ns, time.monotonic_ns() - asked_ns, samples, why)


def discovered(server: str) -> str:
    """Where a server has its metrics. Raises NoMetricsError if it has none that can be read."""
    parts = urlsplit(server)
    tried = []
    for path in PATHS:
        address = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        found = scrape(0, address)
        if found.samples:
            return address
        tried.append(f"{shown(address)} {found.error or 'holds no metric'}")
    raise NoMetricsError("; ".join(tried))


def _text(address: str) -> str:
    """What an address answers. Raises NoMetricsError: why that is no text of metrics."""
    request = urllib.request.Request(address, headers={"Accept": ACCEPT})
    # Straight to the server: a proxy that is set for the internet knows nothing of it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=SCRAPE_TIMEOUT_S) as response:
            raw = response.read(LARGEST_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise NoMetricsError(f"answered {error.code}") from None
    except Exception as error:  # noqa: BLE001 - a closed port, a certificate, half an answer, ...
        reason = getattr(error, "reason", error)
        raise NoMetricsError(f"did not answer ({reason})") from None
    if len(raw) > LARGEST_BYTES:
        raise NoMetricsError(f"answered more than {LARGEST_BYTES >> 20} MiB")
    if raw.lstrip()[:1] in (b"[", b"{"):
        raise NoMetricsError("answered JSON, which is not Prometheus text")
    try:
        return bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise NoMetricsError("did not answer with text") from None


def shown(address: str) -> str:
    """An address as it may be stored: without user, key and query."""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Recorder(Parts):
    """Scrapes of one session."""

    def __init__(self, directory: Path, session: int) -> None:
        super().__init__(
            store.next_server_metrics_part(directory),
            store.SERVER_METRICS,
            lambda number, table: store.write_server_metrics_part(directory, number, table),
        )
        self._session = session

    def take(self, one: Scrape) -> None:
        about = {
            "time_ns": one.time_ns,
            "took_ns": one.took_ns,
            "session": self._session,
            "source": one.source,
        }
        up = {"error": one.error} if one.error else {}
        self.rows.append(
            {
                **about,
                "name": "up",
                "labels": json.dumps(up),
                "kind": "gauge",
                "value": 0.0 if one.error else 1.0,
            }
        )
        for sample in one.samples:
            self.rows.append(
                {
                    **about,
                    "name": sample.name,
                    "labels": json.dumps(dict(sample.labels), ensure_ascii=False),
                    "kind": sample.kind,
                    "value": sample.value,
                }
            )


if __name__ == "__main__":
    sys.exit(main())
