"""The nouns of a measurement, and the interface of an engine. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

Algorithm = Literal[
    "EAGLE3", "EAGLE", "DRAFT_TARGET", "NGRAM", "MTP", "MEDUSA", "PARD", "DFLASH", "SUFFIX", "NONE"
]
FinishReason = Literal["stop", "length", "error", "refused"]

UNKNOWN = -1
"""Stored where an engine does not tell how many tokens it drafted or accepted."""


class UserError(Exception):
    """The user can mend this: one sentence saying what was found, expected, and what to do.

    What it quotes from files and engines can neither break its line nor command a terminal.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(_printable(sentence))


def _printable(text: str) -> str:
    """Line breaks and tabs as blanks, every other character that does not print as its escape."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else " " if c in "\n\r\t" else c.encode("unicode_escape").decode()
        for c in text
    )


class EngineDiedError(Exception):
    """The engine is gone; what was measured so far is stored and the run can be resumed."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a dataset: user turns that are asked in order within one conversation.

    Exactly one of `turns` (text) and `token_turns` (token IDs, for datasets made of tokens) is
    non-empty.
    """

    id: str
    category: str
    turns: tuple[str, ...] = ()
    token_turns: tuple[tuple[int, ...], ...] = ()
    sub_category: str = ""

    @property
    def n_turns(self) -> int:
        return len(self.turns) or len(self.token_turns)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; one immutable object shared by all requests of a run.

    `stop_token_ids` holds every end-of-sequence id of the model (empty with `ignore_eos`), so no
    engine needs its own idea of where an answer ends. `extra` holds further sampling parameters
    in the engine's own spelling; an engine refuses those it does not know.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    stop_token_ids: tuple[int, ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One turn, ready for the engine: the prompt is token IDs, never text, but for a server that
    takes only text (`messages`)."""

    request_id: str
    token_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Which experts a Mixture-of-Experts target used for the tokens of one request.

    `expert_ids` holds (n_tokens, n_layers, top_k) int16, little-endian, row by row. The tokens are
    those the engine ran the target on and kept: prompt + output, the last output token excluded.
    """

    n_tokens: int
    n_layers: int
    top_k: int
    expert_ids: bytes


@dataclass(frozen=True, slots=True)
class ToldAcceptance:
    """What a server told of the verifications of one request, when it ended.

    source     who told it, in words for a report
    histogram  [j]: verifications that accepted j draft tokens, uncut
    n_drafted  draft tokens checked in all of them; None: not told
    accepted, drafted  of each verification in order; empty where only totals are told
    """

    source: str
    histogram: tuple[int, ...]
    n_drafted: int | None = None
    accepted: tuple[int, ...] = ()
    drafted: tuple[int, ...] = ()

    @property
    def n_verify(self) -> int:
        return sum(self.histogram)

    @property
    def n_accepted(self) -> int:
        return sum(j * n for j, n in enumerate(self.histogram))


@dataclass(frozen=True, slots=True)
class Served:
    """What a server told of one request, and what it was sent over.

    sent_ns         when it was handed to the connection (monotonic; the loop's stamp is earlier)
    new_connection  a connection was made for it: that is in its TTFT
    prompt_proof    "echoed": the server returned the token IDs it was asked, and they are those
                    that were sent; "counted": their number is; "": it does not tell
    n_prompt_tokens, n_cached_tokens  as the server counts; None: not told
    text            of the reply, from chats
    """

    sent_ns: int
    new_connection: bool
    prompt_proof: Literal["echoed", "counted", ""] = ""
    n_prompt_tokens: int | None = None
    n_cached_tokens: int | None = None
    acceptance: ToldAcceptance | None = None
    text: str | None = None


# A NamedTuple, not a dataclass: one is made for every step of every request, and a tuple is the
# cheapest immutable object Python has.
class Step(NamedTuple):
    """One engine iteration's output for one request, or the failure of that request.

    time_ns       monotonic clock (ns) of this host, as close to the engine's own stamp as it allows
    token_ids     the tokens this step added, stop token included
    engine_steps  1: exactly one engine step; >1: the engine merged so many; 0: it cannot say
    accepted      draft tokens the engine accepted, before any cut at the end; None: not told
    drafted       draft tokens it checked; 0: a step without a draft; None: not told
    finish_reason set on the last step of a request
    error         the request failed: one sentence; finish_reason is then "error"
    detail        on the last step only, from engines that tell per-step acceptance when a request
                  ends: (accepted, drafted) of every step of the request, UNKNOWN where not told;
                  it replaces `accepted` and `drafted` of all of them
    routed_experts  on the last step only, where they were asked for
    merged      on the last step only, from servers: engine steps of every event of the request,
                where that is known when it ends; it replaces `engine_steps` of all of them
    served      on the last step only, from servers
    """

    request_id: str
    time_ns: int
    token_ids: Sequence[int]
    engine_steps: int = 1
    accepted: int | None = None
    drafted: int | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    detail: Sequence[tuple[int, int]] | None = None
    routed_experts: RoutedExperts | None = None
    merged: Sequence[int] | None = None
    served: Served | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One turn's token IDs with the fingerprint of (row id, turn, token IDs).

    messages  (role, text), for a server that takes only those; the fingerprint is then of them
    """

    token_ids: Sequence[int]
    sha256: str
    messages: tuple[tuple[str, str], ...] = ()


class PromptRefusedError(Exception):
    """A turn that cannot be asked (one sentence why); the other rows go on."""


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """What was measured for one turn. `submitted_ns` is UNKNOWN for a refused turn."""

    request_id: str
    turn: int
    n_prompt_tokens: int
    prompt_sha256: str
    submitted_ns: int
    finish_reason: FinishReason
    error: str | None
    steps: Sequence[Step]

    def output_token_ids(self) -> list[int]:
        return [token for step in self.steps for token in step.token_ids]

    def reply(self) -> Sequence[int] | str:
        """What enters the history: its token IDs; its text where it was a chat."""
        served = self.steps[-1].served if self.steps else None
        if served is not None and served.text is not None:
            return served.text
        return self.output_token_ids()


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """A conversation whose last turn has ended: the unit that is committed to disk."""

    conversation_id: str
    category: str
    turns: tuple[TurnRecord, ...]


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """The engine's own speculative-decoding counters, cumulative since it started.

    `accepted_per_position[k]` counts drafts whose token k+1 was accepted.
    """

    drafts: int
    draft_tokens: int
    accepted: int
    accepted_per_position: tuple[int, ...] = ()

    def since(self, earlier: EngineCounters) -> EngineCounters:
        """What was counted after `earlier` was read."""
        before = earlier.accepted_per_position or (0,) * len(self.accepted_per_position)
        return EngineCounters(
            self.drafts - earlier.drafts,
            self.draft_tokens - earlier.draft_tokens,
            self.accepted - earlier.accepted,
            tuple(a - b for a, b in zip(self.accepted_per_position, before, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Effective settings, read back from the running engine, never echoed from the request.

    draft_length  the number of tokens the engine really drafts per step (0: no speculation)
    max_seq_len   longest prompt + output the engine takes (None: no limit known)
    vocab_size    token IDs it takes are below this (None: not known)
    tells_drafted it reports, per step, whether and how many tokens were drafted
    fits_drafts   it drafts no more than a request may still show, or up to a stop token: a last
                  step that accepted all of a short draft says nothing about what would follow
    simulated     its clock and acceptances are made up: nothing it says is a measurement
    sampling_fault  why what is drafted at temperature > 0 cannot be trusted here; '' if it can
    settings      everything else worth comparing between runs
    unused        defaults of ours that the installed version does not have
    """

    name: str
    version: str
    draft_length: int
    max_seq_len: int | None
    max_num_seqs: int | None
    prefix_cache: bool | None
    vocab_size: int | None = None
    tells_drafted: bool = False
    fits_drafts: bool = False
    simulated: bool = False
    sampling_fault: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server under test is, and how it is asked.

    api_key_env  environment variable that must hold the key (None: OPENAI_API_KEY may); the key
                 itself is nowhere else
    patience_s   a server that cannot be reached for so long is gone
    """

    url: str
    model: str
    endpoint: Literal["completions", "chat"] = "completions"
    request_timeout_s: float = 1800.0
    api_key_env: str | None = None
    metrics_url: str | None = None
    patience_s: float = 30.0


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an adapter is told: the same words for every engine; adapters translate."""

    model_dir: str
    draft_model_dir: str | None = None
    algorithm: Algorithm = "NONE"
    draft_length: int = 3
    draft_sample_method: str | None = None
    block_size: int | None = None
    concurrency: int = 1
    max_seq_len: int | None = None
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    prefix_cache: bool = False
    seed: int = 0
    trust_remote_code: bool = False
    capture_experts: bool = False
    engine_args: Mapping[str, object] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)  # to be refused before a long start
    server: ServerSettings | None = None


class Engine(Protocol):
    """A running engine. `submit` and `poll` are called from one thread only."""

    def submit(self, request: Request) -> None:
        """Hand over one request and return at once. Its failure arrives as a Step with `error`."""

    def poll(self) -> Sequence[Step]:
        """Block until at least one step is known, then return all that are, oldest first.

        Raises EngineDiedError if no step can come any more.
        """

    def counters(self) -> EngineCounters | None:
        """The engine's own counters; None if it has none (or no speculation)."""

    def describe(self) -> EngineInfo:
        """Effective settings, read back from the engine."""

    def forget(self) -> None:
        """Drop what the engine learned from requests: prefix cache, n-gram tables."""

    def close(self) -> None:
        """End the engine and every process it started. May be called twice."""


@runtime_checkable
class TimedEngine(Engine, Protocol):
    """An engine that can be asked at given moments (--request_rate)."""

    def poll_for(self, timeout_s: float) -> Sequence[Step]:
        """Like `poll`, but for so long at most, with or without a step; also without a request."""


@dataclass(frozen=True, slots=True)
class Support:
    """What is known about one algorithm on one engine, and how.

    proof   "real": its steps were held against the closed form on the real engine, see `where`;
            "contract": its arguments were held against the engine's recorded interface;
            "mapped": named as the engine's documentation says, no more;
            "absent": the engine does not have it (`note` says why)
    where   engine versions and hardware of the proof
    note    what a user must know, one sentence
    """

    proof: Literal["real", "contract", "mapped", "absent"]
    where: str = ""
    note: str = ""


class EngineAdapter(Protocol):
    """What a class in `engines/` offers beside `Engine`: it can be asked before it is started."""

    algorithms: Sequence[Algorithm]
    """Algorithms it can be asked for."""
    versions: str
    """Versions of the engine it is written for."""
    support: Mapping[Algorithm, Support]
    """How each algorithm was proven; those it lacks are here, too."""
    owns_ranks: bool
    """Whether a launcher's ranks belong to the engine: its replicas are then separate jobs."""
    node_args: Mapping[str, str]
    """Our word (n_nodes, node_rank, host, port, address) -> the engine's argument, for engines
    that are spread over nodes by starting one process on each; empty for others."""
    max_concurrency: int | None
    """Requests it decodes at a time, at most; None: as many as are asked for."""
    flag_of: Mapping[str, str]
    """Engine argument -> the speedbench flag that sets it (an argument we own)."""
    samples_as_started: bool
    """Whether it settles at its start if it decodes greedily or samples: what asks for the one is
    then not measured on an engine that was started for the other."""
    remembers: Sequence[Algorithm]
    """Algorithms that draft from the answers to earlier requests, which `forget` cannot drop: each
    measurement with them is made on a newly started engine."""
    forgets_prompts: bool
    """Whether `forget` drops the prefix cache; if not, each measurement with it is made on a newly
    started engine, too."""
    calibration_args: Mapping[Algorithm, Mapping[str, object]]
    """Engine arguments under which an algorithm's steps are a known answer."""

    def __call__(self, settings: EngineSettings) -> Engine:
        """Start the engine. Raises UserError where the user can mend it."""
