"""What several test files share: the calibration checkpoints, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from speedbench.calibration import checkpoints


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the calibration pairs word/{target,draft} and bpe/{target,draft}."""
    folder = tmp_path_factory.mktemp("models")
    checkpoints.build(folder)
    return folder
