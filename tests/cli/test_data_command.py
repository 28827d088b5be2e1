import json

import pytest
from click.testing import CliRunner

from smelt.cli.app import main
from smelt.cli.data import command
from smelt.data.datasets import list_datasets


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": f"Story {i} begins here."}) + "\n" for i in range(40)) + "bad\n")
    return str(path)


def smelt(*arguments, **options):
    return CliRunner().invoke(command, arguments, **options)


def added(source, *arguments):
    return smelt("add", "stories", "--from", source, "--tokenizer", "bytes", "--errors", "skip", *arguments)


def test_a_dataset_from_start_to_end(source, home):
    assert "no datasets" in smelt("ls").output
    result = added(source)
    assert result.exit_code == 0, result.output
    assert "34 documents" in result.output
    assert "skipped     1 bad records" in result.output
    assert "smelt train --dataset stories" in result.output
    listed = smelt("ls").output
    assert "stories" in listed
    assert "bytes" in listed
    shown = smelt("show", "stories", "--documents", "2", "--verify").output
    assert "train-000000" in shown
    assert "every file is as its hash says" in shown
    assert "Story 0 begins here." in shown
    assert "--- document 1 of train" in shown
    assert smelt("rm", "stories", input="n\n").exit_code == 1
    assert list_datasets(home / "datasets") == ["stories"]
    assert smelt("rm", "stories", "--yes").exit_code == 0
    assert list_datasets(home / "datasets") == []


def test_damaged_datasets_are_listed_as_such(source, home):
    added(source)
    (home / "datasets" / "stories" / "train-000000.bin").write_bytes(b"")
    assert "damaged" in smelt("ls").output
    assert smelt("rm", "stories", "--yes").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "../x", "--from", "builtin:pydoc"], "'../x' is not a name for a dataset"),
        (["add", "x", "--from", "/nowhere"], "/nowhere does not exist"),
        (["add", "x", "--from", "builtin:nothing"], "there is builtin:pydoc"),
        (["add", "x", "--from", "{source}"], "line 41 is not JSON: Expecting value at column 1; --errors skip"),
        (["add", "x", "--from", "{source}", "--errors", "skip", "--tokenizer", "bpe:9"], "bpe:9 is out of range"),
        (["add", "x", "--from", "{source}", "--val-fraction", "2"], "val_fraction 2.0 must lie between 0 and 1"),
        (["show", "x"], "there is no dataset 'x'"),
        (["show", "../../etc"], "is not a name for a dataset"),
        (["rm", "x"], "there is no dataset 'x'"),
    ],
)
def test_mistakes_end_with_one_line_and_leave_nothing(arguments, message, source, home, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["data", *(argument.format(source=source) for argument in arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list_datasets(home / "datasets") == []


@pytest.mark.parametrize("verb", ["add", "show"])
def test_help_teaches_by_examples(verb):
    output = smelt(verb, "--help").output
    assert "Examples:" in output
    assert f"smelt data {verb}" in output
