"""What a server's metrics say: the text, the samples over a session, the scraping process.

The recorded texts are of vLLM 0.32.0 and SGLang 0.5.23 on a CPU with the calibration pair (K = 3),
before, while and after each answered the same 22 prompts with 811 tokens. vLLM's responses told 348
verifications with 466 accepted tokens; the pair is the same, so SGLang's are too.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedbench import server_metrics, store
from speedbench.checks import all_checks
from speedbench.cli import main
from speedbench.insights.served import served
from speedbench.prometheus import FormatError, Sample, parse
from speedbench.report import layout_server, markdown
from speedbench.report.arms import Arm
from speedbench.report.summary import summarize
from speedbench.server_counters import Received, ServerReading, read
from speedbench.server_metrics import Recorder, Scrape, Scraper, settled, shown
from speedbench.types import EngineCounters
from tests import builders, http_server
from tests.builders import S

CONTRACTS = Path(__file__).parent / "contracts"
VLLM, SGLANG = CONTRACTS / "vllm" / "metrics-0.32.0", CONTRACTS / "sglang" / "metrics-0.5.23"
RECORDED = sorted([*VLLM.glob("*.gz"), *SGLANG.glob("*.gz")])
OURS = Received(n_requests=22, n_tokens=811, most=8)


def recorded(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


# ---------------------------------------------------------------- the text


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_recorded_texts_are_read_as_prometheus_own_parser_reads_them(path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    text = recorded(path)
    theirs = {
        (sample.name, tuple(sorted(sample.labels.items()))): (sample.value, family.type)
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    mine = {(one.name, one.labels): one for one in parse(text)}
    assert mine.keys() == theirs.keys()
    assert len(mine) > 400
    for key, (value, kind) in theirs.items():
        assert mine[key].value == value or value != value
        told = "untyped" if kind in ("unknown", "untyped") else kind
        assert mine[key].kind == told


NAMES = st.from_regex(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,8}", fullmatch=True)
KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)
VALUES = st.text(
    st.characters(exclude_characters="\r", exclude_categories=["Cs", "Cc"]), max_size=9
)
NUMBERS = st.floats(allow_nan=False) | st.integers(-10, 10**15).map(float)


@given(st.dictionaries(st.tuples(NAMES, st.dictionaries(KEYS, VALUES).map(
    lambda labels: tuple(sorted(labels.items())))), NUMBERS, max_size=6))  # fmt: skip
def test_what_is_written_is_read(
    series: dict[tuple[str, tuple[tuple[str, str], ...]], float],
) -> None:
    lines = []
    for (name, labels), value in series.items():
        inside = ",".join(
            '{}="{}"'.format(k, v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
            for k, v in labels
        )
        lines.append(f"{name}{{{inside}}} {value!r}\n")
    assert {(one.name, one.labels): one.value for one in parse("".join(lines))} == series


def test_kinds_escapes_and_times() -> None:
    text = (
        "# HELP a_total what it is\n# TYPE a_total counter\n"
        'a_total{x="1\\"\\\\\\n{,}=",} 3 1395066363000\n'
        '# TYPE h histogram\nh_bucket{le="+Inf"} 2\nh_sum 0.5\nh_count 2\n'
        "g NaN\nneg -Inf\n"
    )
    first, *others = parse(text)
    assert first == Sample("a_total", (("x", '1"\\\n{,}='),), "counter", 3.0)
    kinds = [(one.name, one.kind) for one in others]
    assert kinds == [
        ("h_bucket", "histogram"), ("h_sum", "histogram"), ("h_count", "histogram"),
        ("g", "untyped"), ("neg", "untyped"),
    ]  # fmt: skip
    assert others[-1].value == float("-inf")
    assert others[-2].value != others[-2].value


@pytest.mark.parametrize(
    "text",
    [
        "a 1", "a\n", "a one\n", "a 1_0\n", "a 1 2 3\n", "a{} \n", 'a{x="1} 2\n', 'a{x=1} 2\n',
        'a{x="1"y="2"} 3\n', 'a{x="1",x="1"} 2\n', 'a{x="\\q"} 1\n', "1a 1\n", "a-1\n",
        "# TYPE a melon\na 1\n", "a 1\na 2\n", '{"iteration": 1}\n', "<html>\n",
    ],
)  # fmt: skip
def test_what_is_no_prometheus_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse(text)


# ---------------------------------------------------------------- samples over a session


def table_of(
    directory: Path, scrapes: Sequence[tuple[float, str | Exception]], source: int = 0
) -> pa.Table:
    """Samples as the recorder stores them, of texts by the second of their scrape."""
    recorder = Recorder(directory, session=0)
    for second, text in scrapes:
        failed = isinstance(text, Exception)
        samples = () if isinstance(text, Exception) else parse(text)
        error = str(text) if failed else ""
        recorder.take(Scrape(source, int(second * S), S // 100, samples, error))
    recorder.write()
    return store.load_server_metrics(directory)


def of_vllm(directory: Path, received: Received = OURS, model: str = "word") -> ServerReading:
    names = ("before", "during", "after")
    scrapes = [(i, recorded(VLLM / f"{name}.txt.gz")) for i, name in enumerate(names)]
    return read(table_of(directory, scrapes), 0, S // 2, 3 * S // 2, received, model)


def test_vllm_counters_gain_what_the_responses_told(tmp_path: Path) -> None:
    found = of_vllm(tmp_path)
    assert (found.why_not, found.why_no_al) == ("", "")
    assert found.counters == EngineCounters(348, 1044, 466, (216, 145, 105))
    assert (found.n_finished, found.n_generated, found.most_running) == (22, 811, 8)
    assert (found.engine, found.n_scrapes, found.n_failed) == ("vLLM", 3, 0)
    assert found.per_verification is None


def test_sglang_has_no_counter_of_accepted_tokens_and_its_gauge_is_no_mean(tmp_path: Path) -> None:
    names = ("before", "during-1", "during-2", "after")
    scrapes = [(i, recorded(SGLANG / f"{name}.txt.gz")) for i, name in enumerate(names)]
    found = read(table_of(tmp_path, scrapes), 0, S // 2, 5 * S // 2, OURS, "word")
    assert found.why_not == ""
    assert found.counters is None
    assert "not the tokens that they accepted" in found.why_no_al
    # Final steps are cut: fewer than the 1 + 466 / 348 = 2.339 that were accepted.
    assert found.per_verification == (811 - 22) / 348
    assert found.n_verify == 348
    seen = {one.name: (one.lowest, one.highest, one.n_scrapes) for one in found.gauges}
    # The server's gauge is of its last interval: 2.037 and 2.427 were seen, 2.339 is true.
    assert seen["sglang:spec_accept_length"] == (0.0, 2.4273127753303965, 4)


MORE, FEWER = replace(OURS, n_requests=21, n_tokens=800), replace(OURS, n_tokens=900)


@pytest.mark.parametrize(
    ("received", "why"),
    [
        (MORE, "22 requests and 811 tokens, this run received 21 and 800: it served others"),
        (replace(OURS, n_tokens=810), "it served others meanwhile"),
        (FEWER, "not all of its workers are counted"),
        (replace(OURS, most=7), "8 requests in work, the run at most 7"),
        (replace(OURS, n_broken=1), "cannot be told from what it did for others"),
    ],
)
def test_a_server_that_served_others_is_noticed(
    tmp_path: Path, received: Received, why: str
) -> None:
    found = of_vllm(tmp_path, received)
    assert found.counters is None
    assert why in found.why_not


def test_without_a_limit_any_number_may_be_in_work(tmp_path: Path) -> None:
    assert of_vllm(tmp_path, replace(OURS, most=None)).counters is not None


def text(
    drafts: float,
    accepted: float,
    *,
    finished: float = 0,
    generated: float = 0,
    running: float = 0,
    engine: int = 0,
    model: str = "m",
    born: float = 1000.0,
) -> str:
    """Made-up metrics of one vLLM engine; one position, so that `accepted` <= `drafts`."""
    labels = f'engine="{engine}",model_name="{model}"'
    return (
        f"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {born}\n"
        + with_kinds(labels, {
            "spec_decode_num_drafts_total": drafts, "spec_decode_num_draft_tokens_total": drafts,
            "spec_decode_num_accepted_tokens_total": accepted,
            "generation_tokens_total": generated, "request_success_total": finished,
        })
        + "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        + f'{{{labels},position="0"}} {accepted}\n'
        + f"vllm:num_requests_running{{{labels}}} {running}\n"
    )  # fmt: skip


def with_kinds(labels: str, values: dict[str, float]) -> str:
    return "".join(
        f"# TYPE vllm:{name} counter\nvllm:{name}{{{labels}}} {value}\n"
        for name, value in values.items()
    )


BEFORE = text(100, 50, finished=10, generated=500)
AFTER = text(130, 70, finished=14, generated=580)
FOUR = Received(n_requests=4, n_tokens=80, most=4)
GAINED = EngineCounters(30, 30, 20, (20,))


def of(
    directory: Path, *scrapes: tuple[float, str | Exception], received: Received = FOUR,
    start_s: float = 1, end_s: float = 9, model: str | None = "m",
) -> ServerReading:  # fmt: skip
    table = table_of(directory, scrapes)
    return read(table, 0, int(start_s * S), int(end_s * S), received, model)


def test_scrapes_from_just_before_to_the_last_after_are_what_counts(tmp_path: Path) -> None:
    """The warm-up is over before the first, a scrape that failed tells nothing, and what was
    counted a moment late is in the last."""
    late = text(129, 69, finished=13, generated=579)
    gone = ConnectionError("gone")
    found = of(tmp_path, (0, text(0, 0)), (0.5, BEFORE), (5, gone), (9.1, late), (9.4, AFTER))
    assert (found.counters, found.n_scrapes, found.n_failed) == (GAINED, 5, 1)


@pytest.mark.parametrize(
    ("scrapes", "why"),
    [
        ([(0, BEFORE), (5, AFTER)], "no scrape from after the last request"),
        ([(0, BEFORE), (9.5, ConnectionError("gone"))], "no scrape from after the last request"),
        ([(0.995, BEFORE), (9.5, AFTER)], "no scrape from before the first request"),
        ([], "no metrics were scraped"),
        ([(0, "up_time 3\n"), (9.5, "up_time 12\n")], "no counter that is known"),
        ([(0, BEFORE), (4, text(3, 1)), (9.5, AFTER)], "began anew"),
        ([(0, BEFORE), (9.5, text(130, 70, finished=14, generated=580, born=1007))], "began anew"),
        ([(0, BEFORE), (4, "other 1\n"), (9.5, AFTER)], "began anew"),
        (
            [(0, text(100, 50, finished=10, generated=500, running=2)), (9.5, AFTER)],
            "2 request(s) in work at the start: it served others",
        ),
    ],
)
def test_what_spoils_the_counters(
    tmp_path: Path, scrapes: list[tuple[float, str | Exception]], why: str
) -> None:
    found = of(tmp_path, *scrapes)
    assert found.counters is None
    assert why in found.why_not


def test_a_session_that_did_not_end_has_none(tmp_path: Path) -> None:
    table = table_of(tmp_path, [(0, BEFORE), (9.5, AFTER)])
    assert "did not end" in read(table, 0, S, None, FOUR).why_not
    assert "no metrics" in read(table, 1, S, 9 * S, FOUR).why_not  # of another session


def both(first: str, second: str) -> str:
    kinds = [line for line in second.splitlines() if not line.startswith(("#", "process"))]
    return first + "\n".join(kinds) + "\n"


def test_engines_of_a_server_are_summed_and_other_models_left_out(tmp_path: Path) -> None:
    scrapes = [
        (0, both(BEFORE, text(7, 3, engine=1, finished=1, generated=9))),
        (9.5, both(AFTER, text(17, 9, engine=1, finished=3, generated=49))),
    ]
    (tmp_path / "engines").mkdir()
    found = of(tmp_path / "engines", *scrapes, received=Received(6, 120, most=6))
    assert found.counters == EngineCounters(40, 40, 26, (26,))
    (tmp_path / "models").mkdir()
    scrapes = [
        (0, both(BEFORE, text(7, 3, model="other"))),
        (9.5, both(AFTER, text(9, 4, model="other"))),
    ]
    assert of(tmp_path / "models", *scrapes).counters == GAINED
    (tmp_path / "none").mkdir()
    found = of(tmp_path / "none", *scrapes, model="third")
    assert found.counters is None
    assert "none of them third" in found.why_not


def test_a_single_model_may_be_asked_by_another_name(tmp_path: Path) -> None:
    assert of(tmp_path, (0, BEFORE), (9.5, AFTER), model="an alias").counters == GAINED


def test_workers_at_several_addresses_are_summed_if_all_were_read(tmp_path: Path) -> None:
    table_of(
        tmp_path,
        [(0, BEFORE), (5, text(110, 60, finished=10, generated=500, running=3)), (9.5, AFTER)],
    )
    other = [
        (0, text(0, 0)),
        (5, text(1, 1, running=2)),
        (9.5, text(10, 5, finished=2, generated=20)),
    ]
    table = table_of(tmp_path, other, source=1)
    found = read(table, 0, S, 9 * S, Received(6, 100, most=5), "m")
    assert (found.counters, found.most_running) == (EngineCounters(40, 40, 25, (25,)), 5)
    late = pc.and_(pc.equal(table["source"], 1), pc.greater(table["time_ns"], 9 * S))
    lost = table.filter(pc.invert(late))
    assert "after the last" in read(lost, 0, S, 9 * S, Received(6, 100), "m").why_not


def test_tensorrt_llm_counts_drafts_as_drafted_first_tokens(tmp_path: Path) -> None:
    """Its counters by position appear when they first count."""

    def trt(drafted: Sequence[int], accepted: Sequence[int], done: int, tokens: int) -> str:
        lines = [f'trtllm_generation_tokens_total{{model_name="m"}} {tokens}',
                 f'trtllm_request_success_total{{model_name="m",finished_reason="length"}} {done}',
                 'trtllm_spec_decode_acceptance_length{model_name="m"} 1.75']  # fmt: skip
        for name, values in (("drafted", drafted), ("accepted", accepted)):
            lines += [
                f'trtllm_spec_decode_{name}_tokens_total{{model_name="m",token_position="{k}"}} {v}'
                for k, v in enumerate(values)
            ]
        return "\n".join(lines) + "\n"

    found = of(tmp_path, (0, trt([], [], 1, 9)), (9.5, trt([40, 40, 40], [30, 20], 5, 89)))
    assert found.counters == EngineCounters(40, 0, 50, (30, 20))
    assert [(one.name, one.lowest, one.highest) for one in found.gauges] == [
        ("trtllm_spec_decode_acceptance_length", 1.75, 1.75)
    ]


def test_counters_that_contradict_one_another_are_not_used(tmp_path: Path) -> None:
    wrong = AFTER.replace('position="0"} 70', 'position="0"} 71')
    found = of(tmp_path, (0, BEFORE), (9.5, wrong))
    assert found.counters is None
    assert "do not add up" in found.why_no_al


# ---------------------------------------------------------------- the process


@contextmanager
def serving(answers: dict[str, list[tuple[int, str, str]]]) -> Iterator[str]:
    """A server whose paths answer (status, content type, text), one after the other; the last one
    again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            left = answers.get(self.path, [(404, "text/plain", "")])
            status, kind, body = left.pop(0) if len(left) > 1 else left[0]
            raw = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def plain(*texts: str) -> list[tuple[int, str, str]]:
    return [(200, "text/plain; version=0.0.4", one) for one in texts]


def test_the_scraper_has_scrapes_from_before_and_after(tmp_path: Path) -> None:
    with serving({"/metrics": plain(BEFORE, BEFORE, BEFORE, AFTER)}) as url:
        with Scraper(tmp_path, server=f"{url}/v1", addresses=(), session=0) as scraper:
            start_ns = time.monotonic_ns()
            end_ns = time.monotonic_ns()
        assert (scraper.why_not, scraper.sources) == ("", (f"{url}/metrics",))
    found = read(store.load_server_metrics(tmp_path), 0, start_ns, end_ns, FOUR, "m")
    assert found.counters == GAINED


def test_json_is_no_prometheus_text_and_the_other_place_is_looked_at(tmp_path: Path) -> None:
    """What trtllm-serve has at /metrics are the iterations since the last who asked."""
    answers = {
        "/metrics": [(200, "application/json", '[{"iter": 1}]')],
        "/prometheus/metrics": plain(BEFORE),
    }
    with serving(answers) as url, Scraper(tmp_path, server=url, addresses=(), session=0) as scraper:
        pass
    assert scraper.sources == (f"{url}/prometheus/metrics",)


def test_a_server_without_metrics_costs_the_metrics_only(tmp_path: Path) -> None:
    with (
        serving({"/metrics": [(401, "text/plain", "")]}) as url,
        Scraper(tmp_path, server=url, addresses=(), session=0) as scraper,
    ):
        pass
    assert f"{url}/metrics answered 401; {url}/prometheus/metrics answered 404" in scraper.why_not
    with Scraper(tmp_path, server=url, addresses=(), session=0) as scraper:
        pass
    assert "did not answer" in scraper.why_not
    assert store.load_server_metrics(tmp_path).num_rows == 0


def test_named_addresses_are_all_scraped_and_their_keys_are_not_stored(tmp_path: Path) -> None:
    with serving({"/one": plain(BEFORE), "/two?token=SECRET": plain(BEFORE)}) as url:
        named = f"{url}/one, {url}/two?token=SECRET"
        addresses = server_metrics.addresses_of(named)
        with Scraper(tmp_path, server=url, addresses=addresses, session=3) as scraper:
            pass
    assert scraper.sources == (f"{url}/one", f"{url}/two")
    rows = store.load_server_metrics(tmp_path).to_pylist()
    assert {row["source"] for row in rows} == {0, 1}
    assert {row["session"] for row in rows} == {3}
    assert "SECRET" not in json.dumps(rows)
    assert shown("https://a:b@h:1/m?k=v#f") == "https://h:1/m"


def test_scraping_goes_on_until_what_is_counted_has_settled() -> None:
    """Servers count a moment after they have sent; what a scrape itself changes does not matter."""
    left = [BEFORE, text(101, 50), AFTER, AFTER + "http_requests_total 9\n", AFTER]

    def ask(source: int, _address: str) -> Scrape:
        return Scrape(source, 0, 0, parse(left.pop(0)))

    assert len(settled(["http://a/metrics"], ask)) == 4
    assert left == [AFTER]
    left = [BEFORE, *(text(n, 0) for n in range(99))]
    assert len(settled(["http://a/metrics"], ask, within_s=0.0)) == 1


def test_only_the_ends_hold_buckets(tmp_path: Path) -> None:
    one = Scrape(0, 1, 1, parse(recorded(VLLM / "during.txt.gz")))
    names = {sample.name for sample in server_metrics._without_buckets(one).samples}
    assert "vllm:time_to_first_token_seconds_sum" in names
    assert not any(name.endswith("_bucket") for name in names)
    assert any(sample.name.endswith("_bucket") for sample in one.samples)


# ---------------------------------------------------------------- the report


def served_run(directory: Path, **told: object) -> store.Run:
    """A run of 4 requests with 80 tokens that asked a server."""
    records = [builders.conversation(f"c{i}", "a", [1, 2, 2, 15]) for i in range(4)]
    entry = {
        **builders.session(0, started_ns=S, ended_ns=9 * S),
        "counters": None,
        "server_metrics": {"sources": ["http://h/metrics"], "why_not": ""},
        **told,
    }  # fmt: skip
    server = {"engine": "OPENAI", "url": "http://h:1", "model": "m", "concurrency": 4}
    return builders.stored(
        directory, records, sessions=[entry], config={**server, "model_dir": None}, draft_length=14
    )


def shown_of(run: store.Run) -> str:
    return markdown.write(layout_server.of_served(served([Arm("arm", (run,))])))


def test_the_report_names_whose_word_it_is_and_what_the_counters_say(tmp_path: Path) -> None:
    run = served_run(tmp_path / "run")
    table_of(run.directory, [(0.5, BEFORE), (9.5, AFTER)])
    [one] = served([Arm("arm", (run,))])
    assert one.al_counters.value == 1 + 20 / 30
    assert one.reading.counters == GAINED
    assert (one.n_requests, one.n_tokens, one.acceptance_from, one.agree) == (4, 80, (), None)
    page = shown_of(run)
    assert "1.6667 from vLLM" in page
    assert "20 accepted / 30 drafts" in page
    assert "the server counted 4 and 80, this run received 4 and 80" in page
    assert "vllm:num_requests_running" in page


def test_the_report_says_why_there_is_no_number(tmp_path: Path) -> None:
    run = served_run(tmp_path / "run")
    table_of(run.directory, [(0.5, BEFORE), (9.5, text(130, 70, finished=15, generated=600))])
    page = shown_of(run)
    assert "15 requests and 100 tokens" not in page  # what it gained is told
    assert "counted 5 requests and 100 tokens, this run received 4 and 80" in page
    told = {"server_metrics": {"sources": [], "why_not": "--no_server_metrics was given"}}
    assert "--no_server_metrics was given" in shown_of(served_run(tmp_path / "other", **told))


@pytest.mark.parametrize(
    ("server", "hint"),
    [
        ("vLLM", ": start vLLM with --per-request-spec-decode-metrics detailed; chunks"),
        ("SGLang", ": use an SGLang whose requests take return_spec_tokens_details; chunks"),
        ("not told", "the responses tell none; chunks"),
    ],
)
def test_what_makes_a_server_tell_is_said_of_that_server(
    tmp_path: Path, server: str, hint: str
) -> None:
    records = [builders.conversation("c", "a", [1, 2], engine_steps=[0, 0])]
    config = {"engine": "OPENAI", "url": "http://h:1", "model": "m"}
    run = builders.stored(
        tmp_path / "run", records, config=config, engine={"settings": {"server": server}}
    )
    [one] = served([Arm("arm", (run,))])
    assert hint in one.why_no_acceptance


def test_a_summary_gives_the_reason_that_was_stored(tmp_path: Path) -> None:
    run = served_run(tmp_path / "run", why_no_counters="it served others meanwhile")
    assert summarize(run).lengths["al_engine"].why_not == "it served others meanwhile"


def test_an_embedded_run_says_nothing_of_servers(tmp_path: Path) -> None:
    run = builders.stored(tmp_path / "run", [builders.conversation("c", "a", [1, 2])])
    assert served([Arm("arm", (run,))]) == ()
    assert shown_of(run).strip() == ""


def test_a_server_that_served_others_is_warned_of(tmp_path: Path) -> None:
    why = "the server counted 5, this run received 4: it served others meanwhile"
    run = served_run(tmp_path / "run", why_no_counters=why, served_others=True)
    told = [one for one in all_checks(run) if why in one.sentence]
    assert [(one.level, "of a shared server" in one.sentence) for one in told] == [
        ("warning", True)
    ]
    other = served_run(tmp_path / "other", why_no_counters="it has none", served_others=False)
    assert [one.level for one in all_checks(other) if "it has none" in one.sentence] == ["note"]


# ---------------------------------------------------------------- a run


def run_against(directory: Path, *scrapes: str) -> dict[str, object]:
    """The manifest's entry of a run of two requests with 16 tokens each. The first scrape is the
    adapter's."""
    with http_server.started() as server, serving({"/worker": plain(*scrapes)}) as metrics:
        words = (
            f"run --engine OPENAI --url {server.url} --metrics_url {metrics}/worker --model m "
            "--dataset random --random_isl 8 --num_requests 2 --output_length 16 --concurrency 2 "
            "--speculative_algorithm EAGLE3 "
            f"--warmup 1 --save_dir {directory}"
        )
        assert main(words.split()) == 0
    entry: dict[str, object] = json.loads((directory / "manifest.json").read_text())["sessions"][0]
    return entry


def test_a_run_keeps_the_counters_of_its_server(tmp_path: Path) -> None:
    after = text(130, 70, finished=12, generated=532)
    entry = run_against(tmp_path / "run", BEFORE, BEFORE, BEFORE, after)
    assert entry["why_no_counters"] == ""
    assert entry["counters"] == {
        "drafts": 30, "draft_tokens": 30, "accepted": 20, "accepted_per_position": [20],
    }  # fmt: skip
    run = store.load(tmp_path / "run")
    assert summarize(run).lengths["al_engine"].value == 1 + 20 / 30
    # The metrics have one position, so K is 1; --draft_length was left out, so nothing else was
    # asked for.
    assert run.manifest["engine"]["draft_length"] == 1
    assert not any("asked for" in one.sentence for one in all_checks(run))


def test_a_run_whose_server_was_shared_keeps_none(tmp_path: Path) -> None:
    after = text(130, 70, finished=13, generated=548)
    entry = run_against(tmp_path / "run", BEFORE, BEFORE, BEFORE, after)
    assert (entry["counters"], entry["served_others"]) == (None, True)
    rows = store.load_server_metrics(tmp_path / "run").to_pylist()
    assert {row["value"] for row in rows if row["name"] == "vllm:request_success_total"} == {10, 13}
