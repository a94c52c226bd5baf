"""Steps of an arm: the decode steps of all its runs with what they are grouped by.

The unit of resampling is the conversation; the same conversation in two repeats is one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from speedbench import metrics, stats
from speedbench.checks import LOOKUP
from speedbench.columns import Bools, Floats, Ints
from speedbench.report.arms import Arm
from speedbench.report.summary import Resamples
from speedbench.store import Run


@dataclass(frozen=True, slots=True)
class Conversations:
    """The conversations that an arm's runs measured without failure: (C',).

    category  (C',) index into `categories`, of each conversation
    """

    ids: tuple[str, ...]
    categories: tuple[str, ...]
    category: Ints

    def weights(self, n_resamples: int = stats.N_RESAMPLES, seed: int = 0) -> Floats:
        """(B, C') bootstrap weights, the same in whatever order the conversations ended."""
        order = np.lexsort((np.array(self.ids, str), self.category))
        found = stats.bootstrap_weights(self.category[order], n_resamples, seed)
        return found[:, np.argsort(order)]

    def degrees(self, members: Bools) -> int:
        """Conversations less the categories they are in, of those that tell a number: (C',)."""
        present = np.bincount(self.category[members], minlength=len(self.categories))
        return int(members.sum() - (present > 0).sum())


def conversations_of(arm: Arm) -> tuple[Conversations, list[Ints]]:
    """The arm's conversations, and per run the code of each of its own (C,): -1 where it failed."""
    categories = sorted({name for run in arm.runs for name in run.columns.categories})
    code_of_category = {name: code for code, name in enumerate(categories)}
    codes: dict[str, int] = {}
    category: list[int] = []
    of_runs = []
    for run in arm.runs:
        columns = run.columns
        own = np.full(len(columns.conversation_ids), -1, np.int64)
        for i, name in enumerate(columns.conversation_ids):
            if columns.failed[i]:
                continue
            if name not in codes:
                codes[name] = len(codes)
                category.append(code_of_category[columns.categories[columns.category[i]]])
            own[i] = codes[name]
        of_runs.append(own)
    found = Conversations(tuple(codes), tuple(categories), np.array(category, np.int64))
    return found, of_runs


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps (D,) of an arm, as `metrics.acceptance` counts them.

    conversation  (D,) index of its conversation
    length        (D,) tokens it holds; right-censored there if `censored`
    position      (D,) output tokens of its request before it
    turn          (D,) turn of its request, from 0
    run, request  (D,) which run of the arm, and which request (R) of that run
    first_token   (D,) place of its first token among all output tokens of its run
    n_shown       (D,) tokens it shows: fewer than `length` where the end of a request cut it
    rejected      (D,) a draft token was rejected; the target's own is the last token it shows
    hidden        (D,) the engine accepted more than the step shows: the request ended within it
    """

    draft_length: int
    conversations: Conversations
    conversation: Ints
    length: Ints
    censored: Bools
    position: Ints
    turn: Ints
    run: Ints
    request: Ints
    first_token: Ints
    n_shown: Ints
    rejected: Bools
    hidden: Bools

    def counts(self, group: Ints, n_groups: int) -> tuple[Ints, Ints]:
        """Steps by conversation, group and length, uncensored and censored: (C', G, K+2) each.

        group: (D,) of each step.
        """
        n = len(self.conversations.ids)
        cell = self.conversation.astype(np.int64) * n_groups + group
        whole, cut = metrics.count_lengths(
            cell, self.length, self.censored, n * n_groups, self.draft_length
        )
        shape = (n, n_groups, self.draft_length + 2)
        return whole.reshape(shape), cut.reshape(shape)


def steps_of(arm: Arm) -> Steps:
    """Every decode step of the arm's conversations that did not fail."""
    k = arm.draft_length
    found, codes = conversations_of(arm)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _OF_STEPS}
    for number, (run, own) in enumerate(zip(arm.runs, codes, strict=True)):
        columns = run.columns
        kinds, length, censored = metrics.classified(columns, k, cut_short(run))
        conversation = own[columns.conversation].astype(np.int32)[columns.request]
        chosen = (conversation >= 0) & (kinds != metrics.PREFILL) & (kinds != metrics.MERGED)
        lost = metrics.rejected(columns, kinds, length, censored, k)
        before = np.cumsum(columns.n_tokens) - columns.n_tokens
        first, _ = columns.first_and_last()
        began = np.zeros(columns.n_requests, np.int64)
        began[columns.request[first]] = before[first]
        at = np.flatnonzero(chosen)
        request, first_token = columns.request[at], before[at]
        length, shown = length[at], columns.n_tokens[at]
        of_steps = {
            "conversation": conversation[at],
            "length": length,
            "censored": censored[at],
            "position": (first_token - began[request]).astype(np.int32),
            "turn": columns.turn.astype(np.int32)[request],
            "run": np.full(len(at), number, np.int32),
            "request": request,
            "first_token": first_token,
            "n_shown": shown,
            "rejected": lost[at] & (length == shown),
            "hidden": ~censored[at] & (length > shown),
        }
        for name, values in of_steps.items():
            parts[name].append(values)
    joined = {
        name: values[0] if len(values) == 1 else np.concatenate(values)
        for name, values in parts.items()
    }
    return Steps(k, found, **joined)


_OF_STEPS = (
    "conversation", "length", "censored", "position", "turn", "run", "request", "first_token",
    "n_shown", "rejected", "hidden",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """An arm with its decode steps, its runs' output tokens, and (B, C') bootstrap weights."""

    arm: Arm
    steps: Steps
    tokens: tuple[Tokens, ...]
    weights: Floats

    @property
    def fault(self) -> str:
        """Why the tokens cannot be laid over the steps; '' if they can."""
        return next((one.fault for one in self.tokens if one.fault), "")


def measured(arms: Sequence[Arm]) -> Iterator[Measured]:
    """One arm after the other: the steps of all at once would be gigabytes. Arms that asked the
    same conversations share their weights, which are costly to draw."""
    resamples = Resamples()
    for arm in arms:
        steps = steps_of(arm)
        tokens = tuple(tokens_of(run) for run in arm.runs)
        weights = resamples.weights(steps.conversations.category, steps.conversations.ids)
        yield Measured(arm, steps, tokens, weights)


def cut_short(run: Run) -> Bools | None:
    """Last steps whose draft the engine made shorter, as `checks.counted` censors them."""
    engine, config = run.manifest["engine"], run.manifest["config"]
    if not engine.get("fits_drafts"):
        return None
    lookup = config["speculative_algorithm"] in LOOKUP
    k = int(engine["draft_length"])
    return metrics.drafts_cut_short(run.columns, k, config["output_length"], lookup)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output tokens of a run: those of request r are `ids[start[r] : start[r + 1]]`.

    fault  why the tokens cannot be laid over the steps; '' if they can
    """

    ids: Ints
    start: Ints
    fault: str = ""


def tokens_of(run: Run) -> Tokens:
    """The output tokens of the run's requests (R,), in the order of its columns."""
    lists = run.turns["output_token_ids"]
    if not np.array_equal(run.used, np.arange(len(lists))):
        lists = lists.take(pa.array(run.used))
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    if isinstance(lists, pa.ChunkedArray):  # of no chunk
        lists = pa.concat_arrays(lists.chunks or [pa.array([], lists.type)])
    sizes = np.asarray(lists.value_lengths().fill_null(0).to_numpy(), np.int64)
    ids = np.asarray(lists.flatten().to_numpy(), np.int32)
    start = np.append(0, np.cumsum(sizes))
    columns = run.columns
    summed = np.bincount(columns.request, columns.n_tokens, columns.n_requests).astype(np.int64)
    wrong = int((summed != sizes).sum())
    fault = (
        f"{wrong} request(s) have another number of tokens than their steps sum to" if wrong else ""
    )
    if not fault and (ids < 0).any():
        fault = "the server tells how many tokens came, not which"
    return Tokens(ids, start, fault)


def by_category(counts: Floats | Ints, conversations: Conversations, weights: Floats) -> Floats:
    """(B, G, ...) weighted sums of per-conversation counts (C', ...) within each category."""
    n = len(conversations.categories)
    flat = np.asarray(counts, float).reshape(len(conversations.ids), -1)
    sums = np.zeros((len(weights), n, flat.shape[1]))
    for g in range(n):
        members = conversations.category == g
        sums[:, g] = weights[:, members] @ flat[members]
    return sums.reshape(len(weights), n, *np.shape(counts)[1:])
