"""Selection: the rows of a pool that resemble one another least, and how well that was done.

The published method: from a random first row, add the candidate with the least summed cosine
similarity to those chosen (greedy), then swap a member for a candidate while the sum of all
pairwise similarities falls (local search).

No N x N table is ever made: vectors are read in blocks (they may be a memory map), and what is kept
is the (n, N) table of every candidate's similarity to each of the n members. Every similarity is
computed by itself, in one order of additions, so that neither the size of the blocks nor the number
of threads can change a choice; of equal candidates the first is taken.

The name is not `select`: a module of that name would hide `speedbench.datasets.select`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speedbench.datasets.embed import Embeddings
from speedbench.types import UserError

BLOCK_ROWS = 4096
"""Rows read at a time: 25 MB of 1,536 float32."""

N_START_WORK = 20_000_000_000
"""Multiplications to spend on further starts; the first start is made whatever it costs."""

MAX_STARTS = 200
"""For a small pool, where starts cost nothing and soon find nothing new."""

MAX_TABLE_BYTES = 2 << 30
"""Of the (n, N) table in float32, so that a selection stays within 4 GB with its vectors."""

SMALLEST_GAIN = 1e-5
"""A swap must lower the sum by more than the rounding of float32, or two could take turns."""

SHORTEST, LONGEST = 1e-15, 1e15
"""Norms between which products of float32 neither vanish nor overflow."""

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selected:
    """indices (n,) ascending; total: the sum over their pairs; the effort behind it."""

    indices: Indices
    total: float
    n_starts: int
    n_swaps: int  # of the start that won


def select(
    vectors: NDArray[Any], n: int, seed: int, block_rows: int = BLOCK_ROWS
) -> NDArray[np.int64]:
    """The `n` rows of vectors (N, D) whose pairwise cosine similarities have the least sum, as far
    as the search finds them: indices (n,), ascending.
    """
    return search(vectors, n, seed, block_rows).indices


def search(
    vectors: NDArray[Any],
    n: int,
    seed: int,
    block_rows: int = BLOCK_ROWS,
    n_starts: int | None = None,
) -> Selected:
    """The best of several starts; by default as many as N_START_WORK pays for, at most MAX_STARTS.

    The first N starts begin with another row each, the next N with two random rows, and so on.
    """
    candidates = _Candidates(vectors, block_rows)
    if not 1 <= n <= candidates.n_rows:
        raise UserError(
            f"{n} rows were asked of {candidates.n_rows} candidates: ask for at least 1 and at "
            f"most {candidates.n_rows}"
        )
    if 4 * n * candidates.n_rows > MAX_TABLE_BYTES:
        raise UserError(
            f"{n} of {candidates.n_rows} candidates need a table of "
            f"{4 * n * candidates.n_rows / 2**30:.1f} GiB, expected at most "
            f"{MAX_TABLE_BYTES >> 30}: choose fewer rows, or from fewer candidates"
        )
    affordable = N_START_WORK // (4 * n * candidates.n_rows * vectors.shape[1])
    n_starts = min(n_starts or max(1, affordable), MAX_STARTS, n * candidates.n_rows)
    generator = np.random.default_rng(seed)
    order = generator.permutation(candidates.n_rows)
    best = _Members(candidates, n, order[:1]).improve(n_starts)
    for start in range(1, n_starts):
        round_, place = divmod(start, candidates.n_rows)
        first = generator.choice(candidates.n_rows, round_ + 1, replace=False)
        if round_ == 0:
            first = order[place : place + 1]
        found = _Members(candidates, n, first).improve(n_starts)
        if found.total < best.total:
            best = found
    return best


def pairwise_sum(vectors: NDArray[Any], indices: Sequence[int] | Indices) -> float:
    """The objective: cosine similarity summed over the unordered pairs of `indices`."""
    chosen = np.asarray(indices, dtype=np.int64)
    blocks = (chosen[start : start + BLOCK_ROWS] for start in range(0, len(chosen), BLOCK_ROWS))
    return _sum_over_pairs(np.asarray(vectors[block]) for block in blocks)


def mean_similarity(vectors: NDArray[Any], indices: Sequence[int] | Indices | None = None) -> float:
    """Per pair of `indices`, or of the whole pool; NaN where there is no pair.

    Exact for any pool: the sum over all pairs follows from the length of the summed unit vectors.
    """
    n = len(vectors) if indices is None else len(indices)
    if indices is None:
        total = _sum_over_pairs(block for _, block in _blocks(vectors, BLOCK_ROWS))
    else:
        total = pairwise_sum(vectors, indices)
    return total / (n * (n - 1) / 2) if n > 1 else float("nan")


def random_means(vectors: NDArray[Any], n: int, seed: int, n_picks: int) -> Floats:
    """(n_picks,): the mean similarity of `n` rows picked at random, each pick with its own seed."""
    picks = (np.random.default_rng([seed, pick]) for pick in range(n_picks))
    chosen = (np.sort(pick.choice(len(vectors), n, replace=False)) for pick in picks)
    return np.array([mean_similarity(vectors, indices) for indices in chosen])


def check_shape(vectors: NDArray[Any], n_rows: int, what: str) -> None:
    """Refuse an array that is not one vector per row of the pool."""
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or vectors.shape[1] == 0:
        raise UserError(
            f"{what} holds {vectors.dtype} of shape {vectors.shape}, expected floating-point "
            f"numbers of shape ({n_rows}, dimensions): give one vector per row of the pool"
        )
    if len(vectors) != n_rows:
        raise UserError(
            f"{what} holds {len(vectors)} vectors, but the pool has {n_rows} rows: give one per "
            "row, in the pool's order"
        )


def check_vectors(vectors: NDArray[Any], names: Sequence[str]) -> None:
    """Refuse a vector that has no cosine; `names` (N,) are the ids of the rows."""
    _norms(vectors, BLOCK_ROWS, names)


def _sum_over_pairs(blocks: Any) -> float:
    """|sum of unit vectors|^2 = n + 2 (sum over pairs); n itself is summed, as rounded."""
    total: Floats | float = 0.0
    own = 0.0
    for block in blocks:
        exact = np.asarray(block, dtype=np.float64)
        unit = exact / np.sqrt(np.einsum("ij,ij->i", exact, exact))[:, None]
        total = total + unit.sum(axis=0)
        own += float(np.einsum("ij,ij->", unit, unit))
    return (float(np.sum(np.square(total))) - own) / 2


def _blocks(vectors: NDArray[Any], block_rows: int) -> Iterator[tuple[int, NDArray[Any]]]:
    for start in range(0, len(vectors), block_rows):
        yield start, np.asarray(vectors[start : start + block_rows])


def _norms(vectors: NDArray[Any], block_rows: int, names: Sequence[str] = ()) -> Floats:
    """(N,); every one of them usable."""
    norms = np.empty(len(vectors))
    for start, block in _blocks(vectors, block_rows):
        exact = block.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            norms[start : start + len(block)] = np.sqrt(np.einsum("ij,ij->i", exact, exact))
    usable = (norms >= SHORTEST) & (norms <= LONGEST)  # false for NaN, too
    if not usable.all():
        row = int(np.argmin(usable))
        fault = _fault(vectors[row], float(norms[row]))
        raise UserError(
            f"the vector of row {names[row] if names else row!r} has {fault}: embed the row again, "
            "or remove it"
        )
    return norms


def _fault(vector: NDArray[Any], norm: float) -> str:
    if np.isnan(vector).any():
        return "NaN"
    if np.isinf(vector).any():
        return "infinity"
    return "only zeros" if norm == 0 else f"the length {norm:.3g}, expected {SHORTEST} to {LONGEST}"


@dataclass(frozen=True, slots=True)
class CategoryResult:
    """What a selection did to one category: mean cosine similarity per pair of rows.

    None where fewer than two rows make no pair.
    """

    category: str
    n_pool: int
    n: int
    selected: float | None
    random: tuple[float, ...]
    pool: float | None
    n_starts: int
    n_swaps: int


def select_rows(
    categories: Sequence[str],
    names: Sequence[str],
    embeddings: Embeddings,
    per_category: int,
    seed: int,
    n_picks: int,
) -> Iterator[tuple[Indices, CategoryResult]]:
    """Category by category: the rows chosen, ascending, by their place in the pool.

    `categories` and `names` (N,) belong to the pool's rows. Every fault is found before any search.
    """
    check_shape(embeddings.vectors, len(names), "--embeddings")
    places = {name: _places(categories, name) for name in dict.fromkeys(categories)}
    for name, rows in places.items():
        if len(rows) < per_category:
            raise UserError(
                f"category {name!r} has {len(rows)} candidate(s), but --per_category is "
                f"{per_category}: ask for fewer, or give the pool more rows of it"
            )
    for rows in places.values():
        check_vectors(embeddings.of(rows), [names[row] for row in rows.tolist()])
    for name, rows in places.items():
        yield _select_category(name, rows, embeddings.of(rows), per_category, seed, n_picks)


def _select_category(
    name: str, rows: Indices, vectors: NDArray[Any], n: int, seed: int, n_picks: int
) -> tuple[Indices, CategoryResult]:
    found = search(vectors, n, seed)
    result = CategoryResult(
        category=name,
        n_pool=len(rows),
        n=n,
        selected=_number(mean_similarity(vectors, found.indices)),
        random=tuple(random_means(vectors, n, seed, n_picks).tolist()) if n > 1 else (),
        pool=_number(mean_similarity(vectors)),
        n_starts=found.n_starts,
        n_swaps=found.n_swaps,
    )
    return rows[found.indices], result


def _places(categories: Sequence[str], name: str) -> Indices:
    return np.array([i for i, category in enumerate(categories) if category == name], dtype=int)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


class _Candidates:
    """All vectors, and the similarity of each to one of them."""

    def __init__(self, vectors: NDArray[Any], block_rows: int) -> None:
        check_shape(vectors, len(vectors), "the array")
        self._vectors = vectors
        self._block_rows = block_rows
        self._lengths = _norms(vectors, block_rows).astype(np.float32)  # (N,)

    @property
    def n_rows(self) -> int:
        return len(self._vectors)

    def similarity_to(self, row: int, out: NDArray[np.float32]) -> None:
        """Cosine of every vector with that of `row`, into out (N,)."""
        one = np.asarray(self._vectors[row], dtype=np.float32) / self._lengths[row]
        for start, block in _blocks(self._vectors, self._block_rows):
            end = start + len(block)
            rows = np.ascontiguousarray(block, dtype=np.float32)
            # Not BLAS: there the sum of a row depends on the rows beside it, and on the threads.
            np.einsum("ij,j->i", rows, one, out=out[start:end])
            out[start:end] /= self._lengths[start:end]


class _Members:
    """n chosen rows; `_table` (n, N): similarity of every candidate to each of them.

    `_sums` (N,) adds up the table, in float64: what is added and taken away again leaves no trace.
    """

    def __init__(self, candidates: _Candidates, n: int, first: Indices) -> None:
        self._candidates = candidates
        self._rows = np.empty(n, dtype=np.int64)
        self._table = np.zeros((n, candidates.n_rows), dtype=np.float32)
        self._sums = np.zeros(candidates.n_rows)
        self._free = np.ones(candidates.n_rows, dtype=bool)
        for place in range(n):
            self._put(place, int(first[place]) if place < len(first) else self._least())

    def improve(self, n_starts: int) -> Selected:
        """Make the best swap until none lowers the sum."""
        n_swaps = 0
        while (swap := self._best_swap()) is not None:
            place, row = swap
            self._free[self._rows[place]] = True
            self._sums -= self._table[place]
            self._put(place, row)
            n_swaps += 1
        among = self._table[:, self._rows].astype(np.float64)  # (n, n)
        total = (among.sum() - np.trace(among)) / 2
        return Selected(np.sort(self._rows), float(total), n_starts, n_swaps)

    def _put(self, place: int, row: int) -> None:
        self._rows[place] = row
        self._free[row] = False
        self._candidates.similarity_to(row, self._table[place])
        self._sums += self._table[place]

    def _least(self) -> int:
        return int(np.argmin(np.where(self._free, self._sums, np.inf)))

    def _best_swap(self) -> tuple[int, int] | None:
        """(place, row) that lowers the sum most; None if nothing does.

        Row j for member i changes the sum by (sums[j] - table[i, j]) - (sums[i] - table[i, i]).
        """
        places = np.arange(len(self._rows))
        own = self._sums[self._rows] - self._table[places, self._rows]  # (n,)
        best, swap = -SMALLEST_GAIN, None
        for start in range(0, self._candidates.n_rows, BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            relief = self._table[:, block] + own[:, None]  # (n, B) float64
            place = np.argmax(relief, axis=0)  # (B,)
            change = self._sums[block] - relief[place, np.arange(relief.shape[1])]
            change[~self._free[block]] = np.inf
            j = int(np.argmin(change))
            if change[j] < best:
                best, swap = float(change[j]), (int(place[j]), start + j)
        return swap
