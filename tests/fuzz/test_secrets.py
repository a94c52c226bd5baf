"""Secrets: they reach no manifest, sweep, record or sentence; what only looks like one survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedbench import cli, store
from speedbench.config import from_dict
from speedbench.environment import HIDDEN, is_secret_name, redact, redact_argv, redact_text
from speedbench.types import UserError
from tests.builders import conversation, manifest, session, turn, write_part

BY_FORM = {
    "hf": "hf_" + "aBcDeFgHiJ" * 3,
    "openai": "sk-proj-" + "Ab1_" * 8,
    "aws": "AKIA" + "ABCDEFGH12345678",
    "aws session": "ASIA" + "ABCDEFGH12345678",
    "github": "ghp_" + "aB3dE" * 7,
    "github fine": "github_pat_" + "aB3dE" * 7,
    "gitlab": "glpat-" + "aB3dE" * 4,
    "slack": "xoxb-" + "123456789012-abc",
    "google": "AIza" + "aB3dE" * 7,
    "nvidia": "nvapi-" + "aB3dE" * 5,
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
}  # fmt: skip
"""None of them is real."""

PLAIN = "correct-horse-battery"
"""A secret that nothing in its form gives away: only its name does."""

NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MY_SERVICE_TOKEN", "CLIENT_SECRET", "password",
    "DB_PASSWORD", "api_key", "api-key", "x-api-key", "hf_token", "access_token", "secret",
    "Authorization", "ssl_keyfile_password", "admin_api_key",
)  # fmt: skip
INNOCENT: dict[str, Any] = {
    "num_speculative_tokens": 5, "max_tokens": 4096, "tokenizer": "meta-llama/Llama-3",
    "token_ids": [1, 2, 3], "draft_tokens": 12, "eos_token_id": 2, "eos_token": "</s>",
    "pad_token": "<pad>", "max_num_batched_tokens": 8192, "n_output_tokens": 7, "key": "value",
    "tokens_per_s": 12.5, "think_end_token": "</think>", "api_key_env": "OPENAI_API_KEY",
    "stop_token_ids": [2], "secretary": "a category", "keyboard": 1, "skip_tokenizer_init": True,
    "kv_transfer_config": {"kv_connector": "x"}, "token_budget": 3, "BOS_TOKEN": "<s>",
    "image_token": "<image>", "num_hidden_layers": 2, "sk": "sk-learn", "hf_overrides": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize("value", BY_FORM.values(), ids=BY_FORM)
def test_by_form_wherever_it_stands(value: str) -> None:
    around = ("{}", "a {} b", "x={}", "'{}'", "https://{}@host/p", "https://host/p?q={}",
              '{"a": "{}"}', "{},{}")  # fmt: skip
    for text in (one.replace("{}", value) for one in around):
        assert value not in redact_text(text)
        assert value not in json.dumps(redact({"a": [{"b": text}], "c": (text,)}))
        assert value not in " ".join(redact_argv(["run", "--x", text, f"--y={text}"]))


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name: str) -> None:
    assert is_secret_name(name)
    assert PLAIN not in json.dumps(redact({"engine_args": {"a": [{name: PLAIN}]}}))
    assert redact({name: [PLAIN]}) == {name: HIDDEN}
    assert redact({name: 12345}) == {name: HIDDEN}
    assert redact({name: None}) == {name: None}  # there is none, and that is no secret
    for text in (f"{name}={PLAIN}", f'{{"{name}": "{PLAIN}"}}', f"{{'{name}': '{PLAIN}'}}",
                 f"env {name}={PLAIN} run"):  # fmt: skip
        assert PLAIN not in redact_text(text), text
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert PLAIN not in " ".join(redact_argv(["x", flag, PLAIN, "--seed", "1"]))
        assert PLAIN not in " ".join(redact_argv(["x", f"{flag}={PLAIN}"]))
        assert redact_argv(["x", flag, PLAIN, "--seed", "1"])[-2:] == ["--seed", "1"]


def test_places_that_have_no_name() -> None:
    for text in (
        f"s3://user:{PLAIN}@bucket/x", f"http://a:{PLAIN}@h:1/v1 cannot be reached",
        f"Authorization: Bearer {PLAIN}", f"authorization: basic {PLAIN}",
        f"https://h/x?X-Amz-Signature={PLAIN}&a=1", f"https://h/x?sig={PLAIN}",
        f"https://h/x?a=1&api_key={PLAIN}", f"--engine_args={{'api_key': '{PLAIN}'}}",
    ):  # fmt: skip
        assert PLAIN not in redact_text(text), text
    assert redact_text("s3://bucket/x?a=1") == "s3://bucket/x?a=1"
    assert redact_text("ssh://git@host/x") == "ssh://git@host/x"
    assert redact_text(f"http://a:{PLAIN}@h:1/v1?b=2") == f"http://{HIDDEN}@h:1/v1?b=2"


def test_what_is_no_secret_survives() -> None:
    assert redact(INNOCENT) == INNOCENT
    assert not any(map(is_secret_name, INNOCENT))
    argv = [part for name, value in INNOCENT.items() for part in (f"--{name}", str(value))]
    assert redact_argv(argv) == argv
    joined = [f"--{name}={value}" for name, value in INNOCENT.items()]
    assert redact_argv(joined) == joined
    for text in ("max_tokens=5", "token: expected a name", "the token 128009 ended it",
                 "hf_hub is slow", "sk-learn", "time: 12:30", "a Bearer of news", "basic facts",
                 "eyJ is how they begin", "Bearer {token}"):  # fmt: skip
        assert redact_text(text) == text


def test_names_that_come_from_data_hide_no_numbers() -> None:
    found = {"expected": {"password": 80, "token": 2}, "packages": {"secret": "1.0"}}
    assert redact(found) == found


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
))  # fmt: skip
def test_twice_is_once(value: Any) -> None:
    """A manifest is read, changed and written again at every session's end."""
    assert redact(redact(value)) == redact(value)


@given(st.text(), st.sampled_from(sorted(BY_FORM.values())), st.text())
def test_no_text_around_it_saves_it(before: str, value: str, after: str) -> None:
    if before[-1:].isascii() and before[-1:].isalnum():
        before += " "
    assert value not in redact_text(before + value + after)


def test_no_file_of_a_run_holds_one(tmp_path: Path) -> None:
    """Configuration, engine, environment, sessions, refused rows, and errors of failed requests."""
    secret = BY_FORM["openai"]
    about = manifest(
        config={"engine_args": {"hf_token": PLAIN, "deep": [{"headers": {"Authorization": PLAIN}}]},
                "dataset_path": f"s3://u:{PLAIN}@b/x"},
        engine={"settings": {"api_key": PLAIN, "note": secret}},
        sessions=[session(message=f"HTTP 401 for key {secret}", argv=["--api_key", PLAIN])],
        refused=[{"id": "a", "reason": f"the server says {secret}"}],
    )  # fmt: skip
    store.create(tmp_path)
    store.write_manifest(tmp_path, about)
    failed = turn("c.0", [1], finish="error", error=f"HTTP 401: key {secret} at http://u:{PLAIN}@h")
    write_part(tmp_path, [conversation("c", "math", failed)])
    run = store.load(tmp_path)
    stored = (tmp_path / "manifest.json").read_text() + json.dumps(run.turns.to_pylist())
    assert secret not in stored
    assert PLAIN not in stored
    assert run.manifest["config"]["draft_length"] == 3
    assert "HTTP 401" in run.turns["error"].to_pylist()[0]


def test_no_sentence_on_the_terminal_holds_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://user:{PLAIN}@localhost:1/x"
    assert cli.main(["run", "--engine", "NULL", "--dataset", url]) == 2
    assert PLAIN not in capsys.readouterr().err


def test_a_sweep_holds_none(tmp_path: Path) -> None:
    from speedbench import series
    from speedbench.sweep import Cell, Spec

    config = from_dict({"engine": "NULL", "engine_args": {"api_key": PLAIN}})
    spec = Spec(base={"engine": "NULL", "engine_args": {"api_key": PLAIN}})
    plan = series.Plan("sweep", tmp_path, spec, (Cell("a", config, {"engine_args": {}}),))
    series.write(plan, {"b": f"HTTP 401: {BY_FORM['jwt']}"})
    text = (tmp_path / "sweep.json").read_text()
    assert PLAIN not in text
    assert BY_FORM["jwt"] not in text


def test_a_sentence_is_one_line_and_commands_no_terminal() -> None:
    told = str(UserError("a\nb\tc\x1b[31m\u202e\ud800"))
    assert told == "a b c\\x1b[31m\\u202e\\ud800"
    assert told.isprintable()
