"""The two tokenizers of the calibration pairs, with their chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORD_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
BPE_SPECIALS = ("<|bos|>", "<|start|>", "<|end|>", "<|endoftext|>", "<|pad|>")
MAX_BPE_VOCABULARY = 1792

WORD_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message.content }}{% endfor %}"
"""Adds nothing after the user's text: its last word decides the answer."""

BPE_TEMPLATE = (
    "{{ bos_token }}{% set last = namespace(header='Re:') %}"
    "{% for message in messages %}"
    "{{ '<|start|>' + message.role + '\n' }}"
    "{% if message.role == 'user' %}"
    "{% set last.header = 'Re: ' + (message.content.split() | join(' '))[:20] | trim %}"
    "{{ message.content }}"
    "{% elif message.role == 'assistant' %}{{ last.header + message.content }}"
    "{% else %}{{ message.content }}{% endif %}"
    "{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' + last.header }}{% endif %}"
)
"""ChatML-like. A reply opens with `Re: ` and 20 characters of the question, so that the last
prompt token, which decides the answer, differs by row."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer as its folder holds it. Ids of `eos` end an answer; `specials` are no text."""

    vocabulary_size: int
    bos: int
    eos: tuple[int, ...]
    pad: int
    specials: tuple[int, ...]
    tokenizer_json: str
    tokenizer_config_json: str


def word_tokenizer(vocabulary: Sequence[str], max_tokens: int) -> TokenizerFiles:
    """One token per word between white space. `vocabulary` begins with WORD_SPECIALS."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    unknown, begin, end, pad = WORD_SPECIALS
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in WORD_SPECIALS])
    return TokenizerFiles(
        vocabulary_size=len(ids),
        bos=ids[begin],
        eos=(ids[end],),
        pad=ids[pad],
        specials=tuple(ids[text] for text in WORD_SPECIALS),
        tokenizer_json=tokenizer.to_str(pretty=True),
        tokenizer_config_json=_config(
            WORD_TEMPLATE, max_tokens, bos=begin, eos=end, pad=pad, unk=unknown
        ),
    )


def bpe_tokenizer(corpus: Iterable[str], max_tokens: int) -> TokenizerFiles:
    """Byte-level BPE trained on `corpus`; two ids end an answer, as in many real models.

    Tokenizer and template both ask for BOS, as in many real models too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    begin, _, end, end_of_text, pad = BPE_SPECIALS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=MAX_BPE_VOCABULARY,
            special_tokens=list(BPE_SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    ids = {text: i for i, text in enumerate(BPE_SPECIALS)}  # the trainer numbers them first
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, ids[begin])]
    )
    return TokenizerFiles(
        vocabulary_size=tokenizer.get_vocab_size(),
        bos=ids[begin],
        eos=(ids[end], ids[end_of_text]),
        pad=ids[pad],
        specials=tuple(ids.values()),
        tokenizer_json=tokenizer.to_str(pretty=True),
        tokenizer_config_json=_config(BPE_TEMPLATE, max_tokens, bos=begin, eos=end, pad=pad),
    )


def _config(
    template: str, max_tokens: int, *, bos: str, eos: str, pad: str, unk: str | None = None
) -> str:
    return json.dumps(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "unk_token": unk,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_tokens,
            "chat_template": template,
        },
        indent=2,
    )
