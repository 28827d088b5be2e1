"""`smelt doctor` tells what is there, and ends with 1 exactly when something is wrong."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from smelt.cli import doctor


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(doctor, "LOW_DISK_GIB", 0)  # the tests' disk is not what is examined here
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)  # nor are this machine's drivers


def run_doctor() -> Result:
    return CliRunner().invoke(doctor.command)


def test_a_sound_machine_is_told_so(home: Path) -> None:
    result = run_doctor()
    assert result.exit_code == 0
    assert result.output.endswith("nothing is wrong\n")
    topics = {line[:12].strip() for line in result.output.splitlines()}
    assert {
        "python",
        "torch",
        "cpu",
        "cpu has",
        "threads",
        "compiler",
        "runs use",
        "home",
        "setting",
        "extra",
    } <= topics
    assert f"home = {home} (SMELT_HOME)" in result.output


def test_the_instruction_sets_that_decide_speed_are_named() -> None:
    line = next(line for line in run_doctor().output.splitlines() if line.startswith("cpu has"))
    assert "amx yes" in line or "amx no" in line
    assert "avx512_bf16 yes" in line or "avx512_bf16 no" in line


@pytest.mark.parametrize(
    ("variable", "value", "what", "remedy"),
    [
        ("SMELT_DEVICE", "cuda:99", "device 'cuda:99' is not here", "correct the setting `device`"),
        ("SMELT_DTYPE", "float8", "dtype: Input should be", "correct it"),
        ("SMELT_THREADS", "4096", "4096 threads share", "set SMELT_THREADS="),
        ("TIKTOKEN_CACHE_DIR", "/no/such/folder", "/no/such/folder, which is no folder", "mkdir -p /no/such/folder"),
    ],
)
def test_what_is_wrong_comes_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, what: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    result = run_doctor()
    assert result.exit_code == 1
    wrong = result.output.partition("wrong: ")[2]
    assert what in wrong
    assert remedy in wrong


def test_a_home_that_is_a_file_is_wrong(home: Path) -> None:
    home.write_text("")
    result = run_doctor()
    assert result.exit_code == 1
    assert f"the home folder {home} cannot be written" in result.output


def test_little_disk_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK_GIB", 10**9)
    result = run_doctor()
    assert result.exit_code == 1
    assert "GiB are free for" in result.output


def test_a_containers_quota_counts(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    assert doctor.usable_cores(quota) == 0.5
    quota.write_text("max 100000\n")
    assert doctor.usable_cores(quota) >= 1


def test_a_missing_compiler_is_a_fact_not_a_fault() -> None:
    assert "none: training runs without torch.compile" in run_doctor().output


def test_vocabularies_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vocabulary").write_text("")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert f"1 vocabularies in {tmp_path}" in run_doctor().output
