"""Rates of an arm: acceptance length and user TPS under resampling, output TPS run by run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from speedbench import metrics, store
from speedbench.columns import Bools, Floats, Ints
from speedbench.insights.steps import (
    Conversations,
    by_category,
    conversations_of,
    steps_of,
)
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure, throughput
from speedbench.store import Run


def al_of(arm: Arm, weights: Floats) -> Floats:
    """(B,) `al`: steps equal within a category, then the mean over categories."""
    steps = steps_of(arm)
    conversations = steps.conversations
    counts = steps.counts(np.zeros(len(steps.length), np.int64), 1)
    whole, cut = (by_category(one, conversations, weights)[:, :, 0] for one in counts)
    found = metrics.acceptance_length(whole, cut)
    return mean_over(found, present(conversations))


def user_tps_of(arm: Arm, weights: Floats) -> Floats:
    """(B,) geometric mean of the conversations' user TPS (of their repeats first), within a
    category and then over categories."""
    conversations, _ = conversations_of(arm)
    logs = conversation_log_tps(arm)
    known = ~np.isnan(logs)
    values = np.where(known, logs, 0.0)
    sums = by_category(values, conversations, weights)
    counts = by_category(known.astype(float), conversations, weights)
    means: Floats = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return np.exp(mean_over(means, present(conversations)))


def conversation_log_tps(arm: Arm) -> Floats:
    """(C',) mean over the runs of the logarithm of user TPS; NaN where no run has it."""
    conversations, codes = conversations_of(arm)
    n = len(conversations.ids)
    total, count = np.zeros(n), np.zeros(n)
    for run, own in zip(arm.runs, codes, strict=True):
        tps = metrics.conversation_user_tps(run.columns)
        good = (own >= 0) & (np.nan_to_num(tps) > 0)
        total += np.bincount(own[good], np.log(tps[good]), n)
        count += np.bincount(own[good], minlength=n)
    out: Floats = np.full(n, np.nan)
    np.divide(total, count, out=out, where=count > 0)
    return out


def present(conversations: Conversations) -> Ints:
    return np.unique(conversations.category)


def mean_over(values: Floats, categories: Ints) -> Floats:
    """(B,) mean over the categories that have conversations; NaN if one of them is."""
    if not len(categories):
        return np.full(len(values), np.nan)
    return np.asarray(values[:, categories].mean(axis=1), float)


def lone(conversations: Conversations) -> Bools:
    """(G,) categories with a single conversation, of which no spread is known."""
    sizes = np.bincount(conversations.category, minlength=len(conversations.categories))
    return np.asarray(sizes == 1, bool)


def output_tps(run: Run) -> tuple[Figure, Figure]:
    """Output TPS over the whole run and over the steady window."""
    whole, (steady, _), _ = throughput(run)
    return whole, steady


def why_no_gpu(manifest: Mapping[str, Any]) -> str:
    """Why nothing of a run is told per GPU; '' if it can be."""
    engine = manifest["engine"]
    if engine.get("simulated") or engine.get("settings", {}).get("device") == "cpu":
        return "the engine used no GPU"
    return "" if manifest["environment"].get("gpus") else "no GPU was found on this machine"


def n_gpus(arm: Arm) -> tuple[int, str]:
    """GPUs the arm's engines used, and why that is not known or none ('' otherwise)."""
    manifest = arm.manifest
    if why := why_no_gpu(manifest):
        return 0, why
    config = manifest["config"]
    each = int(config["tp_size"]) * int(config["pp_size"]) * int(config["dp_size"])
    return each * store.n_replicas_of(manifest), ""
