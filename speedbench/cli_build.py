"""The command line: data select and data bucket, which build splits of a user's own rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from speedbench.cli_base import OK, Parser, warn_of_foreign_code
from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.datasets.bucket import Bucket, Counted, Ruler, Tiers
    from speedbench.datasets.embed import Embeddings
    from speedbench.datasets.selection import CategoryResult
    from speedbench.datasets.split import SplitRow
    from speedbench.report.blocks import Block

ENTROPY_TOKENS = 1024
"""Tokens of a row that its entropy is estimated on: its beginning tells its kind."""


def _whole_number(least: int) -> Any:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least {least}")
        return int(text)

    return read


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _say(text: str) -> None:
    print(f"speedbench: {text}", file=sys.stderr, flush=True)


def _page(blocks: Iterable[Block]) -> str:
    from speedbench.report.html import render

    return render(blocks, "speedbench data")


def _add_common(parser: Parser, what: str) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        type=Path,
        required=True,
        help=f"{what}: JSONL or parquet in SPEED-Bench's schema (`prompt` or `messages` may stand "
        "for `turns`)",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="new folder to write"
    )
    parser.add_argument(
        "--seed", metavar="N", type=_whole_number(0), default=0, help="of all chance (default: 0)"
    )
    parser.add_argument(
        "--ignore_columns",
        metavar="A,B",
        type=_names,
        default=(),
        help="columns of FILE that are left out; any other unknown column is an error",
    )


# ---------------------------------------------------------------- select


def _select_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        allow_abbrev=False,
        description="Choose, per category, the rows that resemble one another least: random start, "
        "greedy additions, then swaps while the sum of pairwise cosine similarities falls.",
    )
    _add_common(parser, "the pool of candidates")
    parser.add_argument(
        "--per_category",
        metavar="N",
        type=_whole_number(1),
        required=True,
        help="rows to choose of each category (SPEED-Bench: 80)",
    )
    parser.add_argument(
        "--embeddings",
        metavar="FILE.npy|MODEL|URL|tfidf",
        required=True,
        help="one vector per row in the pool's order; or a sentence-transformers model, the base "
        "URL of an OpenAI-compatible endpoint (key in OPENAI_API_KEY), or TF-IDF, which embed all "
        "user turns of a row",
    )
    parser.add_argument("--embedding_model", metavar="NAME", help="the model an endpoint is asked")
    parser.add_argument(
        "--save_embeddings",
        metavar="FILE.npy",
        type=Path,
        help="keep computed vectors, for --embeddings FILE.npy",
    )
    parser.add_argument(
        "--random_picks",
        metavar="N",
        type=_whole_number(2),
        default=20,
        help="random selections to compare with, each with its own seed (default: 20)",
    )
    return parser


def select_command(argv: Sequence[str], prog: str) -> int:
    """`speedbench data select`: DIR/test.parquet, report.json and report.html."""
    given = _select_parser(prog).parse(argv)
    from speedbench.datasets.landing import landing
    from speedbench.datasets.selection import select_rows
    from speedbench.datasets.split import (
        read_rows,
        refuse_existing,
        write_json,
        write_rows,
        write_text,
    )
    from speedbench.report.layout_data import of_selection

    refuse_existing(given.out)
    _refuse_lost_embeddings(given.save_embeddings)
    pool = read_rows(given.source, ignored=given.ignore_columns)
    categories = [row.category for row in pool]
    _refuse_small_categories(categories, given.per_category)
    embeddings = _embeddings(given, pool)
    chosen: list[SplitRow] = []
    results: list[CategoryResult] = []
    for places, result in select_rows(
        categories,
        [row.question_id for row in pool],
        embeddings,
        given.per_category,
        given.seed,
        given.random_picks,
    ):
        chosen += [pool[place] for place in places.tolist()]
        results.append(result)
        _say(f"{result.category}: {result.n} of {result.n_pool} rows, {_outcome(result)}")
    report = _select_report(given, pool, chosen, embeddings, results)
    with landing(given.out) as folder:
        write_rows(folder / "test.parquet", chosen)
        write_json(folder / "report.json", report)
        write_text(folder / "report.html", _page(of_selection(report, results)))
    print(f"{given.out / 'test.parquet'}: {len(chosen)} rows of {len(results)} categories")
    print(f"{given.out / 'report.html'}: how alike they are, and how alike random picks would be")
    return OK


def _refuse_small_categories(categories: Sequence[str], per_category: int) -> None:
    """Before anything is embedded."""
    for name, n in Counter(categories).items():
        if n < per_category:
            raise UserError(
                f"category {name!r} has {n} candidate(s), but --per_category is {per_category}: "
                "ask for fewer, or give the pool more rows of it"
            )


def _refuse_lost_embeddings(path: Path | None) -> None:
    """Before anything is embedded: a file that could not be written, or not be used again."""
    from speedbench.datasets.split import refuse_unwritable

    if path is None:
        return
    if path.suffix != ".npy" or path.is_dir():
        raise UserError(
            f"--save_embeddings is {path}, expected a file that ends in .npy: rename it"
        )
    refuse_unwritable(path, "--save_embeddings")


def _embeddings(given: argparse.Namespace, pool: Sequence[SplitRow]) -> Embeddings:
    from speedbench.datasets.embed import embed, save_array

    texts = ["\n".join(row.turns) for row in pool]
    found = embed(given.embeddings, texts, given.embedding_model, given.seed)
    if given.save_embeddings is not None:
        if found.file is not None:
            raise UserError(
                f"--save_embeddings is given, but --embeddings {given.embeddings} is a file "
                "already: remove one of them"
            )
        save_array(given.save_embeddings, found.vectors)
    return found


def _outcome(result: CategoryResult) -> str:
    if result.selected is None:
        return "one row has no pair"
    return (
        f"mean similarity {result.selected:.4f} (random picks {fmean(result.random):.4f}, pool "
        f"{result.pool:.4f})"
    )


def _select_report(
    given: argparse.Namespace,
    pool: Sequence[SplitRow],
    chosen: Sequence[SplitRow],
    embeddings: Embeddings,
    results: Sequence[CategoryResult],
) -> dict[str, Any]:
    from speedbench import __version__
    from speedbench.datasets.identity import rows_sha256

    return {
        "format": 1,
        "speedbench": __version__,
        "pool": {
            "file": given.source.name,
            "rows": len(pool),
            "sha256": rows_sha256(row.conversation for row in pool),
        },
        "embeddings": {**embeddings.made_by, "dimensions": int(embeddings.vectors.shape[1])},
        "per_category": given.per_category,
        "seed": given.seed,
        "rows": len(chosen),
        "sha256": rows_sha256(row.conversation for row in chosen),
        "measure": "mean cosine similarity per unordered pair of rows of one category",
        "pool_is": "exact: over all pairs of the category",
        "categories": [{**asdict(result), **_spread(result)} for result in results],
    }


def _spread(result: CategoryResult) -> dict[str, float | None]:
    if not result.random or result.selected is None:
        return {"random_mean": None, "random_stdev": None, "below_random": None}
    mean = fmean(result.random)
    return {
        "random_mean": mean,
        "random_stdev": stdev(result.random),
        # A share of a mean that is not positive would say nothing.
        "below_random": 1 - result.selected / mean if mean > 0 else None,
    }


# ---------------------------------------------------------------- bucket


def _bucket_parser(prog: str) -> Parser:
    from speedbench.datasets.bucket import INTRO, K

    parser = Parser(
        prog=prog,
        allow_abbrev=False,
        description="Cut or pad rows so that every prompt has exactly one length in tokens. A text "
        "is cut in its middle or its marked context, and padded before its beginning or at the end "
        "of its context, so that the question at its end stays.",
    )
    _add_common(parser, "the rows, of one user turn each")
    parser.add_argument(
        "--isl", metavar="1k,2k", required=True, help=f"input lengths in tokens; 1k is {K} tokens"
    )
    parser.add_argument(
        "--tokenizer", metavar="T", required=True, help="folder or hub id of the measured model's"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--completions",
        action="store_true",
        help="count as the engine does for runs with --completions: no chat template",
    )
    kinds.add_argument(
        "--bare",
        action="store_true",
        help="count the text of the user turn alone, as the publisher does: prompts are then "
        "longer than their bucket by the chat template",
    )
    parser.add_argument(
        "--chat_template_args",
        metavar="JSON",
        default="{}",
        help="variables of the chat template, as in the runs to come",
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code shipped with the tokenizer"
    )
    parser.add_argument(
        "--mark",
        nargs=2,
        metavar=("OPEN", "CLOSE"),
        help="only what stands between the first OPEN and the last CLOSE of a text may change",
    )
    parser.add_argument(
        "--entropy",
        metavar="COLUMN|MODEL",
        help="a column with tiers or numbers, or a causal language model (folder or hub id) whose "
        f"mean entropy per token of the first {ENTROPY_TOKENS} tokens is taken; numbers become "
        "tiers by terciles (default: the category names the tier)",
    )
    parser.add_argument(
        "--per_tier",
        metavar="N",
        type=_whole_number(1),
        help="rows of each tier, those first that need the least change (SPEED-Bench: 512; "
        "default: all)",
    )
    parser.add_argument(
        "--padding",
        choices=("rows", "words", "repeat"),
        default="rows",
        help="sentences of other rows, or sentences of common words made by the seed, neither "
        "with a repeated n-gram; or --padding_text over and over (default: rows)",
    )
    parser.add_argument("--padding_text", metavar="TEXT", help="what --padding repeat repeats")
    parser.add_argument(
        "--intro",
        metavar="TEXT",
        default=INTRO,
        help="opens the padding of a text without a marked context; may be '' (default: "
        "'%(default)s')",
    )
    return parser


def bucket_command(argv: Sequence[str], prog: str) -> int:
    """`speedbench data bucket`: DIR/throughput_<k>/test.parquet, report.json and report.html."""
    given = _bucket_parser(prog).parse(argv)
    if (given.padding_text is not None) != (given.padding == "repeat"):
        raise UserError("--padding repeat and --padding_text TEXT belong together: give both")
    from speedbench.datasets import bucket
    from speedbench.datasets.padding import Padding
    from speedbench.datasets.split import read_rows, refuse_existing

    refuse_existing(given.out)
    targets = bucket.read_lengths(given.isl)
    extra = () if given.entropy is None else (given.entropy,)
    rows = read_rows(given.source, extra, given.ignore_columns)
    warn_of_foreign_code(given.trust_remote_code)
    ruler = bucket.Ruler(
        given.tokenizer, _counted(given), _template_args(given), given.trust_remote_code
    )
    tiers = _tiers(given.entropy, rows)
    _refuse_small_tiers(tiers, given.per_tier)
    texts = ["\n".join(row.turns) for row in rows]
    padding = Padding(given.padding, texts, given.seed, given.padding_text or "")
    options = bucket.Options(
        given.intro, tuple(given.mark) if given.mark else None, given.padding == "repeat"
    )
    lengths = bucket.measure(rows, ruler)
    built = []
    for target in targets:
        built.append(
            bucket.build(
                rows, tiers.of_rows, lengths, target, ruler, padding, options, given.per_tier
            )
        )
        _say(f"{built[-1].name}: {len(built[-1].rows)} rows of exactly {target} tokens")
    report = _bucket_report(given, rows, tiers, built)
    _write_buckets(given.out, built, ruler, report)
    for found in built:
        print(f"{given.out / found.name / 'test.parquet'}: {len(found.rows)} rows")
    print(f"{given.out / 'report.html'}: what was cut and padded, and what could not be made exact")
    for sentence in (s for found in built for s in bucket.shortfalls(found, given.per_tier)):
        print(f"{prog}: warning: {sentence}", file=sys.stderr)
    return OK


def _counted(given: argparse.Namespace) -> Counted:
    return "bare" if given.bare else "completions" if given.completions else "template"


def _template_args(given: argparse.Namespace) -> dict[str, object]:
    try:
        values = json.loads(given.chat_template_args)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(
            f"--chat_template_args is {given.chat_template_args!r:.60}, expected a JSON object "
            'such as {"enable_thinking": false}: mend it'
        )
    return values


def _tiers(entropy: str | None, rows: Sequence[SplitRow]) -> Tiers:
    """From the column or the model that --entropy names, or else from the categories."""
    from speedbench.datasets.bucket import TIERS, named_tiers, terciles
    from speedbench.datasets.embed import mean_entropies

    if entropy is None:
        for row in rows:
            if row.category not in TIERS:
                raise UserError(
                    f"row {row.question_id} has the category {row.category!r}, which is no tier "
                    f"({', '.join(TIERS)}): add --entropy COLUMN or --entropy MODEL"
                )
        entropy = "category"
        values: list[object] = [row.category for row in rows]
    else:
        values = [row.extra[0] for row in rows]
    found = named_tiers(rows, values, f"column '{entropy}'")
    if found is not None:
        return found
    _say(f"estimating the entropy of {len(rows)} rows with {entropy}")
    means = mean_entropies(entropy, ["\n".join(row.turns) for row in rows], ENTROPY_TOKENS)
    for row, mean in zip(rows, means, strict=True):
        if mean != mean:
            raise UserError(
                f"row {row.question_id} has fewer than two tokens under {entropy}, so it has no "
                "entropy: remove the row"
            )
    return terciles(means, f"mean entropy per token (nats) under {entropy}")


def _refuse_small_tiers(tiers: Tiers, per_tier: int | None) -> None:
    from speedbench.datasets.bucket import TIERS

    for tier in TIERS:
        n = tiers.of_rows.count(tier)
        if n < (per_tier or 1):
            raise UserError(
                f"{n} row(s) are of the tier {tier}, but {per_tier or 'at least 1'} are needed: "
                "give more rows, or ask for a smaller --per_tier"
            )


def _write_buckets(
    out: Path, built: Sequence[Bucket], ruler: Ruler, report: dict[str, Any]
) -> None:
    """All buckets or none, each row counted again in its file."""
    from speedbench.datasets import bucket
    from speedbench.datasets.landing import landing
    from speedbench.datasets.split import write_json, write_text
    from speedbench.report.layout_data import of_buckets

    for found in built:
        if not found.rows:
            raise UserError(
                f"no row can be made exactly {found.target} tokens long, the first one because "
                f"{found.inexact[0][2]}: give other rows, or another --isl"
            )
    with landing(out) as folder:
        for found in built:
            bucket.write(found, folder, ruler)
        write_json(folder / "report.json", report)
        write_text(folder / "report.html", _page(of_buckets(report, built)))


def _bucket_report(
    given: argparse.Namespace,
    rows: Sequence[SplitRow],
    tiers: Tiers,
    built: Sequence[Bucket],
) -> dict[str, Any]:
    from speedbench import __version__
    from speedbench.datasets.bucket import MEANINGS, K
    from speedbench.datasets.identity import rows_sha256

    return {
        "format": 1,
        "speedbench": __version__,
        "from": {
            "file": given.source.name,
            "rows": len(rows),
            "sha256": rows_sha256(row.conversation for row in rows),
        },
        "tokenizer": given.tokenizer,
        "counted": _counted(given),
        "counted_means": MEANINGS[_counted(given)],
        "chat_template_args": _template_args(given),
        "tokens_per_k": K,
        "seed": given.seed,
        "padding": given.padding,
        "padding_text": given.padding_text,
        "intro": given.intro,
        "mark": given.mark,
        "tiers": {"given_by": tiers.given_by, "thresholds": tiers.thresholds},
        "buckets": [_bucket_values(found, given.per_tier) for found in built],
    }


def _bucket_values(found: Bucket, per_tier: int | None) -> dict[str, Any]:
    from speedbench.datasets.bucket import TIERS, shortfalls
    from speedbench.datasets.identity import rows_sha256

    hows = ("kept", "cut", "padded")
    return {
        "name": found.name,
        "tokens": found.target,
        "rows": len(found.rows),
        "sha256": rows_sha256(row.conversation for row in found.rows),
        "tiers": {
            tier: {"rows": found.count(tier), **{how: found.count(tier, how) for how in hows}}
            for tier in TIERS
        },
        "warnings": list(shortfalls(found, per_tier)),
        "changes": [asdict(change) for change in found.changes],
        "inexact": [
            {"question_id": name, "tier": tier, "reason": reason}
            for name, tier, reason in found.inexact
        ],
    }


# ---------------------------------------------------------------- tokens


def tokens_command(argv: list[str], prog: str) -> int:
    """`speedbench data tokens --out F.parquet` with the flags of a run: its prompts, encoded."""
    from speedbench import environment, inputs
    from speedbench.cli_run import run_parser
    from speedbench.configure import configuration
    from speedbench.datasets import tokens

    parser = run_parser(prog)
    parser.add_argument("--out", metavar="F.parquet", type=Path, help="token file to write")
    given = vars(parser.parse(argv))
    out = given.pop("out", None)
    if out is None:
        raise UserError("--out is missing: name the token file to write")
    config = configuration({"engine": "NULL", **given}).config
    if config.prompts is not None:
        raise UserError("--prompts is a token file already: leave it out")
    warn_of_foreign_code(config.trust_remote_code)
    prepared = inputs.prepare(config)
    source = config.tokenizer or config.model_dir
    about = {
        "dataset": {
            "name": prepared.dataset.name,
            "path": prepared.dataset.path,
            "sha256": prepared.dataset.sha256,
            "origin": prepared.dataset.origin,
        },
        "tokenizer": source,
        "tokenizer_files": environment.capture([], [source])["checkpoints"],
        "completions": config.completions,
        "chat_template_args": config.chat_template_args,
        "history": config.history,
        "eos_token_ids": prepared.stop_token_ids,
        "fingerprint": prepared.fingerprint,
    }
    tokens.write(out, prepared.rows, prepared.prompts, about)
    n_tokens = sum(len(prompt.token_ids) for prompt in prepared.prompts.values())
    print(
        f"{out}: {len(prepared.prompts)} prompts of {len(prepared.rows)} conversations, {n_tokens} "
        f"tokens, fingerprint {prepared.fingerprint[:12]}"
    )
    return OK
