"""Datasets: the rows of a benchmark file, and those of them that a run asks. Reading only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from speedbench.config import PRESETS, RunConfig
from speedbench.datasets.files import jsonl_records, parquet_files, parquet_records
from speedbench.datasets.identity import origin, rows_sha256
from speedbench.datasets.rows import SENTINEL, Schema, to_conversations
from speedbench.types import Conversation, UserError

__all__ = ["SENTINEL", "Dataset", "load", "select"]

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "data" if (REPOSITORY / "run.py").is_file() else Path("data")
"""Where datasets are prepared: in the checkout, or where an installed speedbench is called."""
DEFAULT_SPEED = DATA / "speed" / "qualitative"
DEFAULT_MINI = DATA / "mini"
PREPARED: Mapping[str, str] = {"specbench": "question.jsonl", "mtbench": "question.jsonl"}
"""The datasets of one file that `speedbench prepare` fetches, and the file's name."""

N_RANDOM_ROWS = 64
"""Rows of random tokens where neither --num_requests nor n_rows says how many."""

KNOWN_KWARGS: Mapping[str, tuple[str, ...]] = {
    "jsonl": ("id_field", "category_field", "turns_field"),
    "random": ("n_rows",),
}
"""The dataset_kwargs a dataset takes; one that is not listed takes none."""

SPEED = Schema()
MTBENCH = Schema(ids=("question_id", "prompt_id"), turns=("turns", "prompt"))
OWN = Schema(
    turns=("turns", "prompt", "messages"),
    default_id=True,
    default_category="default",
    loose_turns=("prompt", "messages"),
)


@dataclass(frozen=True, slots=True)
class Dataset:
    """All rows of a file in file order; `sha256` is over their content, not over the file."""

    name: str
    path: str  # "" for random tokens, which come from no file
    rows: tuple[Conversation, ...]
    sha256: str
    origin: Mapping[str, str] | None = None
    """Where a prepared file came from: repository, revision, preparer; None for any other."""


def load(config: RunConfig, vocabulary: Sequence[int] | None = None) -> Dataset:
    """Read the dataset of a run.

    `vocabulary` holds the token IDs that random prompts are drawn from; only they need it.
    Raises UserError with one sentence for the first fault found.
    """
    _check_kwargs(config)
    name = config.dataset
    if name == "random":
        return _dataset(name, "", _random_rows(config, vocabulary))
    path = _path(config)
    if name == "speed":
        return _dataset(name, path, to_conversations(parquet_records(parquet_files(path)), SPEED))
    schema = {"mtbench": MTBENCH, "jsonl": _own_schema(config)}.get(name, SPEED)
    return _dataset(name, path, to_conversations(jsonl_records(path), schema))


def select(dataset: Dataset, config: RunConfig) -> tuple[Conversation, ...]:
    """The rows that a run asks, in the order it asks them.

    A smaller --num_requests picks a subset of a larger one: every category gives its first rows
    in that order, as evenly as the categories' sizes let it.
    """
    rows = list(dataset.rows)
    if config.order == "shuffle":
        order = np.random.default_rng(config.seed).permutation(len(rows))
        rows = [rows[i] for i in order.tolist()]
    sizes = Counter(row.category for row in dataset.rows)
    for name in config.category:
        if name not in sizes:
            raise UserError(
                f"--category {name} is not in the dataset: choose from {', '.join(sizes)}"
            )
    if config.category:
        sizes = Counter({name: n for name, n in sizes.items() if name in config.category})
        rows = [row for row in rows if row.category in sizes]
    wanted = config.num_requests
    if config.preset is not None:
        wanted = min(PRESETS[config.preset] or len(rows), len(rows))
    if wanted is None:
        return tuple(rows)
    if wanted > len(rows):
        raise UserError(
            f"--num_requests is {wanted}, but there are {len(rows)} rows to choose from: ask for "
            f"at most {len(rows)}"
        )
    left = spread(sizes, wanted)
    return tuple(row for row in rows if _take(left, row.category))


def spread(sizes: Mapping[str, int], n: int) -> dict[str, int]:
    """`n` rows over categories, one each in turn; a category that has no more is passed over."""
    share = dict.fromkeys(sizes, 0)
    while n > 0:
        for name in [name for name in sizes if share[name] < sizes[name]][:n]:
            share[name] += 1
            n -= 1
    return share


def _take(left: dict[str, int], category: str) -> bool:
    left[category] -= 1
    return left[category] >= 0


def _dataset(name: str, path: Path | str, rows: tuple[Conversation, ...]) -> Dataset:
    sha256 = rows_sha256(rows)
    return Dataset(name, str(path), rows, sha256, origin(Path(path), sha256) if path else None)


def _check_kwargs(config: RunConfig) -> None:
    known = KNOWN_KWARGS.get(config.dataset, ())
    for name, value in config.dataset_kwargs.items():
        if name not in known:
            raise UserError(
                f"--dataset {config.dataset} has no option '{name}': its dataset_kwargs are "
                f"{', '.join(known) or 'none'}"
            )
        if name.endswith("_field") and not isinstance(value, str):
            raise UserError(f"dataset_kwargs {name} is {value!r}, expected the name of a field")
        if name == "n_rows" and (type(value) is not int or value < 1):
            raise UserError(f"dataset_kwargs n_rows is {value!r}, expected a number of at least 1")


def _own_schema(config: RunConfig) -> Schema:
    """Own JSONL; a field that the user names must be there."""
    names, schema = config.dataset_kwargs, OWN
    if "id_field" in names:
        schema = replace(schema, ids=(names["id_field"],), default_id=False)
    if "category_field" in names:
        schema = replace(schema, category=names["category_field"], default_category=None)
    if "turns_field" in names:
        field = (names["turns_field"],)
        schema = replace(schema, turns=field, loose_turns=field)
    return schema


def _path(config: RunConfig) -> Path:
    """The file (of the parquet schema: or the folder) that a run reads."""
    name, given = config.dataset, config.dataset_path
    if name == "speed":
        return _speed_path(config)
    if name == "mini":
        return _in_folder(DEFAULT_MINI if given is None else Path(given), "prompts.jsonl")
    if name == "calibration":
        return _calibration_path(config)
    if given is None and name in PREPARED and (DATA / name / PREPARED[name]).is_file():
        return DATA / name / PREPARED[name]
    if given is None:
        remedy = f", or run `speedbench prepare --dataset {name}`" if name in PREPARED else ""
        raise UserError(
            f"--dataset {name} needs its JSONL file, none is shipped: add --dataset_path "
            f"FILE{remedy}"
        )
    return Path(given) if name == "jsonl" else _in_folder(Path(given), "question.jsonl")


def _speed_path(config: RunConfig) -> Path:
    """The named file or folder; with --speed_config, or without a path, that configuration's."""
    name = config.speed_config or "qualitative"
    if config.dataset_path is None:
        path = DEFAULT_SPEED.with_name(name)
        if not path.exists():
            raise UserError(
                f"{path} does not exist: run `speedbench prepare --dataset speed --config {name}`, "
                "or give the benchmark's parquet file or folder as --dataset_path"
            )
        return path
    path = Path(config.dataset_path)
    if config.speed_config is None or path.name == name or path.parent.name == name:
        return path
    if not (path / name).is_dir():
        raise UserError(
            f"{path} holds no folder {name}, which --speed_config asks for: give the folder that "
            "holds it as --dataset_path"
        )
    return path / name


def _calibration_path(config: RunConfig) -> Path:
    folder = config.dataset_path or config.model_dir
    if folder is None:
        raise UserError(
            "--dataset calibration needs the checkpoint whose prompts it asks: add --model_dir or "
            "--dataset_path"
        )
    path = _in_folder(Path(folder), "calibration_prompts.jsonl")
    if not path.is_file():
        raise UserError(
            f"{folder} holds no calibration_prompts.jsonl: give a checkpoint that `speedbench "
            "calibrate` built as --model_dir, or the file as --dataset_path"
        )
    return path


def _in_folder(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path


def _random_rows(config: RunConfig, vocabulary: Sequence[int] | None) -> tuple[Conversation, ...]:
    """Rows of tokens drawn uniformly; row i is the same however many rows are drawn."""
    if config.dataset_path is not None:
        raise UserError(
            f"--dataset random reads no file, but --dataset_path is {config.dataset_path}: "
            "remove one of them"
        )
    if vocabulary is None or len(vocabulary) == 0 or config.random_isl is None:
        raise ValueError("random rows need random_isl and the vocabulary they are drawn from")
    generator = np.random.default_rng(config.seed)
    tokens = np.asarray(vocabulary, dtype=np.int64)  # (V,)
    rows = []
    for number in range(config.dataset_kwargs.get("n_rows", config.num_requests or N_RANDOM_ROWS)):
        drawn = tokens[generator.integers(len(tokens), size=config.random_isl)]  # (random_isl,)
        turn = tuple(drawn.tolist())
        rows.append(Conversation(id=str(number), category="random", token_turns=(turn,)))
    return tuple(rows)
