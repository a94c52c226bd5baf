"""Expert activation: to which experts of a Mixture-of-Experts target its tokens went, per layer.

A batch of b tokens activates, in the mean over all batches drawn from the run's tokens without
putting any back, sum over experts e of 1 - C(N - m_e, b) / C(N, b) experts of a layer, where m_e of
the N tokens go to e. Real batches hold tokens of different requests, which this takes for drawn at
random; tokens of one request that are verified together are more alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from speedbench import store
from speedbench.columns import Floats, Ints
from speedbench.insights import rates
from speedbench.insights.figures import symmetric
from speedbench.insights.pairing import beside_prompts, is_random
from speedbench.insights.steps import Conversations, conversations_of
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure
from speedbench.types import RoutedExperts, UserError

Phase = Literal["prompt", "output"]
PHASES: tuple[Phase, ...] = ("prompt", "output")

N_RESAMPLES = 400
"""Fewer than elsewhere: a resample recounts every expert of every layer. Enough for a standard
deviation, which is all that the intervals here are made of."""


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One routed layer, or the mean over all of them.

    n_used      experts that any token went to
    activated   share of the experts that a batch of so many tokens activates, by batch size
    imbalance   tokens of the most used expert / mean over experts
    entropy     of the experts' shares of tokens, 1 if all are used alike
    """

    layer: int | None
    n_used: float
    activated: tuple[tuple[int, Figure], ...]
    imbalance: Figure
    entropy: Figure


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """The routed layers of one arm, for its prompt tokens or its output tokens.

    n_experts  of a layer: the highest id that any arm of the report names, plus one
    unrouted   layers in which a token has the same expert twice: they do not route
    """

    label: str
    phase: Phase
    n_experts: int
    top_k: int
    n_tokens: int
    layers: tuple[LayerUse, ...]
    mean: LayerUse | None
    unrouted: tuple[int, ...]
    n_left_out: int
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class ExpertDifference:
    """Experts activated per token batch: random prompts over real ones, mean over layers."""

    random: str
    real: str
    phase: Phase
    ratios: tuple[tuple[int, Figure], ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """How often each conversation's tokens went to each expert: counts (C', L, E) of a phase.

    n_tokens   (C',) tokens of the phase
    unrouted   (L,) layers in which some token has the same expert twice
    """

    label: str
    phase: Phase
    top_k: int
    conversations: Conversations
    counts: npt.NDArray[np.int32]
    n_tokens: Ints
    unrouted: npt.NDArray[np.bool_]
    n_left_out: int


def routing_of(arm: Arm) -> dict[Phase, Routing]:
    """The captured routing of an arm by phase; empty if none was captured.

    Requests whose experts are not of prompt + output - 1 tokens are left out, and counted. Raises
    UserError where a part cannot be read or two requests have different layers.
    """
    conversations, codes = conversations_of(arm)
    found: dict[Phase, _Counter] = {}
    n_left_out = 0
    for run, own in zip(arm.runs, codes, strict=True):
        if not any((directory / "experts").is_dir() for _, directory in store.sources(run)):
            continue  # nearly all runs: what follows walks over all their steps
        columns = run.columns
        names = run.turns["request_id"].take(run.used).to_pylist()
        row_of = {name: row for row, name in enumerate(names)}
        n_output = np.bincount(columns.request, columns.n_tokens, columns.n_requests)
        for name, experts in store.experts_of(run):
            row = row_of[name]
            code = int(own[columns.conversation[row]])
            if code < 0:
                continue
            n_prompt = int(columns.n_prompt_tokens[row])
            ids = _ids(experts, name)
            if len(ids) != n_prompt + int(n_output[row]) - 1:
                n_left_out += 1
                continue
            if not found:
                found = {phase: _Counter(len(conversations.ids), ids.shape) for phase in PHASES}
            found["prompt"].add(code, ids[:n_prompt])
            found["output"].add(code, ids[n_prompt:])
    return {
        phase: counter.routing(arm.label, phase, conversations, n_left_out)
        for phase, counter in found.items()
    }


def _ids(experts: RoutedExperts, name: str) -> Ints:
    shape = (experts.n_tokens, experts.n_layers, experts.top_k)
    ids = np.frombuffer(experts.expert_ids, "<i2")
    if ids.size != np.prod(shape) or (ids.size and ids.min() < 0):
        raise UserError(
            f"the experts of request {name} are {ids.size} ids from {ids.min(initial=0)}, expected "
            f"{np.prod(shape)} from 0: restore the part from a copy"
        )
    return ids.reshape(shape).astype(np.int64)


class _Counter:
    """Counts experts while requests come by; wider as higher ids are met."""

    def __init__(self, n_conversations: int, shape: tuple[int, ...]) -> None:
        _, self._n_layers, self._top_k = shape
        self._counts = np.zeros((n_conversations, self._n_layers, 0), np.int32)
        self._n_tokens = np.zeros(n_conversations, np.int64)
        self._unrouted = np.zeros(self._n_layers, bool)

    def add(self, code: int, ids: Ints) -> None:
        """ids: (tokens, layers, top k)."""
        if ids.shape[1:] != (self._n_layers, self._top_k):
            raise UserError(
                f"requests with experts of {self._n_layers} layers x {self._top_k} and of "
                f"{ids.shape[1]} x {ids.shape[2]} are in one arm: report runs of one model together"
            )
        if not len(ids):
            return
        width = int(ids.max()) + 1
        if width > self._counts.shape[2]:
            more = ((0, 0), (0, 0), (0, width - self._counts.shape[2]))
            self._counts = np.pad(self._counts, more)
        width = self._counts.shape[2]
        flat = (np.arange(self._n_layers)[None, :, None] * width + ids).ravel()
        counted = np.bincount(flat, minlength=self._n_layers * width)
        self._counts[code] += counted.reshape(self._n_layers, width).astype(np.int32)
        self._n_tokens[code] += len(ids)
        if self._top_k > 1:
            ordered = np.sort(ids, axis=2)
            self._unrouted |= (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(0, 2))

    def routing(
        self, label: str, phase: Phase, conversations: Conversations, n_left_out: int
    ) -> Routing:
        return Routing(
            label, phase, self._top_k, conversations, self._counts, self._n_tokens,
            self._unrouted, n_left_out,
        )  # fmt: skip


def expected_distinct(counts: Floats, n_tokens: Floats, batch: int) -> Floats:
    """(...) experts that a batch of `batch` of `n_tokens` (...) tokens activates, in the mean.

    counts: (..., E) tokens that go to each expert. Real-valued, because resampled counts are: the
    binomial coefficients are taken by the gamma function. NaN where there are fewer tokens.
    """
    from scipy.special import gammaln

    total = np.asarray(n_tokens, float)[..., None]
    others = total - np.asarray(counts, float)
    left = others - batch + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        log_missed = (
            gammaln(others + 1) - gammaln(left) - gammaln(total + 1) + gammaln(total - batch + 1)
        )
        missed = np.where(left <= 0, 0.0, np.exp(np.minimum(log_missed, 0.0)))
    distinct = (1 - missed).sum(axis=-1)
    return np.where(total[..., 0] >= batch, distinct, np.nan)


def imbalance(counts: Floats) -> Floats:
    """(...) most used expert / mean of all; NaN where no token was counted. counts: (..., E)"""
    mean = counts.mean(axis=-1)
    out: Floats = np.full(mean.shape, np.nan)
    np.divide(counts.max(axis=-1), mean, out=out, where=mean > 0)
    return out


def entropy(counts: Floats) -> Floats:
    """(...) entropy of the experts' shares over that of equal ones; NaN without a token or with a
    single expert. counts: (..., E)"""
    total = counts.sum(axis=-1, keepdims=True)
    share: Floats = np.zeros(counts.shape)
    np.divide(counts, total, out=share, where=total > 0)
    logs = np.log(share, out=np.zeros(share.shape), where=share > 0)
    whole = np.log(counts.shape[-1])
    known = (total[..., 0] > 0) & (whole > 0)
    return np.where(known, -(share * logs).sum(axis=-1) / (whole or 1.0), np.nan)


def uses(
    arms: Sequence[Arm], batch_tokens: Sequence[int]
) -> tuple[tuple[ExpertUse, ...], tuple[ExpertDifference, ...]]:
    """Expert use of every arm that captured it, and random arms against real ones."""
    routings = {arm.label: routing_of(arm) for arm in arms}
    n_experts = max(
        (one.counts.shape[2] for found in routings.values() for one in found.values()), default=0
    )
    sampled = {
        (label, phase): _sampled(one, n_experts, batch_tokens, seed)
        for seed, (label, found) in enumerate(routings.items())
        for phase, one in found.items()
    }
    told = tuple(_use(one, n_experts) for one in sampled.values())
    compared = tuple(
        _difference(sampled[random.label, phase], sampled[real.label, phase])
        for random in arms
        for real in arms
        for phase in PHASES
        if is_random(random)
        and not is_random(real)
        and (random.label, phase) in sampled
        and (real.label, phase) in sampled
        and not beside_prompts(random, real)
    )
    return told, compared


@dataclass(frozen=True, slots=True)
class _Sampled:
    """An arm's numbers per routed layer, once and resampled: (1 + B, L') each; row 0 is the
    estimate."""

    routing: Routing
    layers: Ints
    n_used: Ints
    distinct: dict[int, Floats]
    imbalance: Floats
    entropy: Floats
    degrees: int


def _sampled(routing: Routing, n_experts: int, batch_tokens: Sequence[int], seed: int) -> _Sampled:
    conversations = routing.conversations
    members = routing.n_tokens > 0
    weights = conversations.weights(N_RESAMPLES, seed)
    weights = np.concatenate([np.ones((1, weights.shape[1])), weights])
    layers = np.flatnonzero(~routing.unrouted)
    n_tokens = weights @ routing.n_tokens
    sizes = [b for b in batch_tokens if b <= routing.n_tokens.sum()]
    shape = (len(weights), len(layers))
    distinct = {b: np.full(shape, np.nan) for b in sizes}
    uneven, spread = np.full(shape, np.nan), np.full(shape, np.nan)
    for place, layer in enumerate(layers.tolist()):
        counts = np.zeros((len(conversations.ids), n_experts))
        counts[:, : routing.counts.shape[2]] = routing.counts[:, layer]
        sums = weights @ counts
        for b in sizes:
            distinct[b][:, place] = expected_distinct(sums, n_tokens, b)
        uneven[:, place], spread[:, place] = imbalance(sums), entropy(sums)
    n_used = (routing.counts.sum(axis=0) > 0).sum(axis=1)
    alone = rates.lone(conversations).any()
    degrees = 0 if alone else conversations.degrees(members)
    return _Sampled(routing, layers, n_used, distinct, uneven, spread, degrees)


def _use(sampled: _Sampled, n_experts: int) -> ExpertUse:
    routing = sampled.routing
    n_tokens = int(routing.n_tokens.sum())
    why = ""
    if not n_tokens:
        why = f"no {routing.phase} token was captured"
    elif not len(sampled.layers):
        why = "in every layer a token has the same expert twice: nothing is routed"
    places = range(len(sampled.layers)) if not why else ()
    layers = tuple(
        _layer(sampled, n_experts, [place], int(sampled.layers[place])) for place in places
    )
    mean = None if why else _layer(sampled, n_experts, list(places), None)
    return ExpertUse(
        routing.label,
        routing.phase,
        n_experts,
        routing.top_k,
        n_tokens,
        layers,
        mean,
        tuple(np.flatnonzero(routing.unrouted).tolist()),
        routing.n_left_out,
        why,
    )


def _layer(sampled: _Sampled, n_experts: int, places: list[int], layer: int | None) -> LayerUse:
    def of(values: Floats, lowest: float, highest: float) -> Figure:
        mean = values[:, places].mean(axis=1)
        return symmetric(float(mean[0]), mean[1:], sampled.degrees, lowest=lowest, highest=highest)

    return LayerUse(
        layer,
        float(sampled.n_used[sampled.layers[places]].mean()),
        tuple((b, of(values / n_experts, 0, 1)) for b, values in sampled.distinct.items()),
        of(sampled.imbalance, 1, n_experts),
        of(sampled.entropy, 0, 1),
    )


def _difference(random: _Sampled, real: _Sampled) -> ExpertDifference:
    ratios = []
    for b in random.distinct:
        if b in real.distinct:
            logs = np.log(random.distinct[b].mean(axis=1)) - np.log(real.distinct[b].mean(axis=1))
            found = symmetric(float(logs[0]), logs[1:], min(random.degrees, real.degrees))
            ratios.append((b, _exponential(found)))
    return ExpertDifference(
        random.routing.label, real.routing.label, random.routing.phase, tuple(ratios)
    )


def _exponential(found: Figure) -> Figure:
    if found.value is None:
        return found
    bounds = found.interval
    return Figure(
        float(np.exp(found.value)),
        None if bounds is None else (float(np.exp(bounds[0])), float(np.exp(bounds[1]))),
        found.why_not,
    )
