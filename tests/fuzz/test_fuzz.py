"""Two thousand damaged inputs through every reader: none may end in a traceback.

`scripts/fuzz.py` tries fifty times as many. What a fault showed once is tried again by its number:
the same seed makes the same inputs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import campaign
from tests.fuzz.readers import READERS

N_INPUTS = 2_000
SEED = 20_261_122
LIMIT_S = 60.0
"""Only a hang takes so long: no test of how fast anything is."""

SHARES = campaign.shares(READERS, N_INPUTS, least=10)


@pytest.mark.parametrize("name", list(READERS))
def test_a_whole_input_is_not_damaged(name: str, tmp_path: Path) -> None:
    """Else a campaign would only ever see the first line of its reader."""
    reader = READERS[name]
    for number, seed in enumerate(reader.seeds()):
        folder = tmp_path / str(number)
        campaign.write(seed, folder)
        found = campaign.result(reader, folder, LIMIT_S)
        refuses = name in ("lock", "remote-lock")  # a lock that is held is always refused
        assert found.outcome == ("refused" if refuses else "read"), found.what


@pytest.mark.parametrize("name", list(READERS))
def test_damage_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    faults = []
    for index in range(SHARES[name]):
        campaign.write(campaign.case(reader, SEED, index), tmp_path / "input")
        found = campaign.result(reader, tmp_path / "input", LIMIT_S)
        if found.outcome == "fault":
            faults.append(f"{name} {index}: {found.what}")
    assert not faults, "\n".join(faults[:3])


def test_two_thousand() -> None:
    assert sum(SHARES.values()) >= N_INPUTS


def test_a_seed_makes_the_same_inputs_again() -> None:
    for name in ("run", "sweep", "jsonl", "tokens"):
        reader = READERS[name]
        made = [campaign.case(reader, 1, index) for index in range(20)]
        assert made == [campaign.case(reader, 1, index) for index in range(20)]
        assert made != [campaign.case(reader, 2, index) for index in range(20)]
        assert sum(case not in reader.seeds() for case in made) > 15  # most are damaged


def test_a_reader_that_fails_is_found(tmp_path: Path) -> None:
    """The property itself: what is a fault, and what is none."""
    from speedbench.types import UserError
    from tests.fuzz.readers import Reader

    def read_by(error: BaseException | None) -> str:
        def read(_folder: Path) -> None:
            if error is not None:
                raise error

        reader = Reader("x", lambda: ({"a": b""},), read)
        return campaign.result(reader, tmp_path).outcome

    assert read_by(None) == "read"
    assert read_by(UserError(f"{tmp_path} is damaged: mend it")) == "refused"
    assert read_by(UserError("something is damaged: mend it")) == "fault"  # what is?
    assert read_by(UserError("")) == "fault"
    assert read_by(KeyError("x")) == "fault"
    assert read_by(RecursionError()) == "fault"
    assert read_by(MemoryError()) == "fault"


def test_a_reader_that_hangs_is_found(tmp_path: Path) -> None:
    from tests.fuzz.readers import Reader

    def read(_folder: Path) -> None:
        while True:
            pass

    found = campaign.result(Reader("x", lambda: ({"a": b""},), read), tmp_path, 0.2)
    assert found.outcome == "fault"
    assert "did not end" in found.what
