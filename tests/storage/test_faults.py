"""Faults are read strictly: a mistyped one would make a crash test pass without a crash."""

import os
import signal
from pathlib import Path

import pytest

from smelt.errors import ConfigError
from smelt.storage.faults import POINTS, fault_from


@pytest.mark.parametrize("spec", ["", "before_insert", "before_insert:0", "before_insert:x", "nowhere:1"])
def test_a_mistyped_fault_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="POINT:NTH"):
        fault_from(spec)


def test_no_fault_lets_everything_pass() -> None:
    for point in POINTS:
        fault_from(None)(point)


def test_the_nth_time_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    kills: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: kills.append(arguments))
    fault = fault_from("mid_file_write:2")
    fault("mid_file_write")
    fault("before_insert")
    assert not kills
    fault("mid_file_write")
    assert kills == [(os.getpid(), signal.SIGKILL)]


def test_with_a_note_nobody_dies_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kills: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: kills.append(arguments))
    for _ in range(2):
        fault_from("before_insert:1", tmp_path / "note")("before_insert")
    assert len(kills) == 1
