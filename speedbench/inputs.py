"""What a run asks: rows selected and encoded before any engine starts; the prompt of each turn."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speedbench import (
    arrivals,
    chat,
    datasets,
    prompts,
    store,
)
from speedbench.config import RunConfig
from speedbench.datasets import tokens
from speedbench.loop import PromptFor
from speedbench.types import (
    UNKNOWN,
    Conversation,
    EngineInfo,
    Prompt,
    PromptRefusedError,
    UserError,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run's input, complete before any engine starts.

    rows         what is to be asked: the configured share of the selected rows
    prompts      (conversation id, turn) -> prompt, of all first turns, and of all turns where
                 the history is frozen; of the other shares' rows, too
    fingerprint  sha256 over those
    n_selected   category -> rows selected, of which `rows` are a share
    is_chat      the prompts are sent as text, as messages, and fingerprinted as such
    """

    dataset: datasets.Dataset
    rows: tuple[Conversation, ...]
    encoder: prompts.PromptEncoder | None
    prompts: Mapping[tuple[str, int], Prompt]
    fingerprint: str
    all_turns: bool
    stop_token_ids: tuple[int, ...] = ()
    n_selected: Mapping[str, int] = field(default_factory=dict)
    is_chat: bool = False

    @property
    def expected(self) -> Counter[str]:
        return Counter(row.category for row in self.rows)


def prepare(config: RunConfig) -> Prepared:
    """Read, select and encode what will be asked. Raises UserError."""
    refuse_missing_checkpoints(config)
    if config.prompts is not None:
        return _pretokenized(config, Path(config.prompts))
    needs_text = config.dataset != "random"
    has_tokenizer = config.tokenizer is not None or config.model_dir is not None
    if needs_text and not has_tokenizer:
        raise UserError(
            f"--dataset {config.dataset} is text and needs a tokenizer: add --model_dir or "
            "--tokenizer"
        )
    encoder = prompts.PromptEncoder(config) if has_tokenizer else None
    vocabulary: Sequence[int] = encoder.ordinary_token_ids if encoder else range(1000)
    dataset = datasets.load(config, vocabulary)
    rows = datasets.select(dataset, config)
    encoded: dict[tuple[str, int], list[int]]
    if config.history == "frozen":
        replies = _frozen_replies(config)
        rows = _with_replies(rows, replies, config)
        all_turns = _need(encoder).encode_all_turns_frozen(rows, replies)
        encoded = {
            (row.id, turn): ids
            for row, turns in zip(rows, all_turns, strict=True)
            for turn, ids in enumerate(turns)
        }
    elif encoder is not None:
        first = encoder.encode_first_turns(rows)
        encoded = {(row.id, 0): ids for row, ids in zip(rows, first, strict=True)}
    else:
        encoded = {(row.id, 0): list(row.token_turns[0]) for row in rows}
    hashed = {
        key: Prompt(ids, prompts.turn_sha256(key[0], key[1], ids)) for key, ids in encoded.items()
    }
    if config.endpoint == "chat":
        row_of = {row.id: row for row in rows}
        earlier = replies if config.history == "frozen" else {}
        hashed = {
            (name, turn): chat.prompt(row_of[name], turn, earlier.get(name, ()), ids)
            for (name, turn), ids in encoded.items()
        }
    share = _due_rows(rows[config.share], config)
    if not share:
        raise UserError(
            f"--shard {config.shard} of {len(rows)} rows is empty: use at most {len(rows)} shards"
        )
    return Prepared(
        dataset,
        share,
        encoder,
        hashed,
        prompts.fingerprint({key: prompt.sha256 for key, prompt in hashed.items()}),
        config.history == "frozen" or all(row.n_turns == 1 for row in rows),
        encoder.eos_token_ids if encoder else (),
        Counter(row.category for row in rows),
        config.endpoint == "chat",
    )


def _due_rows(rows: Sequence[Conversation], config: RunConfig) -> tuple[Conversation, ...]:
    """Of an open loop, those that come before --duration is over."""
    if config.request_rate is None or config.duration is None:
        return tuple(rows)
    due = arrivals.due_ns(
        config.request_rate, len(rows), config.arrivals, config.seed, config.duration
    )
    return tuple(rows[: len(due)])


NOT_INPUT = frozenset(
    {
        "tp_size", "pp_size", "dp_size", "ep_size", "max_seq_len", "prefix_cache",
        "capture_experts", "engine_args", "speculative_algorithm", "draft_model_dir",
        "draft_length", "draft_sample_method", "block_size", "output_length", "temperature",
        "top_p", "top_k", "ignore_eos", "sampling_kwargs", "concurrency", "max_num_seqs", "warmup",
        "max_duration", "stall_timeout", "goodput", "save_dir", "show_progress",
    }
)  # fmt: skip
"""Configuration fields that change nothing in what `prepare` makes."""


def input_identity(config: RunConfig) -> str:
    """Equal for configurations whose prepared input is the same, so that it is made once."""
    values = config.model_dump(mode="json", exclude=set(NOT_INPUT))
    return json.dumps(values, sort_keys=True)


def refuse_missing_checkpoints(config: RunConfig) -> None:
    """Raise UserError for a checkpoint folder that is none."""
    if config.engine != "NULL":
        _refuse_missing("model_dir", config.model_dir)
        _refuse_missing("draft_model_dir", config.draft_model_dir)


def _refuse_missing(flag: str, value: str | None) -> None:
    """Raise UserError for a checkpoint folder that is none; a hub id is left to the engine."""
    if value is None:
        return
    if not value:
        raise UserError(f"--{flag} is empty: give a checkpoint's folder or a hub id")
    path = Path(value)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"--{flag} {value} has no config.json: give the folder of a checkpoint in "
                "Hugging Face format"
            )
    elif path.exists() or path.is_absolute() or value[0] in ".~" or value.count("/") > 1:
        raise UserError(f"--{flag} {value} is no folder: give a checkpoint's folder or a hub id")


def _pretokenized(config: RunConfig, path: Path) -> Prepared:
    """The prompts of a token file, as they are: no tokenizer is loaded."""
    found = tokens.read(path)
    _same_tokenizer(found, config)
    rows = datasets.select(found.dataset, config)
    kept = {(row.id, turn) for row in rows for turn in range(row.n_turns)}
    hashed = {key: prompt for key, prompt in found.prompts.items() if key in kept}
    share = _due_rows(rows[config.share], config)
    if not share:
        raise UserError(f"--shard {config.shard} of {len(rows)} rows is empty: use fewer shards")
    return Prepared(
        found.dataset,
        share,
        None,
        hashed,
        prompts.fingerprint({key: prompt.sha256 for key, prompt in hashed.items()}),
        True,
        found.eos_token_ids,
        Counter(row.category for row in rows),
    )


def _same_tokenizer(found: tokens.TokenFile, config: RunConfig) -> None:
    """A token file must be of the model's own tokenizer, where the model's folder holds one."""
    folders: list[Mapping[str, Any]] = list(found.about["tokenizer_files"].values())
    made = folders[0].get("files", {}) if folders else {}
    for name in ("tokenizer.json", "tokenizer.model"):
        own = Path(config.model_dir or "") / name
        if config.model_dir and name in made and own.is_file():
            sha256 = hashlib.sha256(own.read_bytes()).hexdigest()
            if sha256 != made[name]:
                raise UserError(
                    f"--prompts {config.prompts} was encoded with {found.about['tokenizer']}, "
                    f"whose {name} is not that of {config.model_dir}: make one for this model"
                )


def _need(encoder: prompts.PromptEncoder | None) -> prompts.PromptEncoder:
    if encoder is None:
        raise UserError("a frozen history is text and needs a tokenizer: add --tokenizer")
    return encoder


def _frozen_replies(config: RunConfig) -> Mapping[str, tuple[str, ...]]:
    """Earlier replies as text, from a JSONL file or from the stored outputs of a run."""
    source = Path(config.history_from or "")
    if not source.is_dir():
        return prompts.read_history(source)
    run = store.load(source)
    told = run.manifest["config"]
    encoder = prompts.PromptEncoder(
        config.model_copy(update={"tokenizer": told["tokenizer"] or told["model_dir"]})
    )
    replies: dict[str, dict[int, str]] = {}
    turns = run.turns.take(run.used)
    for name, turn, reason, ids in zip(
        turns["conversation_id"].to_pylist(),
        turns["turn"].to_pylist(),
        turns["finish_reason"].to_pylist(),
        turns["output_token_ids"].to_pylist(),
        strict=True,
    ):
        if UNKNOWN in ids:
            raise UserError(
                f"--history_from {source} holds no answers: its server told how many tokens came, "
                "not which; give the run of another engine"
            )
        if reason not in store.FAILED:
            replies.setdefault(name, {})[turn] = encoder.reply_text(ids)
    return {name: tuple(by[t] for t in sorted(by)) for name, by in replies.items()}


def _with_replies(
    rows: Sequence[Conversation], replies: Mapping[str, Sequence[str]], config: RunConfig
) -> tuple[Conversation, ...]:
    """All rows, checked to have a reply for every turn but the last."""
    short = [row.id for row in rows if len(replies.get(row.id, ())) < row.n_turns - 1]
    if short:
        raise UserError(
            f"--history_from {config.history_from} lacks replies for {len(short)} row(s), first "
            f"{short[0]!r}: give a source that holds every turn, or leave those rows out"
        )
    return tuple(rows)


def within_limit(
    config: RunConfig, prepared: Prepared, info: EngineInfo
) -> tuple[list[Conversation], list[dict[str, Any]]]:
    """Rows whose known prompts the engine can take, and a record of each that is refused. Raises
    UserError if there is none."""
    rows: list[Conversation] = []
    refused: list[dict[str, Any]] = []
    for row in prepared.rows:
        known = [p for t in range(row.n_turns) if (p := prepared.prompts.get((row.id, t)))]
        longest = max(known, key=lambda prompt: len(prompt.token_ids))
        reasons = (unfit(prompt, config.output_length, info) for prompt in known)
        if reason := next(filter(None, reasons), ""):
            refused.append(
                {
                    "id": row.id,
                    "category": row.category,
                    "n_prompt_tokens": len(longest.token_ids),
                    "reason": reason,
                }
            )
        else:
            rows.append(row)
    if not rows:
        raise UserError(
            f"none of the {len(refused)} rows can be asked, the first because "
            f"{refused[0]['reason']}"
        )
    return rows, refused


def unfit(prompt: Prompt, output_length: int, info: EngineInfo) -> str:
    """Why the engine cannot take a prompt, or ''. A token outside the vocabulary would not fail
    its own request: it kills the engine."""
    n_prompt = len(prompt.token_ids)
    if info.max_seq_len is not None and n_prompt + output_length > info.max_seq_len:
        return (
            f"its prompt of {n_prompt} tokens and an output of {output_length} exceed the engine's "
            f"limit of {info.max_seq_len}: lower --output_length, or raise --max_seq_len as far as "
            "the model allows"
        )
    if info.vocab_size is not None and max(prompt.token_ids, default=0) >= info.vocab_size:
        return (
            f"it holds token {max(prompt.token_ids)}, the model's vocabulary ends at "
            f"{info.vocab_size}: use the tokenizer that belongs to the model"
        )
    return ""


def prompt_source(config: RunConfig, prepared: Prepared, info: EngineInfo) -> PromptFor:
    """First (or frozen) turns from memory; a live later turn is encoded when it is asked for."""

    def prompt_for(row: Conversation, turn: int, replies: Sequence[Sequence[int] | str]) -> Prompt:
        try:
            prompt = prompt_of(prepared, row, turn, replies)
        except UserError as refusal:  # a template that does not take this turn
            raise PromptRefusedError(str(refusal)) from None
        if turn and (reason := unfit(prompt, config.output_length, info)):
            raise PromptRefusedError(f"turn {turn} was refused: {reason}")
        return prompt

    return prompt_for


def prompt_of(
    prepared: Prepared, row: Conversation, turn: int, replies: Sequence[Sequence[int] | str]
) -> Prompt:
    """The prompt of a turn, given the earlier replies: token IDs, or the text of a chat. Raises
    UserError for a turn that cannot be asked."""
    known = prepared.prompts.get((row.id, turn))
    if known is not None:
        return known
    if row.token_turns or prepared.encoder is None:
        ids = list(row.token_turns[turn])
    else:
        texts = [_reply_text(reply, prepared.encoder) for reply in replies]
        ids = prepared.encoder.encode_turn_from_text(row, turn, texts)
        if prepared.is_chat:
            return chat.prompt(row, turn, texts, ids)
    return Prompt(ids, prompts.turn_sha256(row.id, turn, ids))


def _reply_text(reply: Sequence[int] | str, encoder: prompts.PromptEncoder) -> str:
    if isinstance(reply, str):
        return reply
    if UNKNOWN in reply:
        raise UserError(
            "the server tells no token IDs, so what it replied cannot become history: use "
            "--history frozen, or --endpoint chat"
        )
    return encoder.reply_text(reply)
