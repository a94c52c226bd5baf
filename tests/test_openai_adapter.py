"""The adapter of a server, against a scripted server on loopback: every number is the script's."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engines.openai import OpenaiEngine, fields_of, found
from speedbench.types import (
    UNKNOWN,
    Algorithm,
    EngineDiedError,
    EngineSettings,
    Request,
    Sampling,
    ServerSettings,
    Step,
    UserError,
)
from tests.http_server import (
    VLLM_FIELDS,
    Reply,
    Running,
    Script,
    full_lengths,
    started,
    step_lengths,
    tokens_of,
)
from tests.processes import is_running

ROOT = Path(__file__).parent.parent
SPECULATING = "vllm:num_requests_running 0\nvllm:spec_decode_num_drafts_total 0\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with started() as running:
        yield running


def settings(server: Running, **changes: Any) -> EngineSettings:
    where = {"url": server.url, "model": "m", "request_timeout_s": 20.0, "patience_s": 2.0}
    of_server = {name: changes.pop(name) for name in list(changes) if name in SERVER_FIELDS}
    algorithm: Algorithm = changes.pop("algorithm", "EAGLE3")
    return EngineSettings(
        "", algorithm=algorithm, server=ServerSettings(**{**where, **of_server}), **changes
    )


SERVER_FIELDS = (
    "url", "model", "endpoint", "request_timeout_s", "api_key_env", "metrics_url", "patience_s",
)  # fmt: skip


@contextmanager
def engine(server: Running, script: Script, **changes: Any) -> Iterator[OpenaiEngine]:
    """An adapter connected to a server that plays `script`."""
    server.play(script)
    running = OpenaiEngine(settings(server, **changes))
    try:
        yield running
    finally:
        running.close()


def speculating(default: Reply | None = None, **about: Any) -> Script:
    return Script(default or Reply(), **{"metrics": SPECULATING, **about})


def asked(running: OpenaiEngine, n: int = 1, max_tokens: int = 20) -> dict[str, list[Step]]:
    """The steps of n requests at once, by request; request i's prompt is [10, i]."""
    for i in range(n):
        running.submit(Request(f"r{i}", [10, i], max_tokens, Sampling(stop_token_ids=(2,))))
    steps: dict[str, list[Step]] = {f"r{i}": [] for i in range(n)}
    while any(not mine or mine[-1].finish_reason is None for mine in steps.values()):
        for step in running.poll():
            steps[step.request_id].append(step)
    return steps


def one(running: OpenaiEngine, max_tokens: int = 20) -> list[Step]:
    return asked(running, 1, max_tokens)["r0"]


def chunked(running: OpenaiEngine, n_chunks: int, max_tokens: int = 20) -> list[Step]:
    """The steps of one request of which no two chunks came in one read, as they may."""
    for _ in range(20):
        steps = one(running, max_tokens)
        if len(steps) == n_chunks:
            return steps
    raise AssertionError(f"the chunks are always {lengths(steps)}")


def polled(running: OpenaiEngine) -> None:
    """Poll until that raises."""
    end_s = time.monotonic() + 30
    while time.monotonic() < end_s:
        running.poll()


def lengths(steps: Sequence[Step]) -> list[int]:
    return [len(step.token_ids) for step in steps]


# ---------------------------------------------------------------- what is proven


def test_the_answer_is_the_servers_tokens_and_the_prompt_is_proven(server: Running) -> None:
    with engine(server, speculating()) as running:
        steps = one(running)
    assert [t for s in steps for t in s.token_ids] == tokens_of([10, 0], 20)
    assert steps[-1].finish_reason == "length"
    assert steps[-1].served is not None
    assert steps[-1].served.prompt_proof == "echoed"
    assert steps[-1].served.n_prompt_tokens == 2
    body = server.state()["bodies"][-1]
    assert body["prompt"] == [10, 0]
    assert body["stop_token_ids"] == [2]
    assert "ignore_eos" not in body  # SGLang would ignore the stop ids, too
    assert body["temperature"] == 0


def test_a_chunk_is_no_step_where_the_server_does_not_tell(server: Running) -> None:
    expected = step_lengths(Reply(), 20)
    with engine(server, speculating(Reply(wait_s=0.02))) as running:
        steps = chunked(running, len(expected))
        assert running.describe().settings["acceptance_from"] == "not told"
    assert lengths(steps) == expected
    assert {step.engine_steps for step in steps} == {0}
    assert steps[-1].merged is None
    assert steps[-1].detail is None


@pytest.mark.parametrize("told", ["detailed", "summary", "sglang"])
@pytest.mark.parametrize("last_accepted", [None, 3])
def test_chunks_that_the_server_proves_are_steps(
    server: Running, told: str, last_accepted: int | None
) -> None:
    reply = Reply((3, 1, 2, 4), told=told, last_accepted=last_accepted, wait_s=0.02)
    with engine(server, speculating(reply)) as running:
        steps = chunked(running, len(step_lengths(reply, 17)), 17)
    whole = full_lengths(reply, 17)
    assert lengths(steps) == step_lengths(reply, 17)
    assert list(steps[-1].merged or ()) == [1] * len(steps)
    assert list(steps[-1].detail or ()) == [(0, 0), *((n - 1, 3) for n in whole)]


def test_merged_chunks_are_known_as_such(server: Running) -> None:
    reply = Reply((3, 1, 2, 4), told="detailed", merge=(1, 2, 1, 3), wait_s=0.02)
    with engine(server, speculating(reply)) as running:
        steps = chunked(running, 8, 30)
    # Steps show 1 | 3 1 | 2 | 4 3 1 | 2 | 4 3 | 1 | 2 3(cut) tokens: 11 after the prefill.
    assert step_lengths(reply, 30) == [1, 3, 1, 2, 4, 3, 1, 2, 4, 3, 1, 2, 3]
    assert lengths(steps) == [1, 4, 2, 8, 2, 7, 1, 5]
    assert list(steps[-1].merged or ()) == [1, 2, 1, 3, 1, 2, 1, 2]
    one_step = [i for i, n in enumerate(steps[-1].merged or ()) if n == 1]
    detail = list(steps[-1].detail or ())
    assert [detail[i] for i in one_step] == [(0, 0), (1, 3), (1, 3), (0, 3)]
    assert {detail[i] for i in range(8) if i not in one_step} == {(UNKNOWN, UNKNOWN)}


def test_totals_prove_nothing_of_merged_chunks(server: Running) -> None:
    reply = Reply((3, 1, 2, 4), told="summary", merge=(1, 2), wait_s=0.01)
    with engine(server, speculating(reply)) as running:
        steps = one(running, 20)
    assert steps[-1].merged is None
    assert steps[-1].served is not None
    acceptance = steps[-1].served.acceptance
    assert acceptance is not None
    whole = full_lengths(reply, 20)
    assert acceptance.histogram == tuple(whole.count(j + 1) for j in range(4))


def test_without_speculation_a_step_is_a_token(server: Running) -> None:
    with engine(server, Script(Reply((1,), wait_s=0.02)), algorithm="NONE") as running:
        assert running.describe().draft_length == 0
        steps = chunked(running, 5, 5)
        assert list(steps[-1].merged or ()) == [1] * 5
    with engine(server, Script(Reply((1,), merge=(2,), wait_s=0.02)), algorithm="NONE") as running:
        assert list(chunked(running, 3, 5)[-1].merged or ()) == [2, 2, 1]


# ---------------------------------------------------------------- tokens without their IDs


def test_tokens_are_counted_by_running_usage_where_no_ids_are_told(server: Running) -> None:
    fields = [name for name in VLLM_FIELDS if name != "return_token_ids"]
    expected = step_lengths(Reply(), 20)
    with engine(server, speculating(Reply(wait_s=0.02), fields=fields)) as running:
        assert running.describe().settings["tokens_from"] == "running usage"
        steps = chunked(running, len(expected))
    assert lengths(steps) == expected
    assert {t for s in steps for t in s.token_ids} == {UNKNOWN}
    assert steps[-1].served is not None
    assert steps[-1].served.prompt_proof == "counted"


def test_a_server_that_ignores_the_wish_for_ids_is_counted_by_usage(server: Running) -> None:
    with engine(server, speculating(Reply(ids=False), fields=None)) as running:
        assert running.describe().settings["tokens_from"] == "running usage"


def test_text_alone_cannot_be_measured(server: Running) -> None:
    with (
        pytest.raises(UserError, match=r"text without a running count.*text alone tells no tokens"),
        engine(server, speculating(Reply(ids=False, running=False))),
    ):
        pass


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_total_at_the_end_is_no_running_count(server: Running, endpoint: str) -> None:
    """Every token would seem to come with the last chunk."""
    late = Reply(ids=False, running=False, total_at_end=True, usage=False, wait_s=0.01)
    said = refused(server, speculating(late), endpoint=endpoint)
    assert "cannot be measured: the server sent text without a running count" in said


def test_a_request_without_running_counts_is_that_requests_fault(server: Running) -> None:
    late = Reply(ids=False, running=False, total_at_end=True, wait_s=0.01)
    with engine(server, speculating(Reply(ids=False))) as running:
        server.play(speculating(replies={"0": late}, default=Reply(ids=False)))
        failed, after = one(running), one(running)
    assert failed[-1].error == "the server sent text without a running count of its tokens"
    assert (sum(lengths(failed)), sum(lengths(after))) == (0, 20)


def test_a_chat_sends_messages_and_returns_text(server: Running) -> None:
    with engine(server, speculating(Reply((2,))), endpoint="chat") as running:
        running.submit(
            Request("r0", [1, 2, 3], 6, Sampling(), (("user", "hey"), ("assistant", "yo")))
        )
        steps: list[Step] = []
        while not steps or steps[-1].finish_reason is None:
            steps += running.poll()
    assert sum(lengths(steps)) == 6
    assert steps[-1].served is not None
    assert steps[-1].served.text == "".join(f" {t}" for t in tokens_of([2], 6))
    assert steps[-1].served.prompt_proof == ""
    assert server.state()["bodies"][-1]["messages"] == [
        {"role": "user", "content": "hey"}, {"role": "assistant", "content": "yo"},
    ]  # fmt: skip


# ---------------------------------------------------------------- faults of one request


FAULTS: Sequence[tuple[Reply, str, int]] = (
    (Reply(fault="status", status=429, message="slow down"), "HTTP 429: slow down", 0),
    (Reply(fault="status", status=500), "HTTP 500: the scripted server fails as told", 0),
    (Reply(fault="drop", at=-1), "the server closed the connection before it answered", 0),
    (Reply(fault="drop", at=3, wait_s=0.01), "closed the connection after 5 token", 5),
    (Reply(fault="reset", at=2, wait_s=0.01), "closed the connection after 2 token", 2),
    (Reply(fault="malformed", at=2, wait_s=0.01), "sent an event that cannot be read", 2),
    (Reply(fault="halt", at=2, wait_s=0.01), "ended after 2 token.* without a reason", 2),
    (Reply(fault="broken_off", at=1, wait_s=0.01), "broke off: out of memory", 1),
    (Reply(fault="lose", at=2, wait_s=0.01), "hold 17 token.*, the server counts 20", 17),
    (Reply(fault="no_stream"), "did not stream its answer", 0),
    (Reply(fault="no_http", at=1, wait_s=0.01), "not HTTP", 1),
    (Reply(n_prompt_more=1, wait_s=0.01), "counts 3 prompt tokens, 2 were sent", 20),
    (Reply(n_output_more=1, wait_s=0.01), "hold 20 token.*, the server counts 21", 20),
    (Reply(finish="abort", wait_s=0.01), "the server ended the request: abort", 20),
)
"""How a request is answered, what is then said, and how many tokens came before."""


@pytest.mark.parametrize(
    ("reply", "said", "n_tokens"), FAULTS, ids=lambda x: getattr(x, "fault", "")
)
def test_a_fault_is_that_requests_alone_and_what_came_is_kept(
    server: Running, reply: Reply, said: str, n_tokens: int
) -> None:
    """The request between two others fails in one sentence; nothing is asked twice."""
    with engine(server, speculating()) as running:
        server.play(speculating(replies={"1": reply}))
        before, failed, after = one(running), one(running), one(running)
    for good in (before, after):
        assert sum(lengths(good)) == 20
        assert good[-1].error is None
    assert failed[-1].finish_reason == "error"
    assert failed[-1].error is not None
    assert re.search(said, failed[-1].error), failed[-1].error
    assert sum(lengths(failed)) == n_tokens
    assert len(server.state()["bodies"]) == 3


@pytest.mark.parametrize("at", [-1, 2])
def test_a_stall_ends_with_the_requests_own_timeout(server: Running, at: int) -> None:
    with engine(server, speculating(), request_timeout_s=0.5) as running:
        server.play(speculating(replies={"0": Reply(fault="stall", at=at)}))
        failed = one(running)
        assert sum(lengths(one(running))) == 20
    assert failed[-1].error is not None
    assert "no end within --request_timeout of 0.5 s" in failed[-1].error
    assert sum(lengths(failed)) == (0 if at < 0 else 2)


def test_acceptance_that_contradicts_itself_fails_the_request(server: Running) -> None:
    """A histogram of another number of verifications than the server counts."""
    from engines import told

    about = {
        "metrics": {
            "speculative_decoding": {
                "acceptance_histogram": [1, 2], "num_spec_steps": 4, "num_draft_tokens": 9,
            }
        }
    }  # fmt: skip
    with pytest.raises(ValueError, match="3 verifications, of 4"):
        told.acceptance(about)


def test_an_answer_ends_at_our_stop_ids_only(server: Running) -> None:
    """The answer to [10, 0] is 1, 2, 3: it may stop at 2, not at 3; without ids nothing stops."""
    with engine(server, speculating()) as running:
        server.play(speculating(Reply(finish="stop")))
        assert one(running, 2)[-1].finish_reason == "stop"
        assert "stopped at token 3, which is no end" in (one(running, 3)[-1].error or "")
        running.submit(Request("r0", [10, 0], 4, Sampling()))
        steps: list[Step] = []
        while not steps or steps[-1].finish_reason is None:
            steps += running.poll()
    assert "where nothing was to stop it" in (steps[-1].error or "")
    body = server.state()["bodies"][-1]
    assert body["ignore_eos"] is True
    assert "stop_token_ids" not in body


# ---------------------------------------------------------------- connections


def test_connections_are_kept_and_reused(server: Running) -> None:
    with engine(server, speculating(Reply(wait_s=0.02)), concurrency=8) as running:
        server.play(speculating(Reply(wait_s=0.02)))
        first = asked(running, 8)
        again = asked(running, 8)
        used = server.state()["connections"]
    assert len(set(used[:8])) == 8  # all eight at the same time
    assert set(used[8:]) == set(used[:8])

    def n_new(steps: dict[str, list[Step]]) -> int:
        return sum(s[-1].served.new_connection for s in steps.values() if s[-1].served)

    assert n_new(first) >= 6  # the probe's connections are there already
    assert n_new(again) == 0


def test_many_streams_at_once(server: Running) -> None:
    reply = Reply((2,), wait_s=0.05)
    with engine(server, speculating(reply), concurrency=300) as running:
        server.play(speculating(reply))
        steps = asked(running, 300, 7)
        assert len(set(server.state()["connections"])) == 300
    for i in range(300):
        mine = steps[f"r{i}"]
        assert [t for s in mine for t in s.token_ids] == tokens_of([10, i], 7)
        assert all(a.time_ns < b.time_ns for a, b in pairwise(mine))


def test_a_server_that_restarts_fails_what_was_in_flight_and_is_then_asked_on() -> None:
    with started() as first:
        port = int(first.url.rpartition(":")[2])
        with engine(first, speculating(), patience_s=20.0) as running:
            assert sum(lengths(one(running))) == 20
            os.kill(first.pid, signal.SIGKILL)
            running.submit(Request("r0", [1], 20, Sampling()))
            with started(port) as second:
                second.play(speculating())
                steps: list[Step] = []
                while not steps:
                    steps += running.poll()
                assert steps[-1].error is not None
                assert "127.0.0.1" in steps[-1].error or "closed" in steps[-1].error
                assert sum(lengths(one(running))) == 20


def test_a_server_that_stays_away_ends_the_run() -> None:
    with started() as server, engine(server, speculating(), patience_s=0.5) as running:
        os.kill(server.pid, signal.SIGKILL)
        place = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        assert until(lambda: socket.socket().connect_ex(place) != 0)
        for i in range(8):  # more than have a connection already
            running.submit(Request(f"r{i}", [1], 20, Sampling()))
        with pytest.raises(
            EngineDiedError,
            match=r"the server is gone: no connection to .* for 0.5 s: Connection refused",
        ):
            polled(running)


# ---------------------------------------------------------------- the client process


def client_of(running: OpenaiEngine) -> int:
    return running._processes[0].popen.pid


def until(happens: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + 20
    while not happens():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True


def test_the_death_of_the_client_is_told(server: Running) -> None:
    with engine(server, speculating()) as running:
        server.play(speculating(Reply(fault="stall", at=-1)))
        running.submit(Request("r0", [1], 20, Sampling()))
        os.kill(client_of(running), signal.SIGKILL)
        with pytest.raises(EngineDiedError, match=r"client process .* ended \(signal 9\)"):
            polled(running)


def test_close_ends_the_client(server: Running) -> None:
    with engine(server, speculating()) as running:
        pid = client_of(running)
        assert is_running(pid)
        running.close()
        assert not is_running(pid)
        running.close()


KILLED = """
import sys, time
from engines.openai import OpenaiEngine
from speedbench.types import EngineSettings, ServerSettings
where = ServerSettings(sys.argv[1], "m")
engine = OpenaiEngine(EngineSettings("", algorithm="EAGLE3", server=where))
print(engine._processes[0].popen.pid, flush=True)
time.sleep(60)
"""


def test_no_client_outlives_a_killed_parent(server: Running) -> None:
    server.play(speculating())
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, server.url], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    assert until(lambda: not is_running(pid))


def test_a_signal_to_the_whole_group_leaves_the_client_alone(server: Running) -> None:
    with engine(server, speculating()) as running:
        for name in (signal.SIGINT, signal.SIGTERM):
            os.kill(client_of(running), name)
        assert sum(lengths(one(running))) == 20


# ---------------------------------------------------------------- what the server says of itself


def refused(server: Running, script: Script, **changes: Any) -> str:
    with pytest.raises(UserError) as raised, engine(server, script, **changes):
        pass
    return str(raised.value)


def test_nobody_there_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"no connection to 127.0.0.1:9: .*: start the server"):
        OpenaiEngine(settings(Running("http://127.0.0.1:9", 0), patience_s=0.1))


def test_an_unknown_model_is_a_sentence_with_those_there_are(server: Running) -> None:
    said = refused(server, speculating(models=("a", "b")))
    assert "--model is 'm', the server has a, b" in said


def test_speculation_is_told_from_none(server: Running) -> None:
    assert "speculates, but --speculative_algorithm is NONE" in refused(
        server, speculating(), algorithm="NONE"
    )
    assert "speculates, but" in refused(
        server, Script(Reply(told="summary"), metrics=None), algorithm="NONE"
    )
    assert "does not speculate, but --speculative_algorithm is EAGLE3" in refused(server, Script())
    assert "--draft_length is 5, the server" in refused(
        server, speculating(Reply(told="summary")), draft_length=5
    )


def test_the_draft_length_is_the_servers_where_it_tells(server: Running) -> None:
    per_position = "".join(
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{k}"}} 0\n'
        for k in range(5)
    )
    for script, said, k, source in (
        (speculating(Reply(told="detailed", n_drafted=4)), 3, 4, "as the server says"),
        (speculating(metrics=SPECULATING + per_position), 3, 5, "as the server says"),
        (speculating(metrics=SPECULATING + per_position), 5, 5, "as the server says"),
        (speculating(), 2, 2, "as the user says"),
    ):  # 3 is said where --draft_length is left out
        with engine(server, script, draft_length=said) as running:
            info = running.describe()
        assert (info.draft_length, info.settings["draft_length_from"]) == (k, source)


def test_sglang_says_how_it_was_started() -> None:
    about = {
        "speculative_algorithm": "EAGLE", "speculative_num_draft_tokens": 4,
        "disable_radix_cache": True, "max_running_requests": 48, "version": "0.5.22",
    }  # fmt: skip
    said = found("SGLang", {"max_model_len": 2048}, frozenset(), {}, about, "")
    assert (said.speculates, said.k, said.prefix_cache) == (True, 3, False)
    assert (said.max_num_seqs, said.max_seq_len, said.version) == (48, 2048, "0.5.22")
    said = found("SGLang", {}, frozenset(), {}, {**about, "speculative_algorithm": None}, "")
    assert (said.speculates, said.k) == (False, None)


@pytest.mark.parametrize(
    ("about", "width"),
    [
        ({"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1}, 1),
        # What SGLang chooses for a Llama: 5 steps, 4 at each, 8 tokens checked.
        ({"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 4}, 4),
        ({"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 10}, 10),
        ({"speculative_algorithm": "EAGLE3", "speculative_ngram_max_bfs_breadth": 10}, 1),
    ],
)
def test_a_tree_of_drafts_has_no_draft_length(
    server: Running, about: dict[str, object], width: int
) -> None:
    about = {**about, "speculative_num_draft_tokens": 8}
    script = Script(Reply(told="sglang"), owned_by="sglang", metrics=None, server_info=about)
    if width > 1:
        assert f"drafts trees of width {width}, and a tree of drafts has no one" in refused(
            server, script
        )
        return
    with engine(server, script) as running:
        assert running.describe().draft_length == 7


def test_what_a_server_behind_a_gateway_is_told_by_its_metrics(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key goes to the gateway only."""
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-open")
    gateway = Script(owned_by="gateway", metrics=None)
    positions = "".join(
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{k}"}} 0\n'
        for k in range(5)
    )
    with started() as worker:
        worker.play(Script(metrics=SPECULATING + positions))
        where = f"{worker.url}/metrics"
        assert "speculates, but --speculative_algorithm is NONE" in refused(
            server, gateway, algorithm="NONE", metrics_url=where
        )
        with engine(server, gateway, metrics_url=f"{where}, {where}") as running:
            assert running.describe().draft_length == 5
        assert "authorization" not in worker.state()["asked_for_metrics"]
        silent = f"{where},http://127.0.0.1:9/metrics"  # of one of two workers nothing is known
        with engine(server, gateway, algorithm="NONE", metrics_url=silent) as running:
            assert running.describe().draft_length == 0
            assert one(running)[-1].merged is None


def test_vllms_metrics_say_if_prompts_are_reused() -> None:
    for state, expected in (("True", True), ("False", False)):
        line = f'vllm:cache_config_info{{block_size="16",enable_prefix_caching="{state}"}} 1.0'
        said = found("vLLM", {}, frozenset(), {}, {}, f"vllm:num_requests_running 0\n{line}\n")
        assert (said.prefix_cache, said.speculates) == (expected, False)
    assert found("vLLM", {}, frozenset(), {}, {}, "").speculates is None


def test_prompts_have_a_salt_of_their_own_unless_reuse_is_asked_for(server: Running) -> None:
    for prefix_cache in (False, True):
        with engine(server, speculating(), prefix_cache=prefix_cache) as running:
            server.play(speculating())
            asked(running, 2)
            running.forget()
            asked(running, 2)
        salts = [body["cache_salt"] for body in server.state()["bodies"]]
        if prefix_cache:
            assert salts[0] == salts[1] != salts[2] == salts[3]
        else:
            assert len(set(salts)) == 4


# ---------------------------------------------------------------- sampling


def test_a_parameter_that_the_server_does_not_list_is_an_error(server: Running) -> None:
    said = refused(server, speculating(), sampling=Sampling(extra={"sed": 1}))
    assert said == "the server has no request field 'sed': did you mean seed?"
    said = refused(server, speculating(), sampling=Sampling(extra={"stop_token_ids": [1]}))
    assert "sampling_kwargs sets 'stop_token_ids', which speedbench sets" in said
    fields = [name for name in VLLM_FIELDS if name != "top_k"]
    said = refused(server, speculating(fields=fields), sampling=Sampling(top_k=5))
    assert "takes no top_k" in said


def test_what_the_model_recommends_is_not_taken_over(server: Running) -> None:
    """vLLM and SGLang fill what is not sent from generation_config.json."""
    with engine(server, speculating(), sampling=Sampling(extra={"seed": 7})) as running:
        running.submit(Request("r0", [1], 4, Sampling(0.5, 0.9, 0, extra={"seed": 7})))
        while not running.poll():
            pass
    body = server.state()["bodies"][-1]
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "seed")} == {
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 7,
    }  # fmt: skip
    neutral = ("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p")
    assert [body[name] for name in neutral] == [0, 0, 1, 0]


def test_fields_are_read_from_any_openapi_document() -> None:
    assert fields_of(None, "/v1/completions") == frozenset()
    assert fields_of({"paths": {}}, "/v1/completions") == frozenset()


# ---------------------------------------------------------------- the key


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = speculating(key="sesame-open")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "HTTP 401" in refused(server, script)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-open")
    with engine(server, script) as running:
        assert sum(lengths(one(running))) == 20
        assert "sesame-open" not in str(running.describe())
        command = Path(f"/proc/{client_of(running)}/cmdline").read_bytes()
        assert b"sesame-open" not in command
    monkeypatch.setenv("OTHER", "sesame-shut")
    said = refused(server, script, api_key_env="OTHER")
    assert "was taken from OTHER" in said
    assert "sesame" not in said
    assert "--api_key_env MISSING is not set" in refused(server, script, api_key_env="MISSING")


def test_a_certificate_must_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt"), "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    pem.write_text((tmp_path / "key").read_text() + (tmp_path / "crt").read_text())
    with started(certificate=pem) as server:
        with pytest.raises(UserError, match="its certificate is not trusted"):
            OpenaiEngine(settings(server))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "crt"))
        running = OpenaiEngine(settings(server, algorithm="NONE"))
        try:
            assert sum(lengths(one(running))) == 20
        finally:
            running.close()


def test_a_server_that_repeats_the_key_in_an_error_does_not_spread_it(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-open")
    reply = Reply(fault="status", status=403, message="key sesame-open has no funds")
    with engine(server, speculating()) as running:
        server.play(speculating(replies={"0": reply}))
        assert one(running)[-1].error == "HTTP 403: key <redacted> has no funds"
