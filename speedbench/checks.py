"""Checks: columns + manifest -> sentences of doubt, printed above every report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from speedbench import metrics
from speedbench.columns import Columns, Ints
from speedbench.open_loop import arrivals_of
from speedbench.spans import APART, spans_of
from speedbench.store import FAILED, Run, expected_conversations, load_experts, n_output_tokens
from speedbench.types import EngineSettings

LOOKUP = ("NGRAM", "SUFFIX")
"""Algorithms that draft what was found, fewer than K tokens or none."""

TOLD, SAID = "as the server says", "as the user says"
"""Whose word the K of a server is (`draft_length_from`)."""


@dataclass(frozen=True, slots=True)
class Check:
    """error: a number below cannot be right; warning: read with care; note: good to know."""

    level: Literal["error", "warning", "note"]
    sentence: str


def all_checks(run: Run) -> tuple[Check, ...]:
    """The plausibility identities of DESIGN.md section 5, told only where they fail.

    AL <= K+1 and a monotone survival hold by construction: no step longer than K+1 is counted.
    """
    if "checks" not in run.computed:
        run.computed["checks"] = tuple(_all_checks(run))
    found: tuple[Check, ...] = run.computed["checks"]
    return found


def _all_checks(run: Run) -> Iterator[Check]:
    yield from _provenance(run)
    yield from _completeness(run)
    yield from _steps(run)
    yield from _server(run)
    yield from _draft_length(run)
    yield from _counters(run)
    yield from _rates(run)
    yield from _experts(run)
    yield from _closed_form(run)
    yield from _load(run)


def _error(sentence: str) -> Check:
    return Check("error", sentence)


def _warning(sentence: str) -> Check:
    return Check("warning", sentence)


def _note(sentence: str) -> Check:
    return Check("note", sentence)


def _provenance(run: Run) -> Iterator[Check]:
    engine, config = run.manifest["engine"], run.manifest["config"]
    if engine.get("simulated"):
        yield _error(
            "SIMULATED: the null engine made up the clock and the acceptances; nothing here is a "
            "measurement"
        )
    if config["temperature"] > 0 and engine.get("sampling_fault"):
        yield _error(f"at temperature {config['temperature']:g}: {engine['sampling_fault']}")
    asked = 0 if config["speculative_algorithm"] == "NONE" else config["draft_length"]
    left_out = asked == EngineSettings("").draft_length and _k_from(run) == TOLD
    if engine["draft_length"] != asked and not left_out:
        yield _warning(
            f"the engine drafts {engine['draft_length']} tokens per step, {asked} were asked for; "
            "numbers are given for what it did"
        )
    max_num_seqs, is_open = engine.get("max_num_seqs"), config.get("request_rate") is not None
    # Of an open loop the concurrency is a limit, which may never have been reached.
    if max_num_seqs is not None and max_num_seqs < config["concurrency"] and not is_open:
        yield _warning(
            f"the engine runs at most {max_num_seqs} requests at once, the concurrency was "
            f"{config['concurrency']}: the others waited, and their wait is in TTFT"
        )
    if engine.get("prefix_cache") and not config["prefix_cache"]:
        yield _warning("the engine's prefix cache is on though it was not asked for")
    source = engine.get("settings", {}).get("acceptance_from", "not told")
    if source != "not told":
        yield _note(f"acceptance is told by {source}")
    if is_chat(run.manifest):
        yield _note(
            "the prompts went as messages, which the server templated and encoded (--endpoint "
            "chat): that another run had identical inputs cannot be shown"
        )
    if config["trust_remote_code"]:
        yield _note("code shipped with the checkpoint was run (--trust_remote_code)")
    for sentence in run.damage:
        yield _error(sentence)


def is_chat(manifest: Mapping[str, Any]) -> bool:
    """Whether a server made the tokens of the prompts."""
    config = manifest["config"]
    return bool(config.get("url")) and config.get("endpoint") == "chat"


def _k_from(run: Run) -> object:
    """Whose word K is; None of an embedded engine."""
    return run.manifest["engine"].get("settings", {}).get("draft_length_from")


def _completeness(run: Run) -> Iterator[Check]:
    manifest, columns = run.manifest, run.columns
    status = manifest["status"]
    if status == "running":
        yield _warning("the run was killed, or is still going on: only what was committed is here")
    elif status != "complete":
        ends = _messages(manifest["sessions"])
        yield _warning(f"the run is {status}" + (f": {ends}" if ends else ""))
    if any(s.get("n_uncommitted") for s in manifest["sessions"]) and status != "complete":
        yield _warning(
            "conversations in flight at the end are missing, and they are the long ones: lengths "
            "and times below lean to short answers until --resume has measured them"
        )
    if (n_sessions := len({s["session"] for s in manifest["sessions"]})) > 1:
        yield _note(
            f"the run was resumed: {n_sessions} sessions; acceptance pools them, throughput does "
            "not"
        )
    if n_failed := int(columns.failed.sum()):
        reasons = [e for e in run.turns.take(run.used)["error"].to_pylist() if e]
        yield _warning(
            f"{n_failed} conversation(s) failed and are in no number below; first reason: "
            f"{reasons[0] if reasons else 'not told'}"
        )
    refused = manifest.get("refused", [])
    if refused:
        yield _warning(
            f"{len(refused)} row(s) were refused before the start, first {refused[0]['id']!r}: "
            f"{refused[0]['reason']}"
        )
    strays = sum(s.get("n_stray_steps") or 0 for s in manifest["sessions"])
    if strays:
        yield _warning(
            f"{strays} step(s) came for requests that were not in flight; they are in no number"
        )
    missing = sum(expected_conversations(run).values()) - len(columns.conversation_ids)
    if missing - len(refused) > 0:
        lacking = ", ".join(manifest.get("missing_shards", ()))
        yield _warning(
            f"{missing - len(refused)} conversation(s) have not been measured yet"
            + (f": the merged runs lack --shard {lacking}" if lacking else "")
        )


def _messages(sessions: Sequence[Mapping[str, Any]]) -> str:
    """Why the last session ended, of each of its replicas that says so."""
    last = max((s["session"] for s in sessions), default=0)
    told = [(s.get("replica", 0), s["message"]) for s in sessions if s["session"] == last
            and s.get("message")]  # fmt: skip
    if not told:  # an earlier one's is better than none
        told = [(s.get("replica", 0), s["message"]) for s in sessions if s.get("message")][-1:]
    several = len({s.get("replica", 0) for s in sessions}) > 1
    return "; ".join(f"replica {r}: {text}" if several else text for r, text in told)


def counted(run: Run) -> metrics.Acceptance:
    """The run's steps by length; the engine's habits at the end of a request taken into account."""
    if "counted" not in run.computed:
        run.computed["counted"] = _counted(run)
    found: metrics.Acceptance = run.computed["counted"]
    return found


def _counted(run: Run) -> metrics.Acceptance:
    engine, config = run.manifest["engine"], run.manifest["config"]
    k = int(engine["draft_length"])
    cut_short = None
    if engine.get("fits_drafts"):
        lookup = config["speculative_algorithm"] in LOOKUP
        cut_short = metrics.drafts_cut_short(run.columns, k, config["output_length"], lookup)
    return metrics.acceptance(run.columns, k, cut_short)


def _steps(run: Run) -> Iterator[Check]:
    columns, k = run.columns, int(run.manifest["engine"]["draft_length"])
    counts = counted(run)
    width = np.maximum(columns.n_tokens, columns.accepted + 1)
    too_long = int(((width > k + 1) & (columns.engine_steps == 1)).sum())
    if too_long:
        yield _error(
            f"{too_long} step(s) hold more than K+1 = {k + 1} tokens: the engine merged events, or "
            "its draft length is not what it says; they are in no histogram"
        )
    merged = int((columns.engine_steps != 1).sum())
    if merged:
        told = columns.told is not None and len(columns.told.request)
        counted_by = "what the server told of its requests is" if told else "they are"
        place = "in the histogram instead" if told else "in no histogram"
        yield _warning(
            f"{merged} of {len(columns.step)} events ({merged / len(columns.step):.1%}) merge "
            f"engine steps, or may: {counted_by} {place}, and step times lack them"
        )
    if columns.told is not None and columns.told.lengths.shape[1] > k + 2:
        yield _error(
            f"the server tells of verifications that accepted {columns.told.lengths.shape[1] - 2} "
            f"draft tokens, but K is {k}: those are in no histogram; give its --draft_length"
        )
    begins = columns.n_tokens[(columns.step == 0) & (columns.engine_steps != 1)]
    if (begins > 1).any():
        yield _warning(
            f"{int((begins > 1).sum())} request(s) begin with a chunk of several tokens, which may "
            "hold decode steps: their TTFT is that of the chunk"
        )
    first = columns.n_tokens[(columns.step == 0) & (columns.engine_steps == 1)]
    if (first > 1).any():
        yield _error(
            f"{int((first > 1).sum())} request(s) begin with several tokens: their prefill was "
            "merged with a decode step"
        )
    if (columns.n_tokens < 1).any():
        yield _error(f"{int((columns.n_tokens < 1).sum())} step(s) hold no token")
    yield from _told(columns)
    yield from _outputs(run)
    if counts.n_decode != int((counts.whole + counts.cut).sum()):
        yield _error("the histogram does not sum to the number of decode steps")
    yield from _clock(run)


def _told(columns: Columns) -> Iterator[Check]:
    """What the engine tells of a step beside what the step shows; only a last step shows less."""
    exact = (columns.step > 0) & (columns.engine_steps == 1)
    told = exact & (columns.drafted > 0) & (columns.accepted >= 0)
    said = columns.accepted + 1
    wrong = told & np.where(columns.is_last(), said < columns.n_tokens, said != columns.n_tokens)
    if wrong.any():
        yield _error(
            f"{int(wrong.sum())} step(s) show another number of tokens than the engine says it "
            "accepted"
        )
    beyond = (
        exact & (columns.drafted >= 0) & (np.maximum(columns.n_tokens, said) > columns.drafted + 1)
    )
    if beyond.any():
        yield _error(
            f"{int(beyond.sum())} step(s) hold more tokens than were drafted and one more: what "
            "the engine says of its drafts is not to be trusted"
        )


def _outputs(run: Run) -> Iterator[Check]:
    """Tokens of a request = sum of its steps; none longer than asked for."""
    columns = run.columns
    lengths = n_output_tokens(run)
    summed = np.bincount(columns.request, columns.n_tokens, columns.n_requests)
    if (lengths != summed).any():
        yield _error(
            f"{int((lengths != summed).sum())} request(s) have another number of tokens than their "
            "steps sum to"
        )
    limit = run.manifest["config"]["output_length"]
    if (lengths > limit).any():
        yield _error(f"{int((lengths > limit).sum())} request(s) are longer than {limit} tokens")
    yield from _context_limit(run, lengths)


def _context_limit(run: Run, lengths: Ints) -> Iterator[Check]:
    """Answers that ended before their limit, and those so near the engine's that it drafts less."""
    columns, engine = run.columns, run.manifest["engine"]
    k, longest = int(engine["draft_length"]), engine.get("max_seq_len")
    total = columns.n_prompt_tokens + lengths
    near = total > longest - 2 * (k + 1) if longest is not None else np.zeros(len(total), bool)
    reason = np.array(run.turns["finish_reason"].to_pylist(), dtype=object)[run.used]
    short = (reason == "length") & (lengths < run.manifest["config"]["output_length"]) & ~near
    if short.any():
        yield _error(
            f"{int(short.sum())} request(s) ended by the length limit with fewer tokens than that: "
            "steps of theirs are missing"
        )
    if k and near.any():
        yield _warning(
            f"{int(near.sum())} request(s) came within 2(K+1) tokens of the engine's limit of "
            f"{longest}, where engines draft fewer tokens or none: acceptance is understated; "
            f"raise --max_seq_len by {2 * (k + 1)} in both arms"
        )


def _clock(run: Run) -> Iterator[Check]:
    columns = run.columns
    first, last = columns.first_and_last()
    inside = np.diff(columns.request) == 0
    back = (np.diff(columns.time_ns) < 0) & inside
    early = columns.time_ns[first] < columns.submitted_ns[columns.request[first]]
    if back.any() or early.any():
        yield _error(
            f"the clock runs backwards in {int(back.sum() + early.sum())} place(s): "
            f"{int((~metrics.timed(columns)).sum())} request(s) are in no time below, and no "
            "throughput is given"
        )
    exact = columns.engine_steps[1:] == 1
    if (same := int(((np.diff(columns.time_ns) == 0) & inside & exact).sum())) > 0:
        yield _error(
            f"{same} step(s) came at the same instant as the one before: told twice, or stamped "
            "together; neither lengths nor times are to be trusted"
        )
    if outside := _outside_of_session(run):
        yield _error(
            f"{outside} step(s) are stamped outside of their session: the engine's clock is "
            "another one, and no time is to be trusted"
        )
    k = int(run.manifest["engine"]["draft_length"])
    n_steps = last - first
    one = n_steps == 0
    if not one.all() and (columns.engine_steps == 1).all():
        tokens = np.add.reduceat(columns.n_tokens, first) - columns.n_tokens[first]
        if (tokens > n_steps * (k + 1)).any():
            yield _error(f"a request made more than K+1 = {k + 1} tokens per step")


def _outside_of_session(run: Run) -> int:
    """How many steps are stamped before their session began or after it ended; of requests whose
    clock runs backwards, that is told."""
    spans = {
        (s["session"], s.get("replica", 0)): (s["started_ns"], s["ended_ns"])
        for s in run.manifest["sessions"]
        if s.get("started_ns") is not None and s.get("ended_ns") is not None
    }
    if run.manifest.get("merged"):  # of several clocks
        return 0
    columns, n = run.columns, 0
    timed = metrics.timed(columns)
    for (session, replica), (started_ns, ended_ns) in spans.items():
        mine = (columns.session == session) & (columns.replica == replica) & timed
        time_ns = columns.time_ns[mine[columns.request]]
        n += int(((time_ns < started_ns) | (time_ns > ended_ns)).sum())
    return n


def _server(run: Run) -> Iterator[Check]:
    for session in run.manifest["sessions"]:
        if session.get("served_others"):
            yield _warning(
                f"{session['why_no_counters']}; times and throughput below are of a shared server, "
                "and its counters are not used"
            )


def _draft_length(run: Run) -> Iterator[Check]:
    """K beside what was counted, whether or not that can be reconciled with the steps."""
    manifest = run.manifest
    k = int(manifest["engine"]["draft_length"])
    known = [c for s in manifest["sessions"] if (c := s.get("counters")) is not None]
    drafts, tokens = (sum(c[name] for c in known) for name in ("drafts", "draft_tokens"))
    counted = f"{tokens} draft tokens in {drafts} drafts were counted"
    if k == 0 and drafts:
        yield _error(
            f"{drafts} drafts were counted, but the run is recorded as one without speculation: "
            "it is no baseline; measure again with the server's --speculative_algorithm and "
            "--draft_length"
        )
    elif tokens > k * drafts:
        yield _error(
            f"{counted}, which is more than K = {k} each: no rate per draft token below is right; "
            "measure again with the real --draft_length"
        )
    elif (
        k
        and 0 < tokens <= (k - 1) * drafts
        and _k_from(run) == SAID
        and manifest["config"]["speculative_algorithm"] not in LOOKUP
    ):
        yield _warning(
            f"{counted}, which is less than K = {k} each: that K is only what --draft_length said"
        )


def _counters(run: Run) -> Iterator[Check]:
    """accepted = sum(n - 1) + cut; drafts = decode - plain + phantom, by name."""
    sessions = run.manifest["sessions"]
    counters = [s.get("counters") for s in sessions]
    columns, k = run.columns, int(run.manifest["engine"]["draft_length"])
    if k == 0 or not counters:
        return
    if None in counters:
        told = [s for s in sessions if s.get("why_no_counters")]
        if not told:
            yield _note(
                "the engine's own counters are not stored: nothing to reconcile the steps with"
            )
        elif not any(s.get("served_others") for s in told):
            yield _note(f"the server's counters are no use here: {told[0]['why_no_counters']}")
        return
    lost = any(s.get("n_uncommitted") or s.get("n_stray_steps") for s in sessions) or run.damage
    if lost or columns.failed.any() or run.n_retried:
        yield _note(
            "the engine's counters hold steps that are not in the records (of requests that "
            "failed or were cut off, or of unreadable parts): they cannot be reconciled"
        )
        return
    books = reconcile(run)
    if books["unexplained_accepted"]:
        yield _error(
            f"the engine counted {books['counter_accepted']} accepted tokens, the records hold "
            f"{books['accepted']} and {books['cut']} cut from final steps: "
            f"{books['unexplained_accepted']:+d} unexplained"
        )
    if books["unexplained_drafts"]:
        yield _error(
            f"the engine counted {books['counter_drafts']} drafts, the records hold "
            f"{books['decode']} decode steps, {books['plain']} of them plain, and "
            f"{books['phantom']} phantom drafts: {books['unexplained_drafts']:+d} unexplained"
        )
    if not books["exact"]:
        why = [
            f"of {books['untold']} step(s) it does not tell whether a draft was checked, or what "
            "was cut off",
            f"{books['merged']} event(s) may merge steps",
        ]
        found = [one for one, n in zip(why, ("untold", "merged"), strict=True) if books[n]]
        yield _note(
            "the engine's counters are reconciled within bounds only: "
            + " and ".join(found or why[:1])
        )


def reconcile(run: Run) -> Mapping[str, Any]:
    """The books: engine counters of the run beside what the records hold, and what is unexplained.

    unexplained_* is 0 where they agree; where steps are not told apart, where counters lie within
    the bounds that these steps leave open.
    """
    columns = run.columns
    k = int(run.manifest["engine"]["draft_length"])
    kinds = metrics.step_kinds(columns, k)
    decode = (kinds != metrics.PREFILL) & (kinds != metrics.MERGED)
    verify, plain = kinds == metrics.VERIFY, kinds == metrics.PLAIN
    untold = kinds == metrics.DECODE
    last = columns.is_last()
    told = columns.accepted >= 0
    cut = int((columns.accepted - (columns.n_tokens - 1))[verify & last & told].sum())
    room = metrics.room_left(columns, k)
    cut_open = (verify | untold) & last & ~told & (room > 0)
    # A merged event of n tokens stands for 1 to n steps, drafted or not: 0 to n - 1 accepted.
    merged = int((columns.n_tokens - 1)[kinds == metrics.MERGED].clip(0).sum())
    n_merged = int(columns.n_tokens[kinds == metrics.MERGED].sum())
    open_cut = int(room[cut_open].sum()) + merged
    phantom = int(((columns.step == 0) & (columns.drafted > 0)).sum())
    accepted = int((columns.n_tokens - 1)[decode].sum())
    n_untold = int(untold.sum())
    n_phantom_open = int(((columns.step == 0) & (columns.drafted < 0)).sum())
    counters = [s["counters"] for s in run.manifest["sessions"]]
    counter_accepted = sum(c["accepted"] for c in counters)
    counter_drafts = sum(c["drafts"] for c in counters)
    drafts = int(decode.sum()) - int(plain.sum()) + phantom
    return {
        "counter_accepted": counter_accepted,
        "counter_drafts": counter_drafts,
        "accepted": accepted,
        "cut": cut,
        "decode": int(decode.sum()),
        "plain": int(plain.sum()),
        "phantom": phantom,
        "untold": int((untold | cut_open).sum()),
        "merged": int((kinds == metrics.MERGED).sum()),
        "exact": n_untold == 0 and open_cut == 0 and n_phantom_open == 0 and n_merged == 0,
        "unexplained_accepted": _outside(counter_accepted - accepted - cut, 0, open_cut),
        "unexplained_drafts": _outside(
            counter_drafts - drafts, -n_untold, n_phantom_open + n_merged
        ),
    }


def _outside(value: int, low: int, high: int) -> int:
    """How far `value` lies outside low..high; 0 inside."""
    return value - high if value > high else value - low if value < low else 0


def _rates(run: Run) -> Iterator[Check]:
    k = int(run.manifest["engine"]["draft_length"])
    counts = counted(run)
    # Where an n-gram miss looks like a rejected draft, a low first position is no fault.
    lookup = run.manifest["config"]["speculative_algorithm"] in LOOKUP
    padded = run.manifest["engine"]["settings"].get("pads_drafts")
    if lookup and (padded or not counts.told_apart):
        return
    shown = (counts.whole_verify if counts.told_apart else counts.whole).sum(axis=0)
    shown = shown + (counts.cut_verify if counts.told_apart else counts.cut).sum(axis=0)
    # Cut steps as they look will do here; later positions are pooled, for each alone may be rare.
    reached = np.cumsum(shown[::-1])[::-1]
    tried, passed = int(reached[2:-1].sum()), int(reached[3:].sum())
    if k > 1 and reached[1] >= 100 and tried >= 10:
        first, later = reached[2] / reached[1], passed / tried
        if first < 0.5 * later:
            yield _warning(
                f"position 1 is accepted at {first:.3f}, later positions at {later:.3f}: a drafter "
                "is rarely that wrong only at its first token; look for a misconfigured engine "
                "(shifted positions, a wrong head, dropped arguments)"
            )
    n_accepted = int(
        (np.maximum(run.columns.accepted, run.columns.n_tokens - 1))[run.columns.step > 0]
        .clip(0)
        .sum()
    )
    if k and not lookup and n_accepted == 0 and int((run.columns.step > 0).sum()) >= 50:
        yield _warning(
            f"not one draft token was accepted in {int((run.columns.step > 0).sum())} steps: the "
            "drafter was made for another model, or its weights were not loaded"
        )
    if k and counts.n_decode and counts.told_apart and counts.n_verify == 0:
        told = "speculation was asked for, but not one draft was checked"
        yield _warning(f"{told}: the lookup never hit") if lookup else _error(told)


def _experts(run: Run) -> Iterator[Check]:
    """Captured experts: of every request, for the prompt and all output tokens but the last."""
    if not run.manifest["config"].get("capture_experts") or run.manifest.get("merged"):
        return
    captured = load_experts(run.directory)
    turns = run.turns.take(run.used)
    missing = wrong = 0
    for name, reason, n_prompt, output in zip(
        turns["request_id"].to_pylist(),
        turns["finish_reason"].to_pylist(),
        turns["n_prompt_tokens"].to_pylist(),
        turns["output_token_ids"].to_pylist(),
        strict=True,
    ):
        if reason in FAILED:
            continue
        experts = captured.get(name)
        missing += experts is None
        wrong += experts is not None and experts.n_tokens != n_prompt + len(output) - 1
    if missing or wrong:
        yield _error(
            f"--capture_experts was asked for, but {missing} request(s) came without experts and "
            f"{wrong} with those of another number of tokens than prompt + output - 1"
        )


def _closed_form(run: Run) -> Iterator[Check]:
    known = run.manifest.get("known_answer")
    if not known:
        return
    if known.get("ok"):
        yield _note(f"known-answer checkpoint: {known['sentence']}")
    else:
        yield _error(f"known-answer checkpoint: {known['sentence']}")


def _load(run: Run) -> Iterator[Check]:
    """Of an open loop: whether the engine kept up with what came."""
    manifest = run.manifest
    if manifest["config"].get("request_rate") is None or not len(run.columns.step):
        return
    why_not = APART if manifest.get("merged") else spans_of(manifest)[1]
    found = arrivals_of(run.columns, manifest["config"], why_not)
    if found.is_behind:
        yield _warning(
            "over-saturated: conversations came faster than they ended, or too many failed, so "
            "that latencies say nothing of the engine at a load that it can bear"
        )
