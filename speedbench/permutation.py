"""Permutation tests: whether two sides of the same conversations differ by more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from speedbench.columns import Floats

Int32s = npt.NDArray[np.int32]

N_PERMUTATIONS = 9_999


@dataclass(frozen=True, slots=True)
class PValue:
    """Of a permutation test. adjusted: by Holm, over the tests it is read together with; exact: all
    permutations were counted, not drawn."""

    value: float | None
    adjusted: float | None
    n_permutations: int
    exact: bool
    why_not: str = ""


def token_distances(pairs: Sequence[tuple[Int32s, Int32s]]) -> Floats:
    """(C, C): entry c, d is the sum over tokens v of (difference of v's count in c) x (in d) /
    (count of v in all). The sum of all entries is the chi-square distance of the two sides' token
    counts; swapping the sides of a conversation turns the sign of its row and column."""
    from scipy.sparse import coo_matrix

    sizes = np.array([[len(side) for side in pair] for pair in pairs])
    flat = np.concatenate([side for pair in pairs for side in pair])
    vocabulary, token = np.unique(flat, return_inverse=True)
    row = np.repeat(np.arange(len(pairs)), sizes.sum(axis=1))
    sign = np.repeat(np.tile([-1.0, 1.0], len(pairs)), sizes.ravel())
    weight = 1 / np.sqrt(np.bincount(token, minlength=len(vocabulary)))
    gaps = coo_matrix((sign * weight[token], (row, token)), (len(pairs), len(vocabulary))).tocsr()
    return np.asarray((gaps @ gaps.T).toarray(), float)


def swap_test(distances: Floats, n_permutations: int = N_PERMUTATIONS, seed: int = 0) -> PValue:
    """Permutation test on s' D s (D (C, C), s all 1): both sides of whole conversations are swapped
    at random (s of +1 and -1). distances: D, or (C,) d where D is d d'.

    If both sides answer a prompt with the same distribution, swapping changes nothing that can be
    told, so p is exact whatever that distribution is (Fisher's sign randomization; the observed
    arrangement counts as one of those drawn, Phipson & Smyth 2010). All 2^C arrangements are
    counted where they are no more than would be drawn.
    """
    n = len(distances)
    observed = float(_statistics(np.ones((1, n)), distances)[0])
    most = float(_statistics(np.ones((1, n)), np.abs(distances))[0])
    enough = observed - 1e-9 * most  # rounding
    if 2**n <= n_permutations + 1:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        p = float(np.mean(_statistics(np.asarray(1 - 2 * bits, np.float64), distances) >= enough))
        return PValue(p, p, 2**n, True)
    generator = np.random.default_rng(seed)
    as_far = 1
    for start in range(0, n_permutations, 1000):
        size = (min(1000, n_permutations - start), n)
        signs = np.asarray(1 - 2 * generator.integers(0, 2, size), np.float64)
        as_far += int((_statistics(signs, distances) >= enough).sum())
    p = as_far / (n_permutations + 1)
    return PValue(p, p, n_permutations, False)


def _statistics(signs: Floats, distances: Floats) -> Floats:
    """(P,) s' D s of every row of signs (P, C)."""
    if distances.ndim == 1:
        return np.asarray((signs @ distances) ** 2)
    return np.asarray(np.einsum("pc,pc->p", signs @ distances, signs))


def holm(tests: Sequence[PValue]) -> list[PValue]:
    """The same, adjusted for being several (Holm 1979, Scand. J. Statistics 6:65-70)."""
    known = sorted((one.value, i) for i, one in enumerate(tests) if one.value is not None)
    adjusted: dict[int, float] = {}
    worst = 0.0
    for rank, (value, i) in enumerate(known):
        worst = max(worst, min(1.0, value * (len(known) - rank)))
        adjusted[i] = worst
    return [replace(one, adjusted=adjusted.get(i)) for i, one in enumerate(tests)]
