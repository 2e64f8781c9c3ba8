"""What the command line and the server are tried on: nothing of it is changed by a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.decoder.tiny import write_adapter, write_checkpoint

pytest.register_assert_rewrite("tests.decoder.world")  # whose checks then say what they saw


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def adapter(model, tmp_path_factory) -> Path:
    return write_adapter(model, tmp_path_factory.mktemp("adapters") / "poet")
