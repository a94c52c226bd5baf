"""Throughput: speedbench's run against the engine's own offline generate, on the same machine.

    .venv/bin/python scripts/throughput.py --engine VLLM
    .venv/bin/python scripts/throughput.py --engine SGLANG --python .venv-sglang/bin/python
    .venv/bin/python scripts/throughput.py --engine VLLM --quick --out /tmp/throughput.md

For each arm (no speculation; DRAFT_TARGET) and concurrency, two processes hold an engine each, on
the same checkpoints with the same arguments, and decode the same token-ID prompts to the same fixed
length in alternating order, the one that is not measured standing still (SIGSTOP). Every output is
compared token for token. docs/throughput.md gets the engine's section; the other engine's stays.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import IO, Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import cpu_engines  # noqa: E402

K, OUTPUT_LENGTH, PROMPT_LENGTH, MAX_SEQ_LEN, BATCHED_TOKENS = 3, 128, 64, 1024, 4096
ALGORITHMS = ("NONE", "DRAFT_TARGET")
TARGET_RATIO = 0.98

ENVIRONMENT: Mapping[str, Mapping[str, str]] = {
    "VLLM": {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    },
    "SGLANG": {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SHIM_TRITON": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    },
}
"""The same for every process of an engine. For models this small a second thread only waits."""

ENGINE_ARGS: Mapping[str, Mapping[str, Any]] = {
    # max_num_batched_tokens: vLLM's default for `LLM` is another than that for `AsyncLLM`.
    "VLLM": {"enforce_eager": True, "max_num_batched_tokens": BATCHED_TOKENS},
    "SGLANG": cpu_engines.SGLANG,
}


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True, slots=True)
class Leg:
    """One way to ask all prompts.

    name         own: the engine's offline generate; ours: speedbench; same: the generate of the
                 very engine that speedbench drives, which is given everything at once
    process      the one whose engine it asks
    closed_loop  as many requests are in flight as the engine decodes at a time, and no more
    """

    name: str
    process: str
    closed_loop: bool


OWN, OURS, SAME = Leg("own", "own", False), Leg("ours", "ours", True), Leg("same", "ours", False)
ROUND = (OWN, SAME, OURS, OURS, SAME, OWN)
"""The same forwards and backwards, so that a drift of the machine cancels."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One leg's answers to all prompts: in that time, so many tokens, and a digest of each output.

    n_steps, al  engine steps, and tokens per decode step, where the leg tells them
    """

    wall_s: float
    n_tokens: int
    digests: tuple[str, ...]
    n_steps: int | None = None
    al: float | None = None

    @property
    def tps(self) -> float:
        return self.n_tokens / self.wall_s


@dataclass(frozen=True, slots=True)
class Round:
    """The visits of each leg, whose places in the round have one middle."""

    visits: Mapping[str, Sequence[Visit]]

    def log_tps(self, leg: Leg) -> float:
        visits = self.visits[leg.name]
        return sum(math.log(visit.tps) for visit in visits) / len(visits)

    def log_ratio(self, leg: Leg, base: Leg) -> float:
        return self.log_tps(leg) - self.log_tps(base)


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one concurrency.

    all_at_once  an uncounted visit of ours with everything in flight: it tells how many steps the
                 engine needs if it is never short of requests
    """

    algorithm: str
    concurrency: int
    all_at_once: Visit
    rounds: Sequence[Round]

    def visits(self) -> list[Visit]:
        return [v for r in self.rounds for visits in r.visits.values() for v in visits]

    def mean_tps(self, leg: Leg) -> float:
        return math.exp(sum(r.log_tps(leg) for r in self.rounds) / len(self.rounds))

    def ratio(self, leg: Leg, base: Leg) -> Ratio:
        return ratio_of([r.log_ratio(leg, base) for r in self.rounds])

    def mean_steps(self) -> float:
        """Engine steps of a visit of ours."""
        told = [v.n_steps for v in self.visits() if v.n_steps is not None]
        return sum(told) / len(told)

    def n_outputs(self) -> int:
        return sum(len(visit.digests) for visit in self.visits())

    def n_differing(self) -> int:
        """Outputs of any visit that are not those of the first one."""
        first, *others = self.visits()
        return sum(
            a != b for visit in others for a, b in zip(visit.digests, first.digests, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of throughputs with its 95 % interval; no interval from one round."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.3f} (one round)"
        return f"{self.value:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


def ratio_of(logs: Sequence[float]) -> Ratio:
    """Geometric mean of ratios given by their logarithms, with Student's t over rounds."""
    from scipy.special import stdtrit

    n, mean = len(logs), sum(logs) / len(logs)
    if n < 2:
        return Ratio(math.exp(mean), None)
    variance = sum((x - mean) ** 2 for x in logs) / (n - 1)
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n)
    return Ratio(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)))


def verdict(ratio: Ratio) -> str:
    """The ratio against the target, and whether the rounds can tell."""
    if ratio.interval is None:
        return "one round tells nothing"
    low, high = ratio.interval
    if low >= TARGET_RATIO:
        return "met"
    return "not met" if high < TARGET_RATIO else "cannot be told"


# ---------------------------------------------------------------- the processes that hold engines


@dataclass(frozen=True, slots=True)
class Answers:
    """All outputs in the prompts' order, and the seconds they took; see `Visit`."""

    wall_s: float
    outputs: Sequence[Sequence[int]]
    n_steps: int | None = None
    al: float | None = None


class Answering(Protocol):
    """An engine that answers all prompts in one way."""

    def ask(self, leg: str, n_in_flight: int) -> Answers: ...

    def settings(self) -> Mapping[str, object]:
        """What must be the same in every process."""

    def close(self) -> None: ...


class Ours:
    """speedbench's own path: session, loop, adapter and store; each visit is a run directory. And
    (`same`) the engine that the adapter holds, asked without any of that."""

    def __init__(self, config: Any, prepared: Any, work: Path) -> None:
        import engines

        self._config, self._prepared, self._work = config, prepared, work
        self._engine = engines.adapter(config.engine)(config.engine_settings())
        self._prompts = [prepared.prompts[row.id, 0].token_ids for row in prepared.rows]
        self._n_runs = 0

    def ask(self, leg: str, n_in_flight: int) -> Answers:
        if leg == SAME.name:
            return SAME_ENGINE[self._config.engine](self._engine, self._config, self._prompts)
        return self._run(n_in_flight)

    def _run(self, n_in_flight: int) -> Answers:
        from speedbench import session, store
        from speedbench.report.summary import summarize
        from speedbench.target import Target

        directory = self._work / f"run-{self._n_runs}"
        self._n_runs += 1
        config = self._config.model_copy(update={"concurrency": n_in_flight, "warmup": 0})
        outcome = session.measure(config, self._prepared, self._engine, Target(directory))
        if outcome.end.reason != "finished" or outcome.n_failed:
            raise SystemExit(f"the run ended with {outcome.end}, {outcome.n_failed} rows failed")
        run = store.load(directory)
        names, ids = run.turns["conversation_id"], run.turns["output_token_ids"]
        by_name = dict(zip(names.to_pylist(), ids.to_pylist(), strict=True))
        wall_s = (outcome.end.ended_ns - outcome.end.started_ns) / 1e9
        al = summarize(run).lengths["al_step"].value
        n_steps = len(set(run.columns.time_ns.tolist()))  # all of one engine step have one time
        shutil.rmtree(directory)
        return Answers(wall_s, [by_name[row.id] for row in self._prepared.rows], n_steps, al)

    def settings(self) -> Mapping[str, object]:
        info = self._engine.describe()
        names = SHARED_SETTINGS[self._config.engine]
        return {
            "draft_length": info.draft_length,
            "max_num_seqs": info.max_num_seqs,
            "prefix_cache": info.prefix_cache,
            **{name: info.settings[name] for name in names},
        }

    def close(self) -> None:
        self._engine.close()


SHARED_SETTINGS: Mapping[str, Sequence[str]] = {
    "VLLM": ("max_num_batched_tokens", "async_scheduling", "chunked_prefill", "dtype"),
    "SGLANG": ("disable_overlap_schedule", "chunked_prefill_size", "attention_backend"),
}


def _vllm_arguments(config: Any) -> dict[str, Any]:
    """Those of our adapter."""
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs

    from engines.vllm import _interface, engine_arguments

    interface = _interface(vllm.__version__, AsyncEngineArgs)
    return engine_arguments(config.engine_settings(), interface)[0]


def _vllm_settings(vllm_config: Any) -> dict[str, object]:
    spec, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    return {
        "draft_length": 0 if spec is None else spec.num_speculative_tokens,
        "max_num_seqs": scheduler.max_num_seqs,
        "prefix_cache": bool(vllm_config.cache_config.enable_prefix_caching),
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "async_scheduling": bool(scheduler.async_scheduling),
        "chunked_prefill": bool(scheduler.enable_chunked_prefill),
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
    }


def _vllm_sampling(config: Any, max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class OwnVllm:
    """`vllm.LLM.generate`. What our adapter asks for only to measure (statistics, acceptance per
    request) is left out: its price is ours."""

    def __init__(self, config: Any, prompts: Sequence[Sequence[int]]) -> None:
        from vllm import LLM

        arguments = _vllm_arguments(config)
        for name in ("disable_log_stats", "per_request_spec_decode_metrics"):
            arguments.pop(name, None)
        self._llm = LLM(**arguments)
        self._sampling = _vllm_sampling(config, config.output_length)
        self._prompts: list[Any] = [{"prompt_token_ids": list(ids)} for ids in prompts]

    def ask(self, leg: str, n_in_flight: int) -> Answers:
        del leg, n_in_flight  # it is given everything
        started_s = time.perf_counter()
        answers = self._llm.generate(self._prompts, self._sampling, use_tqdm=False)
        wall_s = time.perf_counter() - started_s
        return Answers(wall_s, [list(a.outputs[0].token_ids) for a in answers])

    def settings(self) -> Mapping[str, object]:
        return _vllm_settings(self._llm.llm_engine.vllm_config)

    def close(self) -> None:
        del self._llm


def same_vllm(adapter: Any, config: Any, prompts: Sequence[Sequence[int]]) -> Answers:
    """The asynchronous generate of the adapter's engine, one final output of each request."""
    llm, loop, core = adapter._llm, adapter._asyncio, adapter._llm.engine_core
    recording = core.get_output_async

    async def one(token_ids: Sequence[int], n_tokens: int) -> Sequence[int]:
        prompt, sampling = {"prompt_token_ids": list(token_ids)}, _vllm_sampling(config, n_tokens)
        async for answer in llm.generate(prompt, sampling, f"same-{uuid.uuid4()}"):
            last = answer
        return list(last.outputs[0].token_ids)

    def hear_with(receive: Any) -> None:
        """What waits for a message already still hears that one: a token is asked for it."""
        core.get_output_async = receive
        loop.run_until_complete(one(prompts[0], 1))

    async def all_of_them() -> Sequence[Sequence[int]]:
        return await asyncio.gather(
            *(one(token_ids, config.output_length) for token_ids in prompts)
        )

    hear_with(type(core).get_output_async.__get__(core))  # as if there were no adapter
    try:
        started_s = time.perf_counter()
        outputs = loop.run_until_complete(all_of_them())
        wall_s = time.perf_counter() - started_s
    finally:
        hear_with(recording)
    return Answers(wall_s, outputs)


def _sglang_engine(config: Any) -> Any:
    """SGLang's Engine with the arguments of our adapter."""
    from sglang import Engine
    from sglang.srt.server_args import ServerArgs

    from engines.sglang import _fields, engine_arguments

    return Engine(**engine_arguments(config.engine_settings(), _fields(ServerArgs))[0])


def _sglang_settings(llm: Any) -> dict[str, object]:
    state = llm.loop.run_until_complete(llm.tokenizer_manager.get_internal_state())[0]
    width = int(state.get("speculative_num_draft_tokens") or 1)
    per_rank = state.get("effective_max_running_requests_per_dp", state.get("max_running_requests"))
    return {
        "draft_length": width - 1 if state.get("speculative_algorithm") else 0,
        "max_num_seqs": None if per_rank is None else int(per_rank),
        "prefix_cache": not state["disable_radix_cache"],
        **{name: state.get(name) for name in SHARED_SETTINGS["SGLANG"]},
    }


def _sglang_sampling(config: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": config.output_length, "ignore_eos": True}


def _sglang_answers(llm: Any, config: Any, prompts: Sequence[Sequence[int]]) -> Answers:
    started_s = time.perf_counter()
    answers = llm.generate(
        input_ids=[list(ids) for ids in prompts], sampling_params=_sglang_sampling(config)
    )
    wall_s = time.perf_counter() - started_s
    return Answers(wall_s, [list(answer["output_ids"]) for answer in answers])


class OwnSglang:
    """`sglang.Engine.generate`."""

    def __init__(self, config: Any, prompts: Sequence[Sequence[int]]) -> None:
        self._llm, self._config, self._prompts = _sglang_engine(config), config, prompts

    def ask(self, leg: str, n_in_flight: int) -> Answers:
        del leg, n_in_flight  # it is given everything
        return _sglang_answers(self._llm, self._config, self._prompts)

    def settings(self) -> Mapping[str, object]:
        return _sglang_settings(self._llm)

    def close(self) -> None:
        self._llm.shutdown()


def same_sglang(adapter: Any, config: Any, prompts: Sequence[Sequence[int]]) -> Answers:
    """`generate` of the adapter's engine."""
    return _sglang_answers(adapter._llm, config, prompts)


OWN_ENGINE: Mapping[str, Callable[..., Answering]] = {"VLLM": OwnVllm, "SGLANG": OwnSglang}
SAME_ENGINE: Mapping[str, Callable[..., Answers]] = {"VLLM": same_vllm, "SGLANG": same_sglang}


def serve(process: str, given: Mapping[str, Any], work: Path) -> None:
    """Hold one engine and answer each line of stdin (leg, requests in flight) with one of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what engines print goes to the log
    os.dup2(2, 1)
    from speedbench import inputs
    from speedbench.config import from_dict

    config = from_dict(dict(given))
    prepared = inputs.prepare(config)
    prompts = [prepared.prompts[row.id, 0].token_ids for row in prepared.rows]
    engine: Answering = (
        Ours(config, prepared, work)
        if process == "ours"
        else OWN_ENGINE[config.engine](config, prompts)
    )

    def tell(what: Mapping[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    tell({"settings": engine.settings(), "fingerprint": prepared.fingerprint})
    for line in sys.stdin:
        leg, n_in_flight = line.split()
        found = engine.ask(leg, int(n_in_flight))
        told = [json.dumps(list(ids)).encode() for ids in found.outputs]
        tell(
            {
                "wall_s": found.wall_s,
                "n_tokens": sum(map(len, found.outputs)),
                "digests": [hashlib.sha256(ids).hexdigest() for ids in told],
                "n_steps": found.n_steps,
                "al": found.al,
            }
        )
    engine.close()


# ---------------------------------------------------------------- driving them


@dataclass(frozen=True, slots=True)
class Held:
    """A process that holds an engine, in a process group of its own, with all it starts."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def read(self) -> dict[str, Any]:
        out: IO[str] | None = self.process.stdout
        line = out.readline() if out is not None else ""
        if not line:
            tail = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-25:])
            raise SystemExit(f"{tail}\n\nthe process '{self.name}' ended: see its last lines above")
        return dict(json.loads(line))

    def ask(self, leg: Leg, n_in_flight: int) -> Visit:
        self.signal(signal.SIGCONT)
        if self.process.stdin is not None:
            self.process.stdin.write(f"{leg.name} {n_in_flight}\n")
            self.process.stdin.flush()
        told = self.read()
        self.signal(signal.SIGSTOP)
        return Visit(**{**told, "digests": tuple(told["digests"])})

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, of which engine, and how often."""

    engine: str
    python: str
    models: Path
    work: Path
    concurrencies: Sequence[int]
    n_waves: int
    n_rounds: int
    output_length: int

    def config(self, algorithm: str, concurrency: int) -> dict[str, Any]:
        draft = {"draft_model_dir": str(self.models / "word" / "draft"), "draft_length": K}
        return {
            "engine": self.engine,
            "engine_args": dict(ENGINE_ARGS[self.engine]),
            "model_dir": str(self.models / "word" / "target"),
            "max_seq_len": MAX_SEQ_LEN,
            "speculative_algorithm": algorithm,
            **(draft if algorithm != "NONE" else {}),
            "dataset": "random",
            "random_isl": PROMPT_LENGTH,
            "num_requests": self.n_waves * concurrency,
            "concurrency": concurrency,
            "max_num_seqs": concurrency,
            "output_length": self.output_length,
            "ignore_eos": True,
        }

    def environment(self) -> dict[str, str]:
        python = Path(self.python)
        shim = [str(ROOT / "tests" / "sglang_cpu_shim")] if self.engine == "SGLANG" else []
        return {
            **os.environ,
            **ENVIRONMENT[self.engine],
            "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join([*shim, str(ROOT)]),
        }


@contextlib.contextmanager
def held(plan: Plan, algorithm: str, concurrency: int) -> Iterator[dict[str, Held]]:
    """The processes of a cell, ended whatever happens."""
    processes: dict[str, Held] = {}
    config = json.dumps(plan.config(algorithm, concurrency))
    try:
        for name in sorted({leg.process for leg in ROUND}):
            work = plan.work / f"{algorithm}-{concurrency}-{name}"
            work.mkdir(parents=True)
            log = work / "log.txt"
            with log.open("w", encoding="utf-8") as handle:
                started = subprocess.Popen(
                    [plan.python, str(Path(__file__).resolve()), "--serve", name, config, work],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=handle, text=True,
                    cwd=work, env=plan.environment(),
                    # A group in this session: if this process is killed, the kernel wakes it and
                    # hangs up on it, stopped as it may be.
                    preexec_fn=os.setpgrp,
                )  # fmt: skip
            processes[name] = Held(name, started, log)
        yield processes
    finally:
        for one in processes.values():
            one.signal(signal.SIGKILL)
        for one in processes.values():
            one.process.communicate()


def measure(plan: Plan, algorithm: str, concurrency: int) -> tuple[Cell, Mapping[str, object]]:
    """One cell, and the settings that its engines share."""
    n_prompts = plan.n_waves * concurrency
    rounds = []
    with held(plan, algorithm, concurrency) as processes:
        ready = {name: process.read() for name, process in processes.items()}
        for name, said in ready.items():
            if said != ready[OWN.name]:
                raise SystemExit(f"'own' and '{name}' differ: {ready[OWN.name]} and {said}")
        for one in processes.values():
            one.signal(signal.SIGSTOP)
        # Not counted: what is slow the first time.
        first = {leg.name: processes[leg.process].ask(leg, n_prompts) for leg in set(ROUND)}
        for i in range(plan.n_rounds):
            seen: dict[str, list[Visit]] = {leg.name: [] for leg in ROUND}
            for leg in ROUND:
                n_in_flight = concurrency if leg.closed_loop else n_prompts
                seen[leg.name].append(processes[leg.process].ask(leg, n_in_flight))
            rounds.append(Round(seen))
            shown = [f"{leg.name} {math.exp(rounds[-1].log_tps(leg)):.0f}" for leg in ROUND[:3]]
            print(f"  {algorithm} {concurrency}, round {i + 1}: {', '.join(shown)} tokens/s",
                  flush=True)  # fmt: skip
    cell = Cell(algorithm, concurrency, first[OURS.name], rounds)
    return cell, ready[OWN.name]["settings"]


# ---------------------------------------------------------------- the page


ABOUT = """# Throughput: speedbench and the engines' own offline generate

Written by `scripts/throughput.py`. The same checkpoints (the word pair of the calibration
checkpoints, drafts of K = {k}; with `--layers` a deeper target, whose further layers cost time
and change no token), the same random prompts of {prompt} token IDs, the same engine
arguments and the same cap on requests decoded at a time (`max_num_seqs` = N); every answer is
exactly {output} tokens long (`ignore_eos`, greedy).

- **own**: the engine's offline `generate` (`vllm.LLM.generate`, `sglang.Engine.generate`), in a
  process of its own, is given all prompts at once and schedules them itself. What `speedbench` asks
  of the engine only to measure (vLLM: log statistics, acceptance per request) it is not asked for.
- **ours**: `speedbench`'s run, with everything that belongs to one: loop, adapter, every step
  recorded and stored. It keeps N requests in flight, so the engine has no queue: a place that falls
  free stays empty until the finished request has been heard of and the next one has come, which
  is one step for every request at the least. That is what a closed loop is, and no caller of
  the engine can avoid it; the shorter the answers, the more it costs. *Engine steps* shows it:
  those of a run, and those of one (not counted) that was given everything at once.
- **same**: the very engine that `ours` drives is asked by its own `generate` (vLLM: that of
  `AsyncLLM`, which `LLM` is another client of), everything at once, `speedbench` standing by. Two
  starts of one engine differ by ten percent and more in speed, for as long as they live; `ours` and
  `same` share a start, `ours` and `own` do not. What the adapter asks of the engine to measure is
  in both of the first pair, which tells what our own code costs, and in one of the second.

Output TPS is all output tokens by the time from the call to the last answer, for all alike (ours:
from before the first submission until after the last step has been taken; what is stored within
the first second is written by then, the rest later). A round is own, same,
ours, ours, same, own; a ratio is the geometric mean over rounds, its 95 % interval Student's t on
the rounds' log ratios: that of ours / own does not hold what differs between two starts. Engines
are started anew for every row; the process that does not measure stands still. Target: at least
{target} of the engine's own.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """An engine's part of the page."""

    engine: str
    about: Sequence[str]
    cells: Sequence[Cell]

    def text(self) -> str:
        head = (
            "arm", "N", "prompts", "AL", "own tokens/s", "same tokens/s", "ours tokens/s",
            "**ours / same**", f"at least {TARGET_RATIO}", "ours / own", f"at least {TARGET_RATIO}",
            "engine steps", "at once",
        )  # fmt: skip
        rows = [
            (
                cell.algorithm,
                str(cell.concurrency),
                str(len(cell.all_at_once.digests)),
                "-" if cell.all_at_once.al is None else f"{cell.all_at_once.al:.2f}",
                f"{cell.mean_tps(OWN):,.0f}",
                f"{cell.mean_tps(SAME):,.0f}",
                f"{cell.mean_tps(OURS):,.0f}",
                str(cell.ratio(OURS, SAME)),
                verdict(cell.ratio(OURS, SAME)),
                str(cell.ratio(OURS, OWN)),
                verdict(cell.ratio(OURS, OWN)),
                f"{cell.mean_steps():.0f}",
                str(cell.all_at_once.n_steps),
            )
            for cell in self.cells
        ]
        align = ["---", *["--:"] * (len(head) - 1)]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))
        n_outputs = sum(cell.n_outputs() for cell in self.cells)
        n_differing = sum(cell.n_differing() for cell in self.cells)
        same = (
            f"All {n_outputs:,} outputs are those of the first `own` visit of their row, token for "
            "token."
            if n_differing == 0
            else f"**{n_differing:,} of {n_outputs:,} outputs differ from those of the first `own` "
            "visit of their row: the ratios compare different work.**"
        )
        return "\n\n".join([f"## {self.engine}", *self.about, table, same]) + "\n"


def page(old: str, section: Section, intro: str) -> str:
    """The page with this engine's section; another engine's, if the old page has one, is kept."""
    kept = {part.partition("\n")[0]: f"## {part}" for part in f"\n{old}".split("\n## ")[1:]}
    kept[section.engine] = section.text()
    return "\n".join([intro, *(kept[name].strip() + "\n" for name in sorted(kept, reverse=True))])


def about(plan: Plan, settings: Mapping[str, object], load: float, took_s: float) -> list[str]:
    program = (
        "import json, platform; from importlib import metadata\n"
        "found = {d.metadata['Name']: d.version for d in metadata.distributions()}\n"
        "names = ('vllm', 'vllm-cpu', 'sglang', 'torch', 'transformers', 'numpy')\n"
        "print(json.dumps({'Python': platform.python_version(), "
        "**{n: found[n] for n in names if n in found}}))\n"
    )
    done = subprocess.run(
        [plan.python, "-c", program], capture_output=True, text=True, check=True,
        env={name: v for name, v in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    versions = ", ".join(f"{name} {v}" for name, v in json.loads(done.stdout).items())
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    variables = ", ".join(f"`{k}={v}`" for k, v in ENVIRONMENT[plan.engine].items())
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    arguments = ", ".join(f"`{k}: {v}`" for k, v in ENGINE_ARGS[plan.engine].items())
    kernels = (
        ["Its compiled CPU kernels cannot be had: `tests/sglang_cpu_shim` stands in for them."]
        if plan.engine == "SGLANG"
        else []
    )
    command = " ".join(["python scripts/throughput.py", *_without_paths(sys.argv[1:])])
    return [
        f"{date.today().isoformat()}, {cpu or platform.machine()}, {os.cpu_count()} cores, load "
        f"average before {load:.1f}; {versions}. `{command}`: {plan.n_rounds} rounds, "
        f"{plan.n_waves} N prompts of {plan.output_length} output tokens, {took_s / 60:.0f} "
        "minutes.",
        *kernels,
        f"Engine arguments: {arguments}. Read back from both processes, in the last row: "
        f"{shown}. Variables: {variables}.",
    ]


def _without_paths(argv: Sequence[str]) -> list[str]:
    return [Path(word).name if os.sep in word else word for word in argv]


def deepen(target: Path, n_layers: int) -> None:
    """Give a checkpoint so many layers: more of those it has, which change no token."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((target / "config.json").read_text("utf-8"))
    had = int(config["num_hidden_layers"])
    if n_layers == had:
        return
    (weights,) = target.glob("*.safetensors")
    tensors = load_file(weights)
    first = {name: value for name, value in tensors.items() if ".layers.0." in name}
    for layer in range(had, n_layers):
        tensors |= {name.replace(".0.", f".{layer}.", 1): v for name, v in first.items()}
    save_file(tensors, weights, {"format": "pt"})
    config["num_hidden_layers"] = n_layers
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=sorted(ENVIRONMENT))
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has it")
    parser.add_argument("--algorithm", default=",".join(ALGORITHMS), help="arms, comma-separated")
    parser.add_argument("--concurrency", default="16,64")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--waves", type=int, default=3, help="prompts = waves x concurrency")
    parser.add_argument("--output_length", type=int, default=OUTPUT_LENGTH)
    parser.add_argument(
        "--layers", type=int, default=2,
        help="of the target: more make steps as long as those of a model in use, not of a toy",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a smoke test: proves nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "throughput.md")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        process, config, work = given.serve
        serve(process, json.loads(config), Path(work))
        return
    python = shutil.which(given.python)
    if given.engine is None or python is None:
        parser.error("give --engine VLLM or SGLANG, and --python an interpreter that has it")
    from speedbench.calibration import checkpoints

    load, started_s = os.getloadavg()[0], time.perf_counter()
    if load > 0.5:
        print(f"the load average is {load:.1f}: throughputs of a busy machine mean little")
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        work = Path(scratch)
        checkpoints.build(work / "models")
        deepen(work / "models" / "word" / "target", given.layers)
        # An interpreter of a virtual environment must keep its own path: no resolve().
        plan = Plan(
            given.engine,
            str(Path(python).absolute()),
            work / "models",
            work / "cells",
            [int(n) for n in given.concurrency.split(",")],
            given.waves,
            given.rounds,
            given.output_length,
        )
        if given.quick:
            plan = replace(plan, concurrencies=(16,), n_waves=2, n_rounds=2, output_length=32)
        cells, settings = [], dict[str, object]()
        for concurrency in plan.concurrencies:
            for algorithm in given.algorithm.split(","):
                cell, found = measure(plan, algorithm, concurrency)
                cells.append(cell)
                settings = dict(found)
        section = Section(
            plan.engine, about(plan, settings, load, time.perf_counter() - started_s), cells
        )
    old = given.out.read_text("utf-8") if given.out.exists() else ""
    intro = ABOUT.format(k=K, prompt=PROMPT_LENGTH, output=plan.output_length, target=TARGET_RATIO)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page(old, section, intro), encoding="utf-8")
    print(section.text())


if __name__ == "__main__":
    main()
