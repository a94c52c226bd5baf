"""Names from data, through every output: they form no markup, command no terminal, name no file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from speedbench import cli, store
from speedbench.report.blocks import clean
from tests.builders import conversation, manifest, session, write_part
from tests.fuzz.mutate import HOSTILE_NAMES

NAMES = [name for name in HOSTILE_NAMES if name.strip()]
BENIGN = [f"name{i:02d}" for i in range(len(NAMES))]
"""As many: what is made of these differs from what is made of the others in words alone."""


def made(folder: Path, names: Sequence[str], draft_length: int) -> Path:
    """A run whose categories, conversations, engine, paths and sentences have the names."""
    store.create(folder)
    odd = names[6]  # <script>
    about = manifest(
        draft_length=draft_length,
        expected=dict.fromkeys(names, 2),
        config={"model_dir": f"/models/{odd}", "dataset_path": names[1]},
        engine={"version": odd, "settings": {names[5]: names[7]}, "unused": [names[11]]},
        sessions=[session(message=odd, hostname=names[11], started_at=odd)],
        refused=[{"id": odd, "reason": names[7]}],
    )
    about["dataset"] |= {"name": odd, "path": names[8]}
    about["environment"] |= {"cpu": names[10], "packages": {names[6]: names[7]}}
    store.write_manifest(folder, about)
    shapes = ([1, 4, 2, 4], [1, 2, 4]) if draft_length else ([1] * 5, [1] * 4)
    records = [
        conversation(f"{name}{i}", name, shape) for name in names for i, shape in enumerate(shapes)
    ]
    write_part(folder, records)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _both(tmp_path_factory.mktemp("hostile"), NAMES)


@pytest.fixture(scope="module")
def benign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _both(tmp_path_factory.mktemp("benign"), BENIGN)


def _both(folder: Path, names: Sequence[str]) -> Path:
    made(folder / "base", names, 0)
    made(folder / "arm", names, 3)
    return folder


def written(folder: Path, form: str) -> str:
    out = folder / f"out.{form}"
    argv = ["report", str(folder / "base"), str(folder / "arm"), "--format", form]
    assert cli.main([*argv, "--out", str(out)]) == 0
    return out.read_bytes().decode("utf-8")


def refuse_controls(text: str) -> None:
    found = re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert found is None, repr(text[max(0, found.start() - 60) : found.end() + 60])


class Tags(HTMLParser):
    """The page's elements with their attributes' names, and where they lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href")
        ]


def tags(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    return parser


def test_html_has_the_elements_of_a_harmless_page(hostile: Path, benign: Path) -> None:
    page = written(hostile, "html")
    ours, plain = tags(page), tags(written(benign, "html"))
    assert set(ours.found) <= set(plain.found)
    for tag in (("script", ()), ("img", ())):
        assert tag not in ours.found
    for tag in (("h2", ("id",)), ("td", ("class",))):
        assert ours.found.count(tag) == plain.found.count(tag)
    assert all(link.startswith("#") for link in ours.links)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    refuse_controls(page)


def test_markdown_has_the_lines_and_cells_of_a_harmless_one(hostile: Path, benign: Path) -> None:
    text, plain = written(hostile, "markdown"), written(benign, "markdown")
    rows = [[len(re.findall(r"(?<!\\)\|", line)) for line in t.split("\n") if line.startswith("|")]
            for t in (text, plain)]  # fmt: skip
    assert rows[0] == rows[1]
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    refuse_controls(text)


def test_a_terminal_gets_no_command(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(hostile / "base"), str(hostile / "arm")]) == 0
    assert cli.main(["report", str(hostile / "arm"), "--matrix", "table"]) == 0
    seen = capsys.readouterr()
    for text in (written(hostile, "console"), seen.out, seen.err):
        refuse_controls(text)


def test_json_holds_names_as_they_are(hostile: Path) -> None:
    found = json.loads(written(hostile, "json"))
    assert {clean(name) for name in NAMES} <= {clean(text) for text in _texts(found)}
    assert "<script>alert(1)</script>" in set(_texts(found))  # a page escapes, not the data


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


@pytest.mark.parametrize("matrix", [False, True])
def test_csv_has_no_formula_and_no_further_cell(hostile: Path, matrix: bool) -> None:
    if matrix:
        out = hostile / "matrix.csv"
        argv = ["report", str(hostile / "arm"), "--matrix", "csv", "--out", str(out)]
        assert cli.main(argv) == 0
        text = out.read_text(encoding="utf-8")
    else:
        text = written(hostile, "csv")
    header, *rows = csv.reader(io.StringIO(text))
    assert rows
    assert {len(row) for row in rows} == {len(header)}
    for cell in [*header, *(cell for row in rows for cell in row)]:
        assert not cell.startswith(("=", "+", "@", "\t", "\r"))
        assert not cell.startswith("-") or float(cell) <= 0
    refuse_controls(text)


def test_junit_and_its_summary_can_be_read(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xml, summary = tmp_path / "gates.xml", tmp_path / "summary.md"
    argv = ["compare", str(hostile / "base"), str(hostile / "arm"), "--gate", "al=-5%"]
    argv += ["--gate", "speedup=-5%", "--junit", str(xml), "--summary", str(summary)]
    code = cli.main(argv)
    assert code in (0, 3, 4), capsys.readouterr().err
    root = ElementTree.fromstring(xml.read_text(encoding="utf-8"))
    assert len(root.findall(".//testcase")) == 2
    assert "<script" not in summary.read_text(encoding="utf-8")
    seen = capsys.readouterr()
    refuse_controls(seen.out + seen.err)


def test_no_name_becomes_a_path(hostile: Path, tmp_path: Path) -> None:
    """All that was written for hostile names lies where it was asked for, under names of ours."""
    for form in ("html", "markdown", "json", "csv", "parquet"):
        argv = ["report", str(hostile / "arm"), "--format", form]
        assert cli.main([*argv, "--out", str(tmp_path / f"r.{form}")]) == 0
    argv = ["report", str(hostile / "arm"), "--format", "specdec_bench", "--out"]
    assert cli.main([*argv, str(tmp_path / "export")]) == 0
    ours = re.compile(r"[A-Za-z0-9_.-]+")
    below = [path for folder in (tmp_path, hostile) for path in folder.rglob("*")]
    assert all(ours.fullmatch(path.name) for path in below)
    assert {path.name for path in tmp_path.iterdir()} == {
        "r.html", "r.markdown", "r.json", "r.csv", "r.parquet", "export"
    }  # fmt: skip
