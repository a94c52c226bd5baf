"""The page: it loads nothing, every link leads somewhere, every number is defined, and nothing that
came from the data is markup."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from speedbench import store
from speedbench.report import html
from speedbench.report.arms import load_arms
from speedbench.report.blocks import (
    Axis,
    Block,
    Chart,
    Column,
    Facts,
    Heading,
    Paragraph,
    Section,
    Series,
    Table,
    Verbatim,
)
from speedbench.report.definitions import TERMS, in_order, term_of
from speedbench.report.document import document
from tests.builders import MS, S, conversation, session, stored, told, turn
from tests.test_figures import Linear

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "rect"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    parent: Node | None = None
    children: list[Node | str] = field(default_factory=list)

    def all(self, *tags: str) -> list[Node]:
        """Every element below, in the document's order."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                found += [child] if child.tag in tags or not tags else []
                found += child.all(*tags)
        return found

    def one(self, *tags: str) -> Node:
        (found,) = self.all(*tags)
        return found

    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text() for c in self.children)

    def above(self) -> Iterator[Node]:
        node = self.parent
        while node is not None:
            yield node
            node = node.parent


class Tree(HTMLParser):
    """A strict little parser: every element is closed by its own end tag."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.here = Node("#", {})
        self.feed(source)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> repeats an attribute"
        node = Node(tag, {name: value or "" for name, value in attrs}, self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.here.children.append(Node(tag, {n: v or "" for n, v in attrs}, self.here))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:  # a <path> with a <title> in it
            while self.here.tag != tag and self.here.parent is not None:
                self.here = self.here.parent
            return
        assert self.here.tag == tag, f"</{tag}> ends <{self.here.tag}>"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.children.append(data)


def tree(source: str) -> Node:
    # Marks hold a title, so they are no void elements where they do.
    source = re.sub(
        r"<(path|rect)([^>]*[^/])>(<title>.*?</title>)</\1>", r"<mark\2>\3</mark>", source
    )
    return Tree(source).root


# --- pages ----------------------------------------------------------------------------------------


def run(directory: Path, k: int, *, step_ns: int = 10 * MS, **about: object) -> store.Run:
    """Two slots, two categories; with drafts, decode steps of 1 to 4 tokens."""
    records = []
    for i in range(12):
        lengths = [1, *([1, 2, 3, 4, 1 + i % 4] if k else [1] * 11)]
        record = turn(f"r{i}", lengths, submitted_ns=i * 200 * MS, step_ns=step_ns + i * MS,
                      ttft_ns=(20 + 3 * i) * MS,
                      told=told(lengths, k) if k else [(0, 0)] * len(lengths))  # fmt: skip
        records.append(conversation(f"r{i}", "math" if i % 2 else "coding", record))
    about.setdefault("sessions", [session(ended_ns=4 * S)])
    return stored(directory, records, draft_length=k, **about)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline and two speculative arms; the first of these twice."""
    place = tmp_path_factory.mktemp("runs")
    run(place / "base", 0)
    run(place / "three", 3, step_ns=15 * MS)
    run(place / "again", 3, step_ns=16 * MS)
    run(place / "five", 5, step_ns=18 * MS)
    return place


def pages(folder: Path) -> dict[str, str]:
    return {
        "one run": html.render(document(load_arms([folder / "three"])), "one"),
        "a baseline": html.render(document(load_arms([folder / "base"])), "base"),
        "repeats": html.render(document(load_arms([folder / "three", folder / "again"])), "twice"),
        "four runs": html.render(document(load_arms([folder])), "all"),
        "every block": html.render(every_block(), "every block"),
    }


EVIL = 'co|d<script>alert("1")</script>\x1b[31m&amp;\u202e{{ 7 * 7 }}</svg></style>'


def every_block() -> list[Block]:
    table = Table(
        (Column(EVIL, words=True), Column("AL"), Column(f"{EVIL}\nx", term="al")),
        ((EVIL, "1.0", "2.0"), ("b", EVIL, "n/a")),
        notes=(EVIL,),
        total=True,
        caption=EVIL,
        terms={"b": "al_step"},
    )
    chart = Chart(
        "id with spaces & <signs>",
        EVIL,
        EVIL,
        Axis(EVIL, EVIL, ticks=(EVIL, "b")),
        Axis("AL", "tokens"),
        (
            Series(EVIL, "point", (0, 1), (1.0, 2.0), (0.9, 1.9), (1.1, 2.1), (EVIL, "b")),
            Series("b", "bar", (0, 1), (1.0, 2.0)),
        ),
        table,
        spans=((0, 1, EVIL),),
        reference=1.0,
        horizontal=True,
    )
    inside: tuple[Block, ...] = (Heading("Deep", 3), Heading(EVIL), chart, chart, Paragraph(EVIL))
    return [
        Heading(EVIL, 1),
        Paragraph(EVIL, "error"),
        Facts(((EVIL, EVIL, "warning"), ("TTFT", "1 s", "plain")), {EVIL: "al"}),
        Verbatim((EVIL, "two")),
        Heading("Main"),
        Heading("main", 3),
        table,
        table,
        chart,
        chart,
        Section(EVIL, (*inside, Section("Deeper", inside))),
        Section("Main", ()),
        Heading("A second title", 1),
    ]


@pytest.fixture(scope="module")
def all_pages(folder: Path) -> dict[str, Node]:
    return {name: tree(source) for name, source in pages(folder).items()}


@pytest.fixture(params=["one run", "a baseline", "repeats", "four runs", "every block"])
def page(request: pytest.FixtureRequest, all_pages: dict[str, Node]) -> Node:
    return all_pages[request.param]


# --- it stands alone ------------------------------------------------------------------------------


def test_it_loads_nothing_and_links_only_within_itself(folder: Path) -> None:
    for source in pages(folder).values():
        root = tree(source)
        for node in root.all():
            assert node.tag not in {"script", "link", "iframe", "object", "embed", "img", "base"}
            assert not {"src", "srcset", "xlink:href", "action", "onload"} & node.attributes.keys()
            assert node.attributes.get("href", "#").startswith("#")
            assert not any(name.startswith("on") for name in node.attributes)
        styles = "".join(node.text() for node in root.all("style"))
        assert not re.search(r"url\(|@import|https?:|//", styles)
        (policy,) = (n for n in root.all("meta") if "http-equiv" in n.attributes)
        assert policy.attributes["content"].startswith("default-src 'none'")


def test_ids_are_unique_and_every_reference_leads_to_one(page: Node) -> None:
    ids = [node.attributes["id"] for node in page.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in page.all():
        for name in ("aria-labelledby", "aria-describedby"):
            for id in node.attributes.get(name, "").split():
                assert id in ids
        if node.tag == "a":
            assert node.attributes["href"].removeprefix("#") in ids
            assert node.text().strip()


def test_what_came_from_the_data_is_text(folder: Path) -> None:
    source = pages(folder)["every block"]
    assert "<script" not in source
    assert "\x1b" not in source
    assert "\u202e" not in source
    assert "49" not in tree(source).one("h1").text()
    shown = 'co|d<script>alert("1")</script>&amp;{{ 7 * 7 }}</svg></style>'
    root = tree(source)
    assert root.one("h1").text() == shown
    for tag in ("caption", "th", "td", "dd", "dt", "pre", "p", "figcaption", "summary", "desc"):
        assert any(shown in node.text() for node in root.all(tag)), tag


def test_the_same_blocks_give_the_same_page(folder: Path) -> None:
    assert pages(folder) == pages(folder)


# --- for every reader -----------------------------------------------------------------------------


def test_landmarks_and_headings_are_in_order(page: Node) -> None:
    assert page.one("html").attributes["lang"] == "en"
    assert page.one("head").one("title").text()
    page.one("h1")
    for tag in ("header", "nav", "main", "footer"):
        page.one(tag)
    skip = page.one("body").all("a")[0]
    assert skip.attributes["href"] == "#main"
    assert page.one("main").attributes["id"] == "main"
    levels = [int(node.tag[1]) for node in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    entries = [a.attributes["href"][1:] for a in page.one("nav").all("a")]
    assert entries == [node.attributes["id"] for node in page.all("h2")]


def test_tables_say_what_they_hold_and_what_heads_what(page: Node) -> None:
    assert page.all("table")
    for table in page.all("table"):
        assert table.one("caption").text().strip()
        heads = table.one("thead").all("th")
        assert {head.attributes["scope"] for head in heads} == {"col"}
        for row in table.one("tbody").all("tr"):
            cells = row.all("th", "td")
            assert len(cells) == len(heads)
            assert cells[0].tag == "th"
            assert cells[0].attributes["scope"] == "row"
        box = table.parent
        assert box is not None
        # It scrolls, so that the page need not.
        assert (box.attributes["class"] or "").split()[0] == "scroll"
        assert (box.attributes["tabindex"], box.attributes["role"]) == ("0", "region")
        assert box.attributes["aria-labelledby"] == table.one("caption").attributes["id"]


def test_a_table_that_a_telephone_cuts_off_says_so() -> None:
    """Six columns of numbers are wider than 400 pixels, two are not."""
    cells = tuple(f"{i}.0000-{i}.1000" for i in range(6))
    wide = Table(tuple(Column(f"column {i}") for i in range(6)), (cells,))
    small = Table((Column("a"), Column("b")), (("1", "2"),))
    boxes = [
        node.attributes["class"] or ""
        for node in tree(html.render([Heading("t", 1), wide, small], "t")).all("div")
        if "scroll" in (node.attributes.get("class") or "")
    ]
    assert ["wide" in box.split() for box in boxes] == [True, False]
    assert ".scroll.wide::before{content:" in html.page_css()


def test_a_note_is_said_once_below_one_heading() -> None:
    """And again below the next, and in each part that is folded away."""
    note = "ns: not significant"
    table = Table((Column("a"), Column("b")), (("1", "2"),), (note,))
    part = Section("more", (table, table))
    blocks = [Heading("t", 1), Heading("one"), table, Heading("sub", 3), table, table,
              Heading("two"), table, part]  # fmt: skip
    assert html.render(blocks, "t").count(note) == 3


def test_figures_are_told_and_their_numbers_stand_below(page: Node) -> None:
    for figure in page.all("figure"):
        svg = figure.one("svg")
        assert svg.attributes["role"] == "img"
        ids = {n.attributes["id"]: n.text() for n in svg.all() if "id" in n.attributes}
        title, description = (ids[id] for id in svg.attributes["aria-labelledby"].split())
        assert title == figure.one("figcaption").text()
        assert description.strip()
        assert figure.one("details").one("table").one("tbody").all("tr")
        style = svg.parent
        assert style is figure


def test_every_number_leads_to_its_definition(all_pages: dict[str, Node]) -> None:
    """By the header of its column; counts of runs, which are no measurement, are left."""
    for name, root in all_pages.items():
        if name == "every block":
            continue
        for table in root.all("table"):
            for head in table.one("thead").all("th"):
                if head.attributes.get("class") == "n":
                    assert head.all("a"), (name, head.text())
        linked = {a.attributes["href"] for a in root.one("main").all("a")}
        defined = [node.attributes["id"] for node in root.all("div")
                   if node.attributes.get("id", "").startswith("def-")]  # fmt: skip
        assert {f"#{id}" for id in defined} == linked  # all that is linked, and no more
        lists = [dl for dl in root.all("dl") if dl.attributes["class"] == "facts"]
        facts = {dt.text(): bool(dt.all("a")) for dl in lists for dt in dl.all("dt")}
        for label in ("Output TPS", "Output TPS, steady", "Output TPS/gpu"):
            assert facts.get(label, True)


def test_checks_and_provenance_stand_above_every_number(folder: Path, tmp_path: Path) -> None:
    odd = run(tmp_path / "odd", 3, engine={"max_num_seqs": 1}, status="partial")
    source = html.render(document(load_arms([odd.directory])), "odd")
    main = tree(source).one("main")
    text = main.text()
    assert text.index("at most 1 requests at once") < text.index("Provenance")
    assert text.index("Provenance") < text.index("Acceptance Length Histogram")
    (warning,) = (n for n in main.all("div") if "at most 1 requests" in n.text()
                  and n.attributes.get("class") == "warning")  # fmt: skip
    assert "WARNING" in warning.text()  # not by colour alone
    provenance = next(n for n in main.all("details") if n.attributes.get("class") == "part")
    assert "open" not in provenance.attributes
    assert "fingerprint" in provenance.text()


# --- what is drawn is what the tables say ---------------------------------------------------------


def test_the_drawn_acceptance_lengths_are_those_of_the_tables(all_pages: dict[str, Node]) -> None:
    root = all_pages["one run"]
    (figure,) = (f for f in root.all("figure") if f.attributes["id"] == "al-by-category")
    rows = [[c.text() for c in row.all("th", "td")] for row in figure.one("tbody").all("tr")]
    assert [row[0] for row in rows] == ["coding", "math", "Overall"]
    svg = figure.one("svg")
    words = [t for t in svg.all("text") if "class" not in t.attributes]
    middles = [(float(t.attributes["x"]), t.text()) for t in words
               if t.attributes.get("text-anchor") == "middle"]  # fmt: skip
    scale = Linear(middles[:-1])  # the last one may be moved inwards
    drawn = [float(re.findall(r"[\d.]+", m.attributes["transform"])[0]) for m in svg.all("mark")]
    assert [scale.back(at) for at in drawn] == pytest.approx(
        [float(row[1]) for row in rows], abs=0.01
    )
    whiskers = [re.findall(r"-?[\d.]+", p.attributes["d"]) for p in svg.all("path")
                if p.attributes.get("class") == "whisker"]  # fmt: skip
    found = [(scale.back(float(w[0])), scale.back(float(w[5]))) for w in whiskers]
    assert found == [pytest.approx((float(r[2]), float(r[3])), abs=0.01) for r in rows]
    above = {row.all("th", "td")[0].text(): row.all("th", "td")[2].text()
             for table in root.all("table") if table.one("thead").text().startswith("Categoryn/n")
             for row in table.one("tbody").all("tr")}  # fmt: skip
    assert {row[0]: row[1] for row in rows[:2]}.items() <= above.items()
    assert above["Overall Average"] == rows[2][1]


def charts(blocks: Iterable[Block]) -> Iterator[Chart]:
    for block in blocks:
        if isinstance(block, Section):
            yield from charts(block.blocks)
        elif isinstance(block, Chart):
            yield block


def numbers(cells: Iterable[str]) -> list[float]:
    """Without their signs: the sign of the second one in 1-2 is none."""
    return [float(n) for cell in cells for n in re.findall(r"\d+(?:\.\d+)?", cell)]


def test_every_number_that_is_drawn_is_in_the_table(folder: Path, tmp_path: Path) -> None:
    """Where places have names, in the row of that name. The curve of first divergences alone is
    summed up there by its quantiles."""
    known = {"ok": True, "sentence": "exact.", "overall": 2.25,
             "by_category": {"math": 2.75, "coding": 1.875}}  # fmt: skip
    closed = run(tmp_path / "closed", 3, known_answer=known)
    drawn = [
        *charts(document(load_arms([folder]))),
        *charts(document(load_arms([closed.directory]))),
    ]
    assert len(drawn) > 20
    for chart in drawn:
        if chart.id == "first-divergence":
            continue
        for one in chart.series:
            for i, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
                values = [y, *(v[i] for v in (one.low, one.high) if v)]
                rows = chart.table.rows
                if chart.x.ticks:
                    rows = tuple(row for row in rows if row[0] == chart.x.ticks[int(x)])
                else:
                    values.append(x)
                told = numbers(cell for row in rows for cell in row)
                for value in values:
                    assert math.isnan(value) or any(
                        abs(abs(value) - n) <= 6e-5 * max(1.0, abs(value)) for n in told
                    ), (chart.title, one.label, value)
    (both,) = (c for c in drawn if len(c.series) == 2 and c.series[1].label == "closed form")
    assert both.series[1].y == (1.875, 2.75, 2.25)


def test_every_chart_of_a_run_is_there(all_pages: dict[str, Node]) -> None:
    expected = [
        "histogram", "rates", "al-by-category", "step-time", "ttft", "requests-over-time",
        "tokens-over-time", "output-over-time",
    ]  # fmt: skip
    assert [f.attributes["id"] for f in all_pages["one run"].all("figure")] == expected
    of_base = [f.attributes["id"] for f in all_pages["a baseline"].all("figure")]
    assert of_base == expected[3:]
    for figure in all_pages["one run"].all("figure")[-3:]:
        words = [t.text() for t in figure.one("svg").all("text")]
        assert "steady window" in words
        assert any(word.endswith("(s)") for word in words)


def test_every_scale_has_its_unit(all_pages: dict[str, Node]) -> None:
    """Axis labels are the soft words; of places that are names there is no unit."""
    for name, root in all_pages.items():
        for figure in root.all("figure"):
            labels = [t.text() for t in figure.one("svg").all("text")
                      if "soft" in t.attributes.get("class", "")]  # fmt: skip
            assert len(labels) >= 2
            if name != "every block":
                whole = " ".join(labels)
                assert whole.count("(") >= 1 if "Category" in whole or "Arm" in whole else 2


# --- definitions ----------------------------------------------------------------------------------


def test_words_lead_to_one_definition_each() -> None:
    seen: dict[str, str] = {}
    for term in TERMS.values():
        for words in (term.name.lower(), *term.aliases):
            assert seen.setdefault(words, term.id) == term.id, words
        assert term.text
        assert not term.text.endswith(".")
        assert re.fullmatch(r"[a-z0-9_]+", term.id)
    assert [term.id for term in in_order(["user_tps", "al", "ttft"])] == ["al", "ttft", "user_tps"]


@pytest.mark.parametrize(
    ("words", "term"),
    [
        ("AL", "al"),
        ("Average\nAL", "al"),
        ("TTFT Time\n(ms)", "ttft"),
        ("Request\nGeneration\nTokens Per\nSecond (1/s)", "user_tps"),
        ("Acceptance length (AL)", "al"),
        ("95 % interval", "interval"),
        ("Output TPS/gpu", "output_tps_per_gpu"),
    ],
)
def test_headers_are_found_by_their_words(words: str, term: str) -> None:
    found = term_of(words)
    assert found is not None
    assert found.id == term
    assert term_of("some header of the data") is None
    assert term_of("anything", "al_step") is TERMS["al_step"]


@pytest.mark.parametrize(
    ("words", "id"),
    [
        ("accept_rate", "acceptance_rate"),
        ("Acceptance rate", "acceptance_rate"),
        ("Conditional", "conditional_rate"),
        ("Not told apart\nfrom the best", "not_told_apart"),
        ("Without an\ninterval", "no_interval"),
        ("Next / best", "runner_up"),
        ("Residual", "residual"),
        ("Detectable", "detectable"),
        ("First", "first_divergence"),
        ("Tokens: p", "two_sample"),
        ("Gate", "gate"),
        ("Wilson interval", "wilson"),
    ],
)
def test_names_that_are_alike_mean_what_they_say(words: str, id: str) -> None:
    found = term_of(words)
    assert found is not None
    assert found.id == id


def test_text_forms_show_what_a_page_folds_and_draws() -> None:
    """Without a figure its table, unless its numbers stand elsewhere or are too many to read."""
    from speedbench.report import markdown

    short = Table((Column("Place", words=True), Column("AL")), (("here", "1.2345"),))
    long = replace(short, rows=tuple((f"p{i}", f"{i}.5") for i in range(40)))
    about = Chart("c", "A figure", "It shows 40 numbers.", Axis("x"), Axis("y"), (), short)
    text = markdown.write(
        [
            Section("Folded", (Paragraph("inside"),)),
            Section("In place", (Paragraph("here"),), in_place=True),
            about,
            replace(about, table=long),
            replace(about, table=replace(short, notes=("other",)), repeated=True),
            Paragraph("last of the open ones"),
        ]
    )
    assert text.count("1.2345") == 1
    assert "*A figure*" in text
    assert "A figure: It shows 40 numbers." in text
    assert "39.5" not in text
    places = [text.index(words) for words in ("In place", "here", "1.2345", "last of", "Folded")]
    assert places == sorted(places)
