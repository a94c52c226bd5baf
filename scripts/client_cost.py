"""What the HTTP client costs, and how true its times are, against a scripted server on loopback.

    .venv/bin/python scripts/client_cost.py --aiperf /path/to/venv/bin/aiperf
    .venv/bin/python scripts/client_cost.py --quick --out /tmp/client_cost.md

The server answers every request with one token per chunk on a fixed schedule and writes down when
it wrote each. A row is one tool at one number of streams: CPU time of the tool with all its
processes (its start subtracted: the same with one request), and how much later than the server
wrote them the first token and the mean gap between tokens are by the tool's own numbers. AIPerf is
asked the same, in turns with speedbench, in the same session; without --aiperf its rows are left
out. The server shares the machine's CPUs with the tool: ratios are told, not limits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from speedbench import store  # noqa: E402
from tests.http_server import VLLM_FIELDS, Reply, Running, Script, started  # noqa: E402

CHUNKS_PER_S = 4000
"""Of all streams together, at most: the server is one process and must keep its schedule."""

SHORTEST_GAP_S = 0.05
FIELDS = (*VLLM_FIELDS, "user")


@dataclass(frozen=True)
class Load:
    n_streams: int
    n_rounds: int
    n_tokens: int

    @property
    def gap_s(self) -> float:
        return max(SHORTEST_GAP_S, self.n_streams / CHUNKS_PER_S)

    @property
    def n_requests(self) -> int:
        return self.n_streams * self.n_rounds


@dataclass(frozen=True)
class Cost:
    """One tool under one load; times in seconds, of requests (R,)."""

    tool: str
    load: Load
    cpu_s: float
    n_chunks: int
    first_s: np.ndarray[Any, Any]
    gap_s: np.ndarray[Any, Any]
    true_gap_s: np.ndarray[Any, Any]
    n_failed: int

    @property
    def cpu_us_per_chunk(self) -> float:
        return self.cpu_s / self.n_chunks * 1e6


def script(load: Load) -> Script:
    reply = Reply((1,), wait_s=load.gap_s)
    return Script(reply, metrics="vllm:num_requests_running 0\n", fields=FIELDS)


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ran(command: Sequence[str], env: dict[str, str] | None = None) -> float:
    """CPU seconds of a command with all processes it waited for."""
    before = children_cpu_s()
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=env, timeout=1800
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return children_cpu_s() - before


def speedbench(server: Running, load: Load, folder: Path) -> float:
    return ran(
        [sys.executable, "run.py", "--engine", "OPENAI", "--url", server.url, "--model", "m",
         "--random_isl", "8", "--num_requests", str(load.n_requests), "--concurrency",
         str(load.n_streams), "--output_length", str(load.n_tokens), "--warmup", "0",
         "--no_server_metrics", "--save_dir", str(folder)],
    )  # fmt: skip


def aiperf(program: Path, tokenizer: str, server: Running, load: Load, folder: Path) -> float:
    return ran(
        [str(program), "profile", "--model", "m", "--url", server.url, "--endpoint-type",
         "completions", "--streaming", "--concurrency", str(load.n_streams), "--request-count",
         str(load.n_requests), "--synthetic-input-tokens-mean", "8", "--output-tokens-mean",
         str(load.n_tokens), "--tokenizer", tokenizer, "--ui", "none", "--artifact-dir",
         str(folder), "--extra-inputs", "ignore_eos:true"],
        # Offline, AIPerf takes a tokenizer's folder for the name of a cached one.
        {name: os.environ[name] for name in os.environ if not name.endswith("_OFFLINE")},
    )  # fmt: skip


def cost_of_speedbench(server: Running, load: Load, folder: Path, start_s: float) -> Cost:
    server.play(script(load))
    cpu_s = speedbench(server, load, folder) - start_s
    columns = store.load(folder).columns
    first, last = columns.first_and_last()
    request = columns.request[first]
    tokens = np.bincount(columns.request, columns.n_tokens, columns.n_requests)[request]
    return Cost(
        "speedbench",
        load,
        cpu_s,
        load.n_requests * load.n_tokens,
        (columns.time_ns[first] - columns.submitted_ns[request]) / 1e9 - load.gap_s,
        (columns.time_ns[last] - columns.time_ns[first]) / 1e9 / (tokens - 1),
        true_gaps(server, load),
        int(columns.failed.sum()),
    )


def cost_of_aiperf(
    program: Path, tokenizer: str, server: Running, load: Load, folder: Path, start_s: float
) -> Cost:
    server.play(script(load))
    cpu_s = aiperf(program, tokenizer, server, load, folder) - start_s
    found = next(iter(sorted(folder.rglob("profile_export.jsonl"))))
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    good = [row["metrics"] for row in rows if "time_to_first_token" in row.get("metrics", {})]
    return Cost(
        "AIPerf",
        load,
        cpu_s,
        load.n_requests * load.n_tokens,
        np.array([in_seconds(row["time_to_first_token"]) for row in good]) - load.gap_s,
        # Its inter_token_latency divides by tokens as its own tokenizer counts them in the text.
        np.array([in_seconds(row["inter_chunk_latency"]) for row in good]),
        true_gaps(server, load),
        load.n_requests - len(good),
    )


UNITS = {"s": 1.0, "sec": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def in_seconds(value: dict[str, Any]) -> float:
    """The value, or the mean of several."""
    return float(np.mean(value["value"])) * UNITS[value["unit"]]


def true_gaps(server: Running, load: Load) -> np.ndarray[Any, Any]:
    """Mean gap between the tokens of each request, as the server wrote them."""
    written = [times[1 : 1 + load.n_tokens] for times in server.written()]
    whole = [times for times in written if len(times) == load.n_tokens]
    return np.array([(t[-1] - t[0]) / 1e9 / (load.n_tokens - 1) for t in whole])


def measured(args: argparse.Namespace, folder: Path) -> list[Cost]:
    found = []
    with started() as server:
        alone = Load(1, 1, 2)
        for n_streams in args.streams:
            few = 1000 // (n_streams * args.tokens)  # else the start is all there is to see
            load = Load(n_streams, max(args.rounds, 1 if args.quick else few), args.tokens)
            server.play(script(alone))
            start_s = speedbench(server, alone, folder / f"alone{n_streams}")
            found.append(cost_of_speedbench(server, load, folder / f"s{n_streams}", start_s))
            if args.aiperf is not None:
                server.play(script(alone))
                of = (args.aiperf, args.tokenizer, server)
                start_s = aiperf(*of, alone, folder / f"aialone{n_streams}")
                found.append(cost_of_aiperf(*of, load, folder / f"a{n_streams}", start_s))
    return found


HEADER = (
    "| Streams | Tool | Requests | Failed | CPU per chunk (us) | First token later by, P50 (ms) | "
    "P99 (ms) | Gap, P50 (ms) | as written (ms) |\n"
    "|--:|---|--:|--:|--:|--:|--:|--:|--:|\n"
)


def table(found: Sequence[Cost]) -> str:
    lines = []
    for one in found:
        p50, p99 = np.percentile(one.first_s, (50, 99)) * 1e3
        lines.append(
            f"| {one.load.n_streams} | {one.tool} | {one.load.n_requests} | {one.n_failed} | "
            f"{one.cpu_us_per_chunk:.1f} | {p50:.2f} | {p99:.2f} | "
            f"{np.median(one.gap_s) * 1e3:.2f} | {np.median(one.true_gap_s) * 1e3:.2f} |\n"
        )
    return HEADER + "".join(lines)


ABOUT = """\
# Cost of the HTTP client

{command}, {day}; {cpu}, {n_cpus} CPUs, Linux; Python {python}{aiperf}. Load of the machine before
it began: {busy:.1f}. The scripted server (`tests/http_server.py`) shares these CPUs.

CPU per chunk: CPU time of the tool with all its processes beyond that of one request alone, per
chunk of one token. First token later by: the tool's TTFT beyond the server's scheduled wait, so
connecting, queueing in the client and reading are in it. Gap: mean time between a request's tokens
by the tool's own numbers, beside that by which the server wrote them (median over requests). At one
stream a tool mostly waits: what it computes meanwhile is all on a few chunks there.

{table}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--aiperf", type=Path, help="its program, in an environment of its own")
    parser.add_argument(
        "--tokenizer",
        default="builtin",
        help="AIPerf's: a folder, or builtin (which it downloads; the default)",
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 256, 2000])
    parser.add_argument("--rounds", type=int, default=3, help="requests per stream")
    parser.add_argument("--tokens", type=int, default=50, help="per request")
    parser.add_argument("--quick", action="store_true", help="a minute: 1 and 32 streams")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "client_cost.md")
    args = parser.parse_args()
    if args.quick:
        args.streams, args.rounds, args.tokens = [1, 32], 2, 20
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args, Path(folder))
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.machine(),
    )  # fmt: skip
    text = ABOUT.format(
        command="`scripts/client_cost.py" + (" --quick`" if args.quick else "`"),
        day=date.today().isoformat(),
        cpu=cpu,
        n_cpus=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        aiperf="" if args.aiperf is None else f"; AIPerf {version_of(args.aiperf)}",
        busy=busy,
        table=table(found),
    )
    args.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def version_of(program: Path) -> str:
    python = program.with_name("python")
    ask = "import importlib.metadata as m; print(m.version('aiperf'))"
    done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
