"""`speedbench compare`: its base, the exit codes, pinned baselines, every form, mistakes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from speedbench.cli import main
from speedbench.cli_compare import GATE_FAILED, INCONCLUSIVE
from speedbench.report import baseline_file, sample
from speedbench.report.arms import load_arms
from tests.builders import MS, S, conversation, counters, session, stored, told, turn

ROOT = Path(__file__).parent.parent
CATEGORIES = ("coding", "qa")
PER_CATEGORY = 12


def arm(
    directory: Path,
    k: int,
    *,
    step_ns: int = 10 * MS,
    seed: int = 0,
    lengths: Sequence[int] = (1, 2, 3, 4),
    dropped: Sequence[str] = (),
    errors: bool = False,
    single: int = 0,
    shard: int | None = None,
    config: dict[str, Any] | None = None,
    **about: Any,
) -> Path:
    """A stored run: in each conversation five rounds of `lengths` in its own order, or as many
    single tokens without drafts; its steps take `step_ns`, give or take 1 %. The first `single`
    conversations are answered with one token. shard: of two, the even rows or the odd ones."""
    rng = random.Random(seed)
    records, n_steps, n_accepted = [], 0, 0
    for c, category in enumerate(CATEGORIES):
        for i in range(PER_CATEGORY):
            name = f"row-{c}-{i}"
            decode = list(lengths) * 5 if k else [1] * (5 * sum(lengths))
            if c == 0 and i < single:
                decode = []
            random.Random(name).shuffle(decode)
            own_ns = int(step_ns * rng.uniform(0.99, 1.01))
            n_steps, n_accepted = n_steps + len(decode), n_accepted + sum(decode) - len(decode)
            shown = [1, *decode]
            last = decode[-1] - 1 if decode else 0
            pairs = told(shown, k, last=last) if k and decode else [(0, 0)] * len(shown)
            record = turn(
                name,
                shown,
                submitted_ns=(c * PER_CATEGORY + i) * 100 * MS,
                step_ns=own_ns,
                told=pairs,
            )
            if name not in dropped and shard in (None, i % 2):
                records.append(conversation(name, category, record))
    found = (
        counters(n_steps + 7 * errors, n_accepted, k)
        if k and not dropped and shard is None
        else None
    )
    # Without counters there is nothing to reconcile, which is a note.
    stamp = session(
        counters=found, started_at=f"2026-01-02T03:04:{seed:02d}+00:00", ended_ns=60 * S
    )
    stored(
        directory,
        records,
        draft_length=k,
        sessions=[stamp],
        expected=dict.fromkeys(CATEGORIES, PER_CATEGORY // (1 if shard is None else 2)),
        config=config or ({} if shard is None else {"shard": f"{shard}/2"}),
        **about,
    )
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, base2: repeats without drafts; spec: AL 2.5 with steps 1.25 times as long; worse: of
    the same configuration, with AL 2."""
    folder = tmp_path_factory.mktemp("runs")
    arm(folder / "base", 0, seed=1)
    arm(folder / "base2", 0, seed=2)
    arm(folder / "spec", 3, seed=3, step_ns=12_500_000)
    arm(folder / "spec2", 3, seed=4, step_ns=12_500_000)
    arm(folder / "worse", 3, seed=5, step_ns=12_500_000, lengths=(1, 1, 3, 3))
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["compare", *map(str, arguments)])
    found = capsys.readouterr()
    return code, found.out, found.err


def found_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = said(capsys, *arguments, "--format", "json")
    assert err == ""
    assert code in (0, GATE_FAILED, INCONCLUSIVE)
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(document, dict)
    return document


def overall_of(document: dict[str, Any], i: int = 0) -> dict[str, Any]:
    found = document["arms"][i]["comparison"]["overall"]
    assert isinstance(found, dict)
    return found


# --- the comparison -------------------------------------------------------------------------------


def test_json_has_the_known_ratios(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = found_json(capsys, runs / "base", runs / "spec")
    assert document["schema"] == "speedbench.comparison/1"
    assert document["outcome"] is None
    overall = overall_of(document)
    assert overall["n_pairs"] == 24
    assert overall["al"]["value"] == pytest.approx(2.5)
    assert overall["al_ratio"]["value"] == pytest.approx(2.5)
    # 2.5 tokens a step, steps 1.25 times as long, give or take 1 % each.
    assert overall["user_tps"]["value"] == pytest.approx(2.0, rel=0.01)
    assert overall["step_time"]["value"] == pytest.approx(1.25, rel=0.01)
    lossless = document["arms"][0]["lossless"]
    assert lossless["method"] == "identical"
    assert (lossless["overall"]["n_identical"], lossless["overall"]["n_compared"]) == (24, 24)
    assert document["base"]["from"] == [str(runs / "base")]


def test_repeats_of_the_base_join_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = found_json(capsys, runs / "base", runs / "base2", runs / "spec")
    assert document["base"]["from"] == [str(runs / "base"), str(runs / "base2")]
    assert [one["from"] for one in document["arms"]] == [[str(runs / "spec")]]
    lossless = document["arms"][0]["lossless"]
    assert lossless["overall"]["n_compared"] == 48
    assert lossless["overall"]["floor"]["value"] == 1


def test_of_one_folder_the_baseline_is_the_base(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("spec", "base"):
        shutil.copytree(runs / name, tmp_path / "both" / name)
    document = found_json(capsys, tmp_path / "both")
    assert document["base"]["from"] == [str(tmp_path / "both" / "base")]
    assert overall_of(document)["al_ratio"]["value"] == pytest.approx(2.5)


def test_a_speculative_base_is_one_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same configuration before and after a change of the engine's code."""
    document = found_json(capsys, runs / "spec", runs / "worse")
    overall = overall_of(document)
    assert overall["al_base"]["value"] == pytest.approx(2.5)
    assert overall["al_ratio"]["value"] == pytest.approx(2.0 / 2.5)


def test_two_runs_alike_are_held_against_each_other(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = found_json(capsys, runs / "base", runs / "base2")
    assert document["base"]["from"] == [str(runs / "base")]
    assert [one["from"] for one in document["arms"]] == [[str(runs / "base2")]]
    assert document["arms"][0]["label"] != document["base"]["label"]


def test_two_folders_of_repeats_alike_are_held_against_each_other(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after a change, twice each: no run of before is on the side of after."""
    for i, name in enumerate(("spec", "spec2")):
        shutil.copytree(runs / name, tmp_path / "before" / name)
        arm(tmp_path / "after" / name, 3, seed=50 + i, step_ns=12_500_000, lengths=(1, 1, 3, 3))
    document = found_json(capsys, tmp_path / "before", tmp_path / "after")
    assert document["base"]["from"] == [str(tmp_path / "before" / n) for n in ("spec", "spec2")]
    (other,) = document["arms"]
    assert other["from"] == [str(tmp_path / "after" / n) for n in ("spec", "spec2")]
    assert overall_of(document)["al_ratio"]["value"] == pytest.approx(2.0 / 2.5)


def both_arms(folder: Path, seed: int, *, lengths: tuple[int, ...] = (), n: int = 2) -> Path:
    """A folder as --baseline --repeat writes it; steps of `spec` are 1.25 times as long."""
    changed: dict[str, Any] = {"lengths": lengths} if lengths else {}
    for i in range(1, n + 1):
        arm(folder / f"baseline-{i}", 0, seed=seed + i)
        arm(folder / f"speculative-{i}", 3, seed=seed + 20 + i, step_ns=12_500_000, **changed)
    (folder / "sweep.json").write_text("{}")
    return folder


def test_of_two_folders_with_both_arms_the_drafters_are_held_against_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A nightly run: the same configuration, before and after. AL 2.5 became 2.0."""
    old = both_arms(tmp_path / "old", 1)
    new = both_arms(tmp_path / "new", 5, lengths=(1, 1, 3, 3))
    document = found_json(capsys, old, new, "--gate", "al=-1%")
    assert document["base"]["from"] == [str(old / f"speculative-{i}") for i in (1, 2)]
    (other,) = document["arms"]
    assert other["from"] == [str(new / f"speculative-{i}") for i in (1, 2)]
    assert overall_of(document)["al_ratio"]["value"] == pytest.approx(2.0 / 2.5)
    assert document["outcome"] == "fail"
    code, out, _ = said(capsys, old, new, "--gate", "al=-1%")
    assert code == GATE_FAILED
    assert "Not compared here: baseline, old" in out


def test_of_a_folder_with_several_drafters_the_base_is_asked_for(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = both_arms(tmp_path / "old", 1)
    arm(old / "other-1", 2, seed=31)
    code, out, err = said(capsys, old, runs / "spec")
    assert (code, out) == (2, "")
    assert "holds 3 arms" in err
    assert "2 of them that speculate: name the runs of the base first" in err


def test_of_runs_named_one_by_one_the_first_is_the_base_whatever_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Swapped by mistake: it is done as it was said, and told."""
    folder = both_arms(tmp_path / "old", 1, n=1)
    code, out, _ = said(capsys, folder / "speculative-1", folder / "baseline-1")
    assert code == 0
    assert "the base speculates and the arm does not" in " ".join(out.split())
    code, out, _ = said(capsys, folder / "baseline-1", folder / "speculative-1")
    assert "the base speculates" not in out


def test_of_a_folder_the_drafter_is_pinned_and_held_against_the_pin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = both_arms(tmp_path / "old", 1)
    new = both_arms(tmp_path / "new", 5, lengths=(1, 1, 3, 3))
    code, out, _ = said(capsys, old, "--pin", tmp_path / "old.json")
    assert code == 0
    assert "Not pinned: baseline" in out
    document = found_json(capsys, new, "--baseline-file", tmp_path / "old.json", "--gate", "al=-1%")
    assert [one["from"] for one in document["arms"]] == [
        [str(new / f"speculative-{i}") for i in (1, 2)]
    ]
    assert document["outcome"] == "fail"


def test_shards_are_merged(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [arm(tmp_path / f"base{i}", 0, seed=20 + i, shard=i) for i in (0, 1)]
    spec = [arm(tmp_path / f"spec{i}", 3, seed=30 + i, shard=i) for i in (0, 1)]
    document = found_json(capsys, "--merge", *base, "--merge", *spec)
    overall = overall_of(document)
    assert overall["n_pairs"] == 24
    assert overall["al_ratio"]["value"] == pytest.approx(2.5)
    assert document["arms"][0]["lossless"]["overall"]["n_identical"] == 24


# --- gates ----------------------------------------------------------------------------------------


def run_compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "speedbench", "compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        check=False,
    )


@pytest.mark.parametrize(
    ("gates", "code", "word"),
    [
        (["al=-1%", "al[coding]=-3%", "speedup=-2%", "step_time=+30%"], 0, "PASSED"),
        (["al=-1%", "step_time=+5%"], GATE_FAILED, "FAILED"),
        (["lossless=-1%", "al=-1%"], INCONCLUSIVE, "INCONCLUSIVE"),  # 24 rows are too few
        (["lossless=-1%", "step_time=+5%", "al=-1%"], GATE_FAILED, "FAILED"),
        (["al=-1", "al=-1%"], 2, ""),
    ],
)
def test_exit_codes_of_the_command(runs: Path, gates: Sequence[str], code: int, word: str) -> None:
    flags = [part for gate in gates for part in ("--gate", gate)]
    two_rounds = [runs / name for name in ("base", "base2", "spec", "spec2")]
    done = run_compare(*two_rounds, *flags)
    assert done.returncode == code, done.stdout + done.stderr
    assert word in done.stdout
    assert (len(done.stderr.splitlines()) == 1) == (code == 2)


def test_without_a_gate_it_succeeds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, runs / "spec", runs / "worse")[0] == 0


def test_a_worse_acceptance_fails_and_equivalence_holds(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, spec2, worse = (runs / name for name in ("spec", "spec2", "worse"))
    assert said(capsys, spec, worse, "--gate", "al=-10%")[0] == GATE_FAILED
    assert said(capsys, spec, worse, "--gate", "al=-25%")[0] == 0
    # Two runs with the very same steps: acceptance is alike to the last digit, times are not.
    assert said(capsys, spec, spec2, "--gate", "al=+-0%")[0] == 0


@pytest.mark.parametrize("metric", ["speedup", "step_time", "output_tps"])
def test_times_of_one_run_each_answer_no_gate(
    runs: Path, metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = found_json(capsys, runs / "base", runs / "spec", "--gate", f"{metric}=+-99%")
    (gate,) = document["arms"][0]["gates"]
    assert gate["outcome"] == "inconclusive"
    assert "--repeat" in gate["why"]
    assert gate["change"]["value"] is not None


@pytest.mark.parametrize("name", ["coding", "qa"])
def test_a_gate_of_one_category(runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = found_json(capsys, runs / "spec", runs / "worse", "--gate", f"al[{name}]=-1%")
    (gate,) = document["arms"][0]["gates"]
    assert (gate["gate"]["category"], gate["outcome"]) == (name, "fail")
    assert gate["change"]["value"] == pytest.approx(-0.2)
    assert document["outcome"] == "fail"


def test_records_that_cannot_be_right_pass_no_gate(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine's counters do not reconcile."""
    wrong = arm(tmp_path / "wrong", 3, seed=6, errors=True)
    code, out, _ = said(capsys, runs / "base", wrong, "--gate", "al=-1%")
    assert code == INCONCLUSIVE
    assert "unexplained" in " ".join(out.split())


def test_simulated_runs_pass_no_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--engine", "NULL", "--random_isl", "4", "--num_requests", "12",
              "--output_length", "30", "--concurrency", "2")  # fmt: skip
    spec = ("--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", "d")
    assert main(["run", *common, "--save_dir", str(tmp_path / "base")]) == 0
    assert main(["run", *common, *spec, "--save_dir", str(tmp_path / "spec")]) == 0
    capsys.readouterr()
    code, out, _ = said(capsys, tmp_path / "base", tmp_path / "spec", "--gate", "al=-1%")
    assert code == INCONCLUSIVE
    assert "SIMULATED" in out


def test_what_every_run_answers_with_one_token_is_not_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No time passes in it, in any run; where one run alone does so, its arm is to be doubted."""
    for name, k, short in (("base", 0, 1), ("spec", 3, 1), ("odd", 2, 2)):
        folder = arm(tmp_path / name, k, seed=k, lengths=(1, 2, 3), single=short)
        assert (folder / "manifest.json").is_file()
    gate = ("--gate", "al=-1%")
    assert said(capsys, tmp_path / "base", tmp_path / "spec", *gate)[0] == 0
    code, out, _ = said(capsys, tmp_path / "base", tmp_path / "odd", *gate)
    assert code == INCONCLUSIVE
    assert re.search(r"1 of 11 conversations of\s.*category coding are in", out)


def test_missing_conversations_pass_no_gate(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = arm(tmp_path / "fewer", 3, seed=7, dropped=("row-0-3",))
    code, out, _ = said(capsys, runs / "base", fewer, "--gate", "al=-1%", "--format", "markdown")
    assert code == INCONCLUSIVE
    assert "1 of 12 conversations of category coding" in out


# --- files ----------------------------------------------------------------------------------------


def test_junit_is_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gate.xml"
    arguments = (runs / "spec", runs / "worse", "--gate", "al=-25%", "--gate", "al=-1%",
                 "--gate", "output_tps=-1%", "--junit", file)  # fmt: skip
    assert said(capsys, *arguments)[0] == GATE_FAILED
    root = ElementTree.parse(file).getroot()
    assert {name: root.attrib[name] for name in ("tests", "failures")} == {
        "tests": "3",
        "failures": "1",
    }
    outcomes = [[child.tag for child in case] for case in root.iter("testcase")]
    assert outcomes == [["system-out"], ["failure"], ["skipped"]]


def test_the_summary_is_appended(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "summary.md"
    file.write_text("before\n")
    said(capsys, runs / "base", runs / "spec", "--gate", "al=-1%", "--summary", file)
    text = file.read_text()
    assert text.startswith("before\n")
    assert "| al | pass |" in text


def test_markdown_puts_the_gates_on_top(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(
        capsys, runs / "base", runs / "spec", "--gate", "al=-1%", "--format", "markdown"
    )
    assert code == 0
    headings = [line for line in out.splitlines() if line.startswith("#")]
    assert headings[0].startswith("# ")
    assert headings[1] == "## Gate"
    assert "## Losslessness" in headings
    row = next(line for line in out.splitlines() if line.startswith("| al |"))
    assert "+150.00 %" in row
    assert "-1 %" in row


@pytest.mark.parametrize("form", ["console", "markdown", "json", "html"])
def test_out_takes_every_form(
    runs: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report"
    code, out, _ = said(
        capsys, runs / "base", runs / "spec", "--gate", "al=-1%", "--format", form, "--out", file
    )
    assert (code, out) == (0, "")
    text = file.read_text()
    assert {"html": "<!doctype html", "json": '"schema"'}.get(form, "PASSED").lower() in (
        text.lower()
    )
    assert list(tmp_path.iterdir()) == [file]


# --- pinned baselines -----------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--baseline_file", "--baseline-file"])
def test_a_pinned_base_gives_the_same_comparison(
    runs: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "base.json"
    code, out, _ = said(capsys, "--pin", file, runs / "base", runs / "base2")
    assert code == 0
    assert "2 run(s) of 24 conversations" in out
    gates = ("--gate", "al=-1%", "--gate", "speedup=-1%")
    pinned = found_json(capsys, runs / "spec", runs / "spec2", flag, file, *gates)
    live = found_json(capsys, runs / "base", runs / "base2", runs / "spec", runs / "spec2", *gates)
    # Labels tell arms of one report apart, which a pinned base is not among.
    for one in (*live["arms"], *pinned["arms"]):
        one.pop("label")
        for gate in one["gates"]:
            gate.pop("arm")
    of_live, of_pinned = (one["arms"][0]["lossless"] for one in (live, pinned))
    assert of_live.pop("positions")["why_not"] == ""
    of_pinned.pop("positions")
    of_live.pop("floor_positions")
    of_pinned.pop("floor_positions")
    assert pinned["arms"] == live["arms"]
    assert pinned["base"]["file"] == str(file)


def test_a_pinned_base_needs_no_run_directory(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = shutil.copytree(runs / "base", tmp_path / "gone")
    file = tmp_path / "base.json"
    said(capsys, "--pin", file, gone)
    shutil.rmtree(gone)
    done = run_compare(runs / "spec", "--baseline-file", file, "--gate", "al=-1%")
    assert done.returncode == 0, done.stderr
    assert "24 of 24" in done.stdout


def test_a_pinned_file_reads_back_what_was_written(runs: Path, tmp_path: Path) -> None:
    (found,) = load_arms([runs / "base", runs / "base2"])
    mine = sample.of_arm(found)
    file = tmp_path / "base.json"
    file.write_text(baseline_file.dumps(mine))
    theirs = baseline_file.load(file)
    assert theirs.label == mine.label
    assert theirs.manifest["config"] == mine.manifest["config"]
    assert "argv" not in theirs.manifest["environment"]
    for a, b in zip(mine.runs, theirs.runs, strict=True):
        assert (a.source, a.started, a.checks) == (b.source, b.started, b.checks)
        assert a.output_tps.value == b.output_tps.value
        for name, i in a.measured.place.items():
            j = b.measured.place[name]
            assert a.measured.log_tps[i] == b.measured.log_tps[j]
            assert a.measured.log_step[i] == b.measured.log_step[j]
            assert a.measured.lengths[i].tolist() == b.measured.lengths[j].tolist()
            assert a.measured.asked[name] == b.measured.asked[name]
        assert {k: one.sha256 for k, one in a.answers.items()} == {
            k: one.sha256 for k, one in b.answers.items()
        }


def test_a_pinned_file_has_one_conversation_on_a_line(runs: Path, tmp_path: Path) -> None:
    main(["compare", "--pin", str(tmp_path / "b.json"), str(runs / "spec")])
    lines = (tmp_path / "b.json").read_text().splitlines()
    assert sum(line.startswith('{"id": ') for line in lines) == 24


# --- mistakes -------------------------------------------------------------------------------------

Mistake = Callable[[Path, Path], list[object]]


def copied(runs: Path, tmp: Path) -> list[object]:
    return [runs / "base", shutil.copytree(runs / "base", tmp / "copy"), runs / "spec"]


def of_newer_version(runs: Path, tmp: Path) -> list[object]:
    (tmp / "b.json").write_text('{"schema": "speedbench.baseline/99"}')
    return [runs / "spec", "--baseline-file", tmp / "b.json"]


def of_damaged_file(runs: Path, tmp: Path) -> list[object]:
    main(["compare", "--pin", str(tmp / "b.json"), str(runs / "base")])
    text = (tmp / "b.json").read_text()
    (tmp / "b.json").write_text(text.replace('"log_tps"', '"log_tpz"'))
    return [runs / "spec", "--baseline-file", tmp / "b.json"]


def of_itself(runs: Path, tmp: Path) -> list[object]:
    main(["compare", "--pin", str(tmp / "b.json"), str(runs / "base")])
    return [runs / "base", "--baseline-file", tmp / "b.json"]


def at_temperature(runs: Path, tmp: Path) -> list[object]:
    return [runs / "base", arm(tmp / "warm", 3, seed=8, config={"temperature": 0.7})]


def folder_of_two(runs: Path, tmp: Path) -> list[object]:
    shutil.copytree(runs / "spec", tmp / "both" / "a")
    arm(tmp / "both" / "b", 2, seed=9, lengths=(1, 2))
    return [tmp / "both"]


MISTAKES: dict[str, tuple[Mistake, list[str]]] = {
    "no run": (lambda runs, tmp: [], ["run directory"]),
    "no such run": (lambda runs, tmp: [runs / "base", tmp / "none"], ["none"]),
    "an empty folder": (lambda runs, tmp: [runs / "base", tmp], ["manifest.json"]),
    "one run alone": (lambda runs, tmp: [runs / "base"], ["nothing to compare", "base"]),
    "one run twice": (lambda runs, tmp: [runs / "base", runs / "base"], ["twice"]),
    "a copy of a run": (copied, ["copies of one run", "copy"]),
    "no baseline in the folder": (folder_of_two, ["both", "2 arms", "base first"]),
    "another temperature": (at_temperature, ["temperature", "0.7", "--allow"]),
    "unknown name to allow": (
        lambda runs, tmp: [runs / "base", runs / "spec", "--allow", "temprature"],
        ["temprature", "temperature"],
    ),
    "unknown metric": (
        lambda runs, tmp: [runs / "base", runs / "spec", "--gate", "sped=-1%"],
        ["sped", "speedup"],
    ),
    "unknown category": (
        lambda runs, tmp: [runs / "base", runs / "spec", "--gate", "al[codin]=-1%"],
        ["codin", "coding"],
    ),
    "junit without gate": (
        lambda runs, tmp: [runs / "base", runs / "spec", "--junit", tmp / "x.xml"],
        ["--junit", "--gate"],
    ),
    "junit into nowhere": (
        lambda runs, tmp: [runs / "base", runs / "spec", "--gate", "al=-1%", "--junit",
                           tmp / "no" / "x.xml"],
        ["x.xml"],
    ),
    "pin of two arms": (
        lambda runs, tmp: [runs / "base", runs / "spec", "--pin", tmp / "b.json"],
        ["2 arms"],
    ),
    "pin with a gate": (
        lambda runs, tmp: [runs / "base", "--pin", tmp / "b.json", "--gate", "al=-1%"],
        ["--pin", "--gate"],
    ),
    "pin over a file": (
        lambda runs, tmp: [runs / "base", "--pin", runs / "base" / "manifest.json"],
        ["manifest.json", "already"],
    ),
    "no such baseline file": (
        lambda runs, tmp: [runs / "spec", "--baseline-file", tmp / "b.json"],
        ["b.json", "--pin"],
    ),
    "a manifest as baseline file": (
        lambda runs, tmp: [runs / "spec", "--baseline-file", runs / "base" / "manifest.json"],
        ["no baseline file", "--pin"],
    ),
    "a newer baseline file": (of_newer_version, ["99", "newer"]),
    "a damaged baseline file": (of_damaged_file, ["damaged", "pin the baseline again"]),
    "a run against its own pin": (of_itself, ["copies of one run"]),
    "unknown format": (
        lambda runs, tmp: [runs / "base", runs / "spec", "--format", "pdf"], ["pdf", "markdown"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_one_sentence(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, words = MISTAKES[name]
    arguments = build(runs, tmp_path)
    capsys.readouterr()
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


def test_help_explains_gates_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in ("al=-1%", "step_time=+5%", "exit code 0", "(3)", "(4)", "--baseline_file"):
        assert word in text
