"""Prompts: conversation turns become token IDs, outside the engine, and their fingerprint."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from speedbench.config import RunConfig
from speedbench.types import Conversation, UserError
from speedbench.words import first_line

BATCH_ROWS = 256
"""Prompts per call of the tokenizer: enough to fill every core; a call keeps about 100 bytes per
token until it returns, so all rows of a long-input benchmark at once would not fit in memory."""

PROMPT_DATE = datetime(2024, 7, 26)
"""What `strftime_now` says in a chat template. With the real date the same row has another prompt
tomorrow, and two arms could not be compared; Llama 3's own templates fall back to this one."""

THINK, END_THINK = "<think>", "</think>"

_NOT_ARGUMENTS = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Variables of a chat template that are set for it; so are those named `..._token`."""


class PromptEncoder:
    """Chat template and tokenizer of one run.

    A prompt begins with one BOS where the tokenizer or the template puts any, and nothing is
    appended to it. With --completions there is no template: a later turn is the earlier text, the
    reply and the new user text, joined by newlines. Turns that are token IDs pass untouched, each
    as the whole prompt of its turn.
    """

    eos_token_ids: tuple[int, ...]
    """Every end-of-sequence id of the model and its tokenizer, sorted."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._source, flag = _source(config)
        self._tokenizer = _load_tokenizer(self._source, flag, config.trust_remote_code)
        self.eos_token_ids = _eos_token_ids(config.model_dir, self._tokenizer.eos_token_id)
        self._template = self._checked_template()
        self._head, self._adds_head = self._probe_head()

    @cached_property
    def ordinary_token_ids(self) -> Sequence[int]:
        """The vocabulary without special and added tokens, sorted."""
        tokenizer = self._tokenizer
        extra = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        return sorted(set(tokenizer.get_vocab().values()) - extra)

    def encode_first_turns(self, rows: Sequence[Conversation]) -> list[list[int]]:
        """Turn 0 of every row. Raises UserError if the tokenizer cannot tell the rows apart."""
        encoded: list[list[int]] = []
        texts: set[int] = set()
        for start in range(0, len(rows), BATCH_ROWS):  # not all rendered texts at a time
            prompts = [self._prompt(row, 0, ()) for row in rows[start : start + BATCH_ROWS]]
            texts.update(hash(prompt) for prompt in prompts if isinstance(prompt, str))
            encoded += self._encode(prompts)
        # transformers may load a tokenizer that knows none of the text and drops it silently.
        n_texts = len(texts)
        n_prompts = len({(len(ids), *ids[:64], *ids[-64:]) for ids in encoded})
        if n_texts > 1 and n_prompts < n_texts / 2:
            raise UserError(
                f"the tokenizer of {self._source} ({type(self._tokenizer).__name__}) turns "
                f"{n_texts} different prompts into {n_prompts} token sequence(s), the first of "
                f"{len(encoded[0])} token(s): give --tokenizer the one that belongs to the model"
            )
        return encoded

    def encode_turn(
        self, row: Conversation, turn: int, replies: Sequence[Sequence[int]]
    ) -> list[int]:
        """A later turn of a live conversation, from the output tokens of all turns before it."""
        return self.encode_turn_from_text(row, turn, [self.reply_text(ids) for ids in replies])

    def encode_turn_from_text(
        self, row: Conversation, turn: int, replies: Sequence[str]
    ) -> list[int]:
        """The same from replies that `reply_text` made."""
        return self._encode([self._prompt(row, turn, replies)])[0]

    def encode_all_turns_frozen(
        self, rows: Sequence[Conversation], history: Mapping[str, Sequence[str]]
    ) -> list[list[list[int]]]:
        """Every turn of every row with the replies of `history` (conversation id -> replies).

        A row needs one reply less than it has turns; further ones are ignored.
        """
        prompts = []
        for row in rows:
            replies = history.get(row.id, ())
            if row.turns and len(replies) < row.n_turns - 1:
                raise UserError(
                    f"the frozen history holds {len(replies)} replies for conversation {row.id!r}, "
                    f"expected {row.n_turns - 1}: use a --history_from that holds all of them"
                )
            prompts += [self._prompt(row, turn, replies) for turn in range(row.n_turns)]
        encoded = iter(self._encode(prompts))
        return [[next(encoded) for _ in range(row.n_turns)] for row in rows]

    def reply_text(self, token_ids: Sequence[int]) -> str:
        """A reply as it enters the history: its text as --postprocess asks, stop token off."""
        ids = [int(token) for token in token_ids]
        while ids and ids[-1] in self.eos_token_ids:
            ids.pop()
        if self._config.postprocess == "gptoss":
            return final_message(self._decode(ids, skip_special=False))
        # Reasoning tags that the template looks for must survive, special tokens or not.
        text, start = "", 0
        for end, token in enumerate(ids):
            if tag := self._special_tags.get(token):
                text += self._decode(ids[start:end]) + tag
                start = end + 1
        return text + self._decode(ids[start:])

    def _decode(self, ids: list[int], skip_special: bool = True) -> str:
        # The clean-up would strip spaces before punctuation, which the model did write.
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text

    @cached_property
    def _special_tags(self) -> dict[int, str]:
        """Special tokens at which the template, or we for it, split a reply: id -> text."""
        tags = set(re.findall(r"""split\(\s*['"](.+?)['"]""", self._template))
        if "reasoning_content" in self._template:
            tags |= {THINK, END_THINK}
        added = self._tokenizer.added_tokens_decoder.items()
        return {
            id_: token.content for id_, token in added if token.special and token.content in tags
        }

    def _prompt(self, row: Conversation, turn: int, replies: Sequence[str]) -> str | list[int]:
        """One turn's prompt: text still to be encoded, or the token IDs it is made of."""
        if row.token_turns:
            return list(row.token_turns[turn])
        if len(replies) < turn:
            raise ValueError(
                f"turn {turn} of {row.id!r} follows {turn} replies, not {len(replies)}"
            )
        if self._config.completions:
            pairs = zip(row.turns[:turn], replies, strict=False)
            return "\n".join([*(text for pair in pairs for text in pair), row.turns[turn]])
        messages: list[dict[str, str]] = []
        for text, reply in zip(row.turns[:turn], replies, strict=False):
            messages += [{"role": "user", "content": text}, self._reply_message(reply)]
        messages.append({"role": "user", "content": row.turns[turn]})
        return self._render(messages, f"conversation {row.id!r}, turn {turn + 1}")

    def _reply_message(self, reply: str) -> dict[str, str]:
        """A reply as a message. A template that takes reasoning in a field of its own gets it there
        and keeps or drops it; every other template gets the text whole and may split it itself.
        """
        if "reasoning_content" in self._template:
            reasoning, closed, answer = reply.partition(END_THINK)
            opened = reasoning.lstrip().startswith(THINK) or self._opens_reasoning
            if closed or opened:
                reasoning = reasoning.lstrip().removeprefix(THINK).strip("\n")
                answer = answer.lstrip("\n")
                return {"role": "assistant", "content": answer, "reasoning_content": reasoning}
        return {"role": "assistant", "content": reply}

    @cached_property
    def _opens_reasoning(self) -> bool:
        """The template itself opens the reasoning, so that replies begin inside it."""
        prompt = self._render([{"role": "user", "content": "a"}], "a first turn")
        return prompt.rstrip().endswith(THINK)

    def _render(self, messages: list[dict[str, str]], what: str) -> str:
        arguments = dict(self._config.chat_template_args)
        if "strftime_now" in self._template:
            arguments["strftime_now"] = PROMPT_DATE.strftime
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **arguments
            )
        except Exception as error:  # noqa: BLE001 - a template is a program and may raise anything
            raise UserError(
                f"{what} does not fit the chat template of {self._source} ({first_line(error)}): "
                "remove the row, or add --completions to send bare text"
            ) from None
        return text

    def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Prompts still in text become token IDs, many in one call so that all cores work."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(
            ids
            for start in range(0, len(texts), BATCH_ROWS)
            for ids in self._token_ids(texts[start : start + BATCH_ROWS])
        )
        return [
            self._with_one_head(next(encoded)) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]

    def _token_ids(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        try:
            ids: list[list[int]] = self._tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # a long prompt is refused by row later, not warned of here
            )["input_ids"]
        except Exception as error:  # noqa: BLE001 - tokenizers raise bare Exception
            raise UserError(
                f"the tokenizer of {self._source} cannot encode a prompt ({first_line(error)}): "
                "use a tokenizer that knows every character, or other rows"
            ) from None
        return ids

    def _with_one_head(self, ids: list[int]) -> list[int]:
        """`ids` with BOS once at the front, however many the template and the text put there."""
        start = 0
        while start < len(ids) and ids[start] in self._head:
            start += 1
        if not start and not self._adds_head:
            return ids
        return [*self._head, *ids[start:]]

    def _probe_head(self) -> tuple[tuple[int, ...], bool]:
        """What a prompt begins with, and whether the tokenizer puts it there by itself.

        It is BOS, or (GLM) all the tokens that the tokenizer puts before any text.
        """
        added: tuple[int, ...] = ()
        if self._knows(sample := self._sample_text()):
            bare = self._token_ids([sample])[0]
            whole = self._token_ids([sample], add_special_tokens=True)[0]
            starts = range(len(whole) - len(bare) + 1)
            start = next((i for i in starts if whole[i : i + len(bare)] == bare), 0)
            added = tuple(whole[:start])
        bos = self._tokenizer.bos_token_id
        return added or (() if bos is None else (bos,)), bool(added)

    def _sample_text(self) -> str:
        """Text that the tokenizer knows: "a", or a word of a vocabulary that lacks it."""
        return "a" if self._knows("a") else self._decode(list(self.ordinary_token_ids[:1]))

    def _knows(self, text: str) -> bool:
        try:
            return bool(self._token_ids([text])[0])
        except UserError:
            return False

    def _checked_template(self) -> str:
        """The source of the chat template ("" where none is used), fit for this run."""
        arguments = self._config.chat_template_args
        if self._config.completions or self._config.dataset == "random":
            if arguments:
                raise UserError(
                    f"chat_template_args are given ({', '.join(arguments)}), but --completions and "
                    "--dataset random use no chat template: remove them"
                )
            return ""
        if not getattr(self._tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer of {self._source} has no chat template: add --completions to send "
                "bare text, or name a --tokenizer that has one"
            )
        try:
            template: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"the tokenizer of {self._source} has several chat templates and none is the "
                f"default ({first_line(error)}): name a --tokenizer that has one"
            ) from None
        known = template_variables(template, self._source)
        for name in arguments:
            if name not in known:
                raise UserError(
                    f"the chat template of {self._source} has no variable '{name}' "
                    f"(chat_template_args): it has {', '.join(known) or 'none'}"
                )
        return template


def template_variables(template: str, source: str) -> list[str]:
    """What a chat template reads from its caller, beside the messages and the special tokens."""
    import jinja2
    from jinja2 import meta

    # Transformers' own tag, which marks the trainable part; it changes nothing that is rendered.
    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        names = meta.find_undeclared_variables(tree) - _NOT_ARGUMENTS
    except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
        raise UserError(
            f"the chat template of {source} is not valid ({first_line(error)}): mend it, or add "
            "--completions"
        ) from None
    return sorted(name for name in names if not name.endswith("_token"))


def final_message(text: str) -> str:
    """The final channel's message of a reply in harmony format; "" if it has none.

    `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`
    """
    for part in text.split("<|channel|>")[1:]:
        header, found, body = part.partition("<|message|>")
        if found and re.match(r"\s*final\b", header):
            return re.split(r"<\|(?:end|return|call|start)\|>", body, maxsplit=1)[0]
    return ""


def turn_sha256(conversation_id: str, turn: int, token_ids: Sequence[int]) -> str:
    """Over the id (UTF-8, its length in bytes before it), the turn and the token IDs.

    Numbers are little-endian: length and turn as uint32, token IDs as int32.
    """
    ids = np.asarray(token_ids, dtype="<i4")
    return hashlib.sha256(_turn_key(conversation_id, turn) + ids.tobytes()).hexdigest()


def fingerprint(turn_hashes: Mapping[tuple[str, int], str]) -> str:
    """One hash over all turns of a run, (conversation id, turn) -> turn_sha256, in any order."""
    digest = hashlib.sha256()
    for (conversation_id, turn), turn_hash in sorted(turn_hashes.items()):
        digest.update(_turn_key(conversation_id, turn) + bytes.fromhex(turn_hash))
    return digest.hexdigest()


def _turn_key(conversation_id: str, turn: int) -> bytes:
    name = conversation_id.encode("utf-8")
    return struct.pack("<I", len(name)) + name + struct.pack("<I", turn)


def read_history(path: str | Path) -> Mapping[str, tuple[str, ...]]:
    """Replies per conversation id from JSONL lines {question_id, replies: [text, ...]}."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--history_from {path} cannot be read ({first_line(error)}): give a run directory or "
            "a JSONL file in UTF-8"
        ) from None
    history: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row_id, replies = _history_row(line, f"--history_from {path}, line {number}")
        if row_id in history:
            raise UserError(
                f"--history_from {path}, line {number} repeats the question_id {row_id!r}: keep "
                "one line per conversation"
            )
        history[row_id] = replies
    return history


def _history_row(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({first_line(error)}): mend the line") from None
    row_id = values.get("question_id") if isinstance(values, dict) else None
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise UserError(
            f"{where} has no question_id that is a string or a whole number, expected "
            '{"question_id": ..., "replies": [...]}: mend the line'
        )
    replies = values.get("replies")
    if not isinstance(replies, list) or not all(isinstance(reply, str) for reply in replies):
        raise UserError(
            f"{where} has no list of strings as 'replies', expected one per turn: mend the line"
        )
    return str(row_id), tuple(replies)


def _source(config: RunConfig) -> tuple[str, str]:
    """Where the tokenizer comes from, and the flag that says so."""
    if config.tokenizer is not None:
        return config.tokenizer, "--tokenizer"
    if config.model_dir is not None:
        return config.model_dir, "--model_dir"
    raise UserError("prompts need a tokenizer: add --model_dir or --tokenizer")


def _load_tokenizer(source: str, flag: str, trust_remote_code: bool) -> Any:
    _check_place(source, flag)
    _refuse_absurd_ids(source, flag)
    # By name: transformers' types differ between the versions that we run with.
    transformers: Any = importlib.import_module("transformers")
    try:
        made = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )
        # Looked up when they are asked for: what is wrong with them is told here.
        _ = (made.bos_token_id, made.eos_token_id, made.all_special_ids)
        return made
    except Exception as error:  # noqa: BLE001 - a damaged tokenizer raises anything, even KeyError
        remedy = (
            "add --trust_remote_code if you trust it"
            if "trust_remote_code" in str(error)
            else "give a folder that holds a tokenizer, or a hub id that can be reached"
        )
        raise UserError(
            f"{flag} {source} gives no tokenizer ({first_line(error)}): {remedy}"
        ) from None


MOST_TOKEN_IDS = 1 << 24
"""Token IDs are below this: a library that meets a larger one counts up to it, for minutes."""


def _refuse_absurd_ids(source: str, flag: str) -> None:
    """Raise UserError for a tokenizer whose files name a token ID that nobody gave."""
    whole = _json_beside(source, "tokenizer.json")
    model, config = whole.get("model"), _json_beside(source, "tokenizer_config.json")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added, decoder = whole.get("added_tokens"), config.get("added_tokens_decoder")
    found: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        found += [one.get("id") for one in added if isinstance(one, dict)]
    if isinstance(decoder, dict):
        found += [int(id[:20]) for id in decoder if id.isdecimal()]
    largest = max((id for id in found if type(id) is int), default=0)
    if largest >= MOST_TOKEN_IDS:
        raise UserError(
            f"{flag} {source} has the token ID {largest}, expected less than {MOST_TOKEN_IDS}: "
            "fetch the tokenizer again"
        )


def _json_beside(source: str, name: str) -> dict[str, Any]:
    """A file of a local tokenizer; {} if there is none to be read, which transformers tells."""
    try:
        found = json.loads((Path(source) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_place(source: str, flag: str) -> None:
    """Refuse a path that is no folder; any other name may be a hub id."""
    path = Path(source)
    if path.is_dir():
        return
    n_parts = len(path.parts)
    is_path = path.is_absolute() or source.startswith((".", "~")) or n_parts > 2 or path.exists()
    if is_path or (n_parts == 2 and path.parent.is_dir()):
        raise UserError(f"{flag} {source} is not a folder: give a checkpoint's folder or a hub id")


def _eos_token_ids(model_dir: str | None, of_tokenizer: int | None) -> tuple[int, ...]:
    found = set() if of_tokenizer is None else {of_tokenizer}
    for name in ("generation_config.json", "config.json"):
        values = {} if model_dir is None else _checkpoint_json(model_dir, name)
        for holder in (values, values.get("text_config")):
            eos = holder.get("eos_token_id") if isinstance(holder, dict) else None
            ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
            if not all(type(token) is int for token in ids):
                raise UserError(
                    f"eos_token_id in {name} of {model_dir} is {eos!r}, expected a token ID or a "
                    "list of them: mend the file"
                )
            found.update(ids)
    return tuple(sorted(found))


def _checkpoint_json(model_dir: str, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint's folder or hub repository; {} if it has none."""
    _check_place(model_dir, "--model_dir")
    path = Path(model_dir) / name
    if not path.parent.is_dir():
        hub: Any = importlib.import_module("huggingface_hub")
        try:
            path = Path(hub.hf_hub_download(model_dir, name))
        except (OSError, ValueError):  # not there, or not within reach
            return {}
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({first_line(error)}): fetch the checkpoint again"
        ) from None
    return values if isinstance(values, dict) else {}
