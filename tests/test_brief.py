"""What a run tells when it has ended: little, with all that is wrong and the place of the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from speedbench.cli import main
from speedbench.report.arms import load_arms
from speedbench.report.blocks import Chart, Facts, Heading, Paragraph, Section, Table
from speedbench.report.brief import brief
from speedbench.report.document import document
from tests.builders import conversation, stored, told, turn

NULL = ("--engine", "NULL", "--random_isl", "8", "--num_requests", "6", "--output_length", "8")


def arm(directory: Path, k: int, n: int = 4) -> Path:
    lengths = [1, *([2, 3] if k else [1] * 5)]
    records = [
        conversation(f"q{i}", "qa", turn(f"q{i}.0", lengths, told=told(lengths, k) if k else None))
        for i in range(n)
    ]
    run = stored(directory, records, draft_length=k, expected={"qa": 5})
    return run.directory


def headings(directories: Sequence[Path]) -> list[str]:
    blocks = list(brief(list(document(load_arms(directories)))))
    assert not any(isinstance(block, Chart | Section) for block in blocks)
    return [block.text for block in blocks if isinstance(block, Heading) and block.level > 1]


def test_one_run_is_told_by_its_main_numbers_and_its_categories(tmp_path: Path) -> None:
    run = arm(tmp_path / "a", 3)
    assert headings([run]) == ["In short", "Acceptance Rate Results"]
    blocks = list(brief(list(document(load_arms([run])))))
    assert sum(isinstance(block, Table) for block in blocks) == 1
    words = " ".join(text for b in blocks if isinstance(b, Facts) for _, text, _ in b.items)
    assert "1 conversation(s) have not been measured yet" in words  # what is wrong is told


def test_two_arms_are_told_by_their_speedup_and_the_verdict_on_outputs(tmp_path: Path) -> None:
    runs = [arm(tmp_path / "a", 0), arm(tmp_path / "b", 3)]
    assert headings(runs) == ["Speedup of EAGLE3 K=3 over the base", "Losslessness"]
    blocks = list(brief(list(document(load_arms(runs)))))
    assert sum(isinstance(block, Table) for block in blocks) == 1
    assert isinstance(blocks[-1], Paragraph)
    assert blocks[-1].text.startswith("EAGLE3 K=3: ")


def test_repeats_of_one_arm_are_told_though_all_about_them_is_folded(tmp_path: Path) -> None:
    runs = [arm(tmp_path / name, 3) for name in ("a", "b")]
    assert headings(runs) == ["Acceptance Rate Results", "Timing, run by run"]


@pytest.mark.parametrize("more", [(), ("--repeat", "2")])
def test_a_run_ends_with_few_lines_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Sequence[str]
) -> None:
    assert main(["run", *NULL, *more, "--save_dir", str(tmp_path / "r")]) == 0
    said = capsys.readouterr()
    assert "Conditional acceptance" not in said.out
    assert len(said.out.splitlines()) < 60
    page = tmp_path / "r" / "report.html"
    assert f"All of it: {page}, or: speedbench report {tmp_path / 'r'}" in said.err
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(tmp_path / "r"), "--format", "json"]) == 0  # a page is no run
    assert len(json.loads(capsys.readouterr().out)["arms"]) == 1


def test_what_is_told_of_a_url_is_the_url(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the folder of this machine's cache that is written first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/far"
    assert main(["run", *NULL, "--save_dir", url]) == 0
    said = capsys.readouterr()
    assert f"All of it: {url}/report.html, or: speedbench report {url}" in said.err
    assert (tmp_path / "far" / "report.html").is_file()
    assert "All of it: " + str(tmp_path / "cache") not in said.err


def test_a_page_that_cannot_be_written_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise ValueError("no page today")

    monkeypatch.setattr("speedbench.report.html.render", broken)
    assert main(["run", *NULL, "--save_dir", str(tmp_path / "r")]) == 0
    assert "no whole report: ValueError: no page today" in capsys.readouterr().err
    assert (tmp_path / "r" / "manifest.json").is_file()
