"""calibrate: every algorithm gets its checkpoints, every verdict its place in the table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import engines
from speedbench import calibrate, cli, cli_base
from speedbench.calibration.closed_form import Case, KnownAnswer, read_known_answer
from speedbench.types import (
    Algorithm,
    EngineCounters,
    EngineInfo,
    EngineSettings,
    Request,
    RoutedExperts,
    Step,
    Support,
    UserError,
)
from tests.scripted import ScriptedEngine

ALL: tuple[Algorithm, ...] = (
    "NONE", "DRAFT_TARGET", "EAGLE", "EAGLE3", "MTP", "MEDUSA", "PARD", "NGRAM", "SUFFIX",
)  # fmt: skip


class RightEngine(ScriptedEngine):
    """Decodes calibration checkpoints as their files say; it names itself VLLM for its lookup."""

    algorithms = ALL
    versions = "1"
    max_concurrency: int | None = None
    support: ClassVar = {
        **{name: Support("real", "here") for name in ALL},
        "DFLASH": Support("absent", "", "it has no block diffusion"),
    }
    flag_of: ClassVar[dict[str, str]] = {}
    calibration_args: ClassVar[dict[str, Any]] = {}
    spoil_k = 0  # drafts so many tokens more than it says

    def __init__(self, settings: EngineSettings) -> None:
        if settings.algorithm == "MTP":
            raise UserError("this engine has no head to predict with: use another")
        draft = settings.draft_model_dir
        self.known = read_known_answer(Path(settings.model_dir), Path(draft) if draft else None)
        self.settings = settings
        self.k = 0 if settings.algorithm == "NONE" else settings.draft_length
        super().__init__(self.play, draft_length=self.k)

    def play(self, request: Request) -> Sequence[Step]:
        # What SUFFIX drafts is not known beforehand: nothing here.
        algorithm = "NONE" if self.settings.algorithm == "SUFFIX" else self.settings.algorithm
        case = Case(
            algorithm, self.k + self.spoil_k, request.max_tokens,
            request.sampling.stop_token_ids, 2, 3,
        )  # fmt: skip
        steps = case.steps(self.known, request.token_ids)
        output = [token for step in steps for token in step.token_ids]
        last = len(steps) - 1
        ended = "stop" if output[-1] in request.sampling.stop_token_ids else "length"
        return [
            Step(
                request.request_id, 0, step.token_ids,
                accepted=step.accepted, drafted=step.drafted,
                finish_reason=ended if i == last else None,
                routed_experts=self.experts(request, output) if i == last else None,
            )
            for i, step in enumerate(steps)
        ]  # fmt: skip

    def experts(self, request: Request, output: Sequence[int]) -> RoutedExperts | None:
        if not self.settings.capture_experts:
            return None
        tokens = [*request.token_ids, *output[:-1]]
        ids = np.asarray([self.known.experts[token] for token in tokens], "<i2")
        return RoutedExperts(*ids.shape, ids.tobytes())

    def describe(self) -> EngineInfo:
        return replace(
            super().describe(), name="VLLM", tells_drafted=True,
            settings={
                "ngram_min": 2, "ngram_max": 3, "suffix_decoding_max_cached_requests": 10000,
            },
        )  # fmt: skip


def run(engine: Any, monkeypatch: pytest.MonkeyPatch, save_dir: Path, *more: str) -> int:
    monkeypatch.setattr(engines, "adapter", lambda _name: engine)
    return cli.main(
        ["calibrate", "--engine", "VLLM", "--save_dir", str(save_dir), "--draft_length", "3",
         "--concurrency", "16", "--output_length", "12", *more]
    )  # fmt: skip


def table(text: str) -> dict[str, str]:
    """First words of the closing table's lines -> the line."""
    lines = text[text.index("  algorithm ") :].splitlines()[2:]
    return {re.split(r"\s{2,}", line.strip())[0]: line for line in lines if line[2:4].strip()}


def test_every_algorithm_is_judged_and_told_in_one_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At temperature 1 a greedy engine is no sampled one: that case, and no other, is a fault.
    assert run(RightEngine, monkeypatch, tmp_path / "runs") == cli_base.FAILED
    found = table(capsys.readouterr().out)
    for name in ("NONE", "EAGLE", "EAGLE3", "EAGLE3 pruned", "MEDUSA", "PARD", "NGRAM"):
        assert " exact " in found[name], found[name]
    assert " consistent " in found["SUFFIX"]
    assert " exact " in found["routed experts"]
    assert " exact " in found["DRAFT_TARGET natural"]
    assert " exact " in found["DRAFT_TARGET"]
    assert "FAULT" in found["DRAFT_TARGET sampled"]
    assert "not on this engine" in found["MTP"]
    assert "not on this engine" in found["DFLASH"]
    assert "275 " in found["EAGLE"]  # requests: 220 single turns, 22 conversations of 2 or 3


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "MEDUSA", "PARD"])
def test_another_k_is_found_with_every_drafter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    algorithm: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(RightEngine, "spoil_k", 1)
    code = run(RightEngine, monkeypatch, tmp_path / "runs", "--algorithm", algorithm)
    assert code == cli_base.FAILED
    assert "FAULT: off-by-one K" in capsys.readouterr().out


def test_experts_of_other_tokens_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shifted(self: RightEngine, request: Request, output: Sequence[int]) -> Any:
        return RightEngine.experts(
            self, replace(request, token_ids=request.token_ids[::-1]), output
        )

    spoiled = type("Shifted", (RightEngine,), {"experts": shifted})
    code = run(spoiled, monkeypatch, tmp_path / "runs", "--algorithm", "NONE")
    assert code == cli_base.FAILED
    assert "FAULT: wrong experts" in capsys.readouterr().out


def counting(self: RightEngine, extra_drafts: int) -> EngineCounters:
    """What an engine counts that decodes as its files say: all its requests, over and over."""
    steps = [step for request in self.submitted for step in RightEngine.play(self, request)[1:]]
    accepted = [step.accepted or 0 for step in steps]
    return EngineCounters(
        len(steps) + extra_drafts * bool(steps), self.k * len(steps), sum(accepted)
    )


@pytest.mark.parametrize("extra", [0, 1])
def test_counters_that_contradict_the_steps_are_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: int
) -> None:
    class Counting(RightEngine):
        n_read = 0

        def counters(self) -> EngineCounters:
            self.n_read += 1
            return counting(self, extra * (self.n_read > 1))

    code = run(Counting, monkeypatch, tmp_path / "runs", "--algorithm", "EAGLE")
    out = capsys.readouterr().out
    assert (code == cli_base.OK) is (extra == 0), out
    assert ("FAULT: counters differ" in out and "+1 drafts" in out) is (extra == 1)


def test_an_engine_that_drafts_and_says_another_k_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its steps are those of the K it says, which is not the K that was to be proven."""

    def other(self: RightEngine, settings: EngineSettings) -> None:
        RightEngine.__init__(self, replace(settings, draft_length=settings.draft_length + 1))

    engine = type("Other", (RightEngine,), {"__init__": other})
    assert run(engine, monkeypatch, tmp_path / "runs", "--algorithm", "EAGLE") == cli_base.FAILED
    out = capsys.readouterr().out
    assert "FAULT: off-by-one K" in out
    assert "drafts 4 tokens per step, asked was K=3" in out


def test_an_end_that_is_told_wrong_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(self: RightEngine, request: Request) -> Sequence[Step]:
        steps = list(RightEngine.play(self, request))
        return [*steps[:-1], steps[-1]._replace(finish_reason="length")]

    engine = type("Lengthy", (RightEngine,), {"play": play})
    assert run(engine, monkeypatch, tmp_path / "runs", "--algorithm", "EAGLE") == cli_base.FAILED
    assert "FAULT: wrong end" in capsys.readouterr().out


def test_more_heads_than_were_built_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--algorithm", "MEDUSA", "--draft_length", "7")
    assert run(RightEngine, monkeypatch, tmp_path / "runs", *more) == cli_base.USAGE
    told = capsys.readouterr()
    assert told.out == ""
    assert "has 5 heads, --draft_length is 7" in told.err


def test_an_engine_that_never_starts_is_one_sentence_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says the same of every case: not a table of as many rows."""

    def refuse(self: RightEngine, settings: EngineSettings) -> None:
        raise UserError("the engine cannot be imported (no module): install it")

    engine = type("Missing", (RightEngine,), {"__init__": refuse})
    assert run(engine, monkeypatch, tmp_path / "runs", "--algorithm", "all") == cli_base.USAGE
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert "cannot be imported (no module): install it" in told.err
    assert list(tmp_path.iterdir()) == []


def test_the_engine_that_makes_everything_up_proves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--save_dir", str(tmp_path / "runs"))
    assert cli.main(["calibrate", "--engine", "null", *where]) == cli_base.USAGE
    told = capsys.readouterr()
    assert "--engine NULL makes up its steps" in told.err
    assert "VLLM" in told.err
    assert (told.out, list(tmp_path.iterdir())) == ("", [])


def test_an_algorithm_that_was_named_and_does_not_start_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(RightEngine, monkeypatch, tmp_path / "runs", "--algorithm", "EAGLE,MTP")
    assert code == cli_base.FAILED
    out = capsys.readouterr().out
    assert "no head to predict with" in out
    assert run(RightEngine, monkeypatch, tmp_path / "more", "--algorithm", "eagle") == cli_base.OK
    assert (
        run(RightEngine, monkeypatch, tmp_path / "none", "--algorithm", "DFLASH") == cli_base.USAGE
    )
    assert "it has NONE, DRAFT_TARGET" in capsys.readouterr().err
    assert run(RightEngine, monkeypatch, tmp_path / "none", "--algorithm", "MTPX") == cli_base.USAGE
    assert "expected EAGLE3, EAGLE" in capsys.readouterr().err


def test_an_engine_of_one_request_at_a_time_is_asked_one_at_a_time() -> None:
    cases = list(calibrate.engine_cases(["NGRAM"], [1, 3], [1], [5, 20]))
    assert [(c.subject.label, c.k) for c in cases] == [
        ("NGRAM", 1), ("NGRAM", 3), ("NGRAM natural", 3),
    ]  # fmt: skip
    assert cases[0].cells == ((1, 5, 33, 0.0), (1, 20, 33, 0.0))


def test_eagle_heads_come_in_the_form_of_the_engine(models: Path) -> None:
    eagle = next(s for s in calibrate.SUBJECTS if s.label == "EAGLE")
    assert calibrate._draft_folder(eagle, models, "VLLM") == str(models / "word/eagle")
    assert calibrate._draft_folder(eagle, models, "SGLANG") == str(models / "word/eagle-sglang")


def test_known_answer_functions_are_read_with_the_drafter(models: Path) -> None:
    plain = read_known_answer(models / "word/target")
    pruned = read_known_answer(models / "word/target", models / "word/eagle3-pruned")
    assert isinstance(plain, KnownAnswer)
    assert pruned.target_next == plain.target_next
    assert pruned.draft_next != plain.draft_next
    assert not {x % 4 for x in pruned.draft_next} & {0}


def test_engines_are_listed_with_their_proofs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "ADAPTERS", {"VLLM": "", "NULL": ""})
    monkeypatch.setattr(engines, "adapter", lambda _name: RightEngine)
    assert cli.main(["engines", "--format", "markdown"]) == cli_base.OK
    out = capsys.readouterr().out
    assert "| EAGLE3 | real engine |" in out
    assert "| DFLASH | - |" in out
    assert "- VLLM, where it ran: here." in out
    assert cli.main(["engines"]) == cli_base.OK
    assert "block diffusion" in capsys.readouterr().out


def test_the_readme_shows_what_the_adapters_say(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition("<!-- speedbench engines --format markdown -->\n")
    shown, _, _ = rest.partition("<!-- end -->")
    assert cli.main(["engines", "--format", "markdown"]) == cli_base.OK
    assert shown.strip() == capsys.readouterr().out.strip()
