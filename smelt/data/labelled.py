"""Texts with labels, from CSV, JSON lines, Parquet or the hub; knows no tokenizer and no model.

Which columns hold them is found by their usual names or said; labels may be words or numbers, and what they are called
comes with the data. All of it is held in memory: what people label by hand fits.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from smelt.data.documents import Reading
from smelt.data.packing import mix, shuffle
from smelt.data.readers import InputFile, Records, csv_records, jsonl_records, parquet_records
from smelt.data.sources import Progress, download, hub_rows, local_files
from smelt.errors import DataError, NotEnoughData

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "description", "title")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "topic", "class index")
MAX_LABELS = 1000


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns are called; "" is found by itself."""

    text: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """Texts, and for each the number of its label."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]  # of the labels
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def counts(self) -> dict[str, int]:
        """How many texts have each label."""
        numbers = Counter(self.labels)
        return {name: numbers[number] for number, name in enumerate(self.names)}

    def sha256(self) -> str:
        """A hash of all texts and labels in their order."""
        digest = hashlib.sha256(repr(self.names).encode())
        for text, label in zip(self.texts, self.labels, strict=True):
            digest.update(f"{label} {len(text)} ".encode())
            digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def part(self, numbers: Sequence[int]) -> "LabelledTexts":
        """Some of the texts, in this order."""
        texts = tuple(self.texts[number] for number in numbers)
        return replace(self, texts=texts, labels=tuple(self.labels[number] for number in numbers))

    def renumbered(self, names: tuple[str, ...]) -> "LabelledTexts":
        """The same by the numbers of other names, ours among them."""
        numbers = [names.index(name) for name in self.names]
        return replace(self, labels=tuple(numbers[label] for label in self.labels), names=names)

    def sample(self, num_texts: int, seed: int) -> "LabelledTexts":
        """That many texts, drawn by the seed; all where there are not more."""
        if num_texts >= len(self):
            return self
        return self.part(sorted(order_of(len(self), seed)[:num_texts]))

    def split(self, fraction: float, seed: int) -> "tuple[LabelledTexts, LabelledTexts]":
        """(most of them, that fraction), drawn by the seed. NotEnoughData where a part would be empty."""
        num_held = round(fraction * len(self))
        if not 0 < num_held < len(self):
            raise NotEnoughData(
                f"{self.name} has {len(self)} texts: too few to keep {fraction:.0%} of them; give --valid"
            )
        order = order_of(len(self), seed)
        return self.part(sorted(order[num_held:])), self.part(sorted(order[:num_held]))


def order_of(size: int, seed: int, epoch: int = 0) -> list[int]:
    """The numbers 0..size-1 in the order of an epoch, a function of seed and epoch alone."""
    key = mix(np.array([epoch], np.uint64) + mix(np.array([seed], np.uint64)))
    keys = np.repeat(key, size)
    return shuffle(np.arange(size, dtype=np.uint64), size, keys).astype(np.int64).tolist()


def read_labelled(
    spec: str,
    columns: Columns = Columns(),
    names: Sequence[str] | None = None,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> LabelledTexts:
    """The labelled texts of a file, a folder, an http(s) address or `hf:ORG/NAME[:config][:split]`.

    With `names` every label must be among them (DataError), and they are numbered so. Without, words are numbered by
    the alphabet and numbers by their size. DataError also for a record that is no text with a label, by its line or
    row, unless `reading` skips those; NotFound where there is nothing.
    """
    reading = reading or Reading()
    found = list(_checked(_records(spec, columns, reading, progress or _unheard), reading))
    if not found:
        raise NotEnoughData(f"{spec} holds no labelled text")
    labels = [label for _, _, label in found]
    given = tuple(names) if names else _names_of(labels, spec)
    numbers = {name: number for number, name in enumerate(given)}
    for where, _, label in found:
        if str(label) not in numbers:
            raise DataError(f"{where}: the label {str(label)!r:.80} is not among {', '.join(given)[:500]}")
    texts = tuple(text for _, text, _ in found)
    return LabelledTexts(spec, texts, tuple(numbers[str(label)] for label in labels), given, reading.num_skipped)


def _unheard(_stage: str, _num_done: int, _num_total: int | None) -> None:
    """Progress for nobody."""


def _names_of(labels: Sequence[str | int], spec: str) -> tuple[str, ...]:
    different = set(labels)
    if len(different) > MAX_LABELS:
        raise DataError(f"{spec} has {len(different):,} different labels, and at most {MAX_LABELS:,} can be told apart")
    if len(different) < 2:
        raise DataError(f"all texts of {spec} have the label {next(iter(different))!r}; there is nothing to tell apart")
    are_numbers = all(str(label).removeprefix("-").isdecimal() for label in different)
    ordered = sorted(different, key=lambda label: (int(label) if are_numbers else 0, str(label)))
    return tuple(dict.fromkeys(str(label) for label in ordered))


# --- Records -------------------------------------------------------------------------------------------------


def _checked(records: Records, reading: Reading) -> Iterator[tuple[str, str, str | int]]:
    """(where it stands, text, label) of each record that has both."""
    for where, (text, label) in records:
        problem = _problem_of(text, label)
        if problem is None:
            yield where, text, label.strip() if isinstance(label, str) else int(label)
        else:
            reading.reject(f"{where}: {problem}")


def _problem_of(text: Any, label: Any) -> str | None:
    if not isinstance(text, str):
        return f"the text is not text but {text!r:.40}"
    if not text.strip():
        return "the text is empty"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "the text has a lone surrogate, which is not Unicode text"
    if not isinstance(label, str | int):
        return f"the label is neither a word nor a whole number but {label!r:.40}"
    return None if str(label).strip() else "the label is empty"


def _records(spec: str, columns: Columns, reading: Reading, progress: Progress) -> Records:
    """(where, (text, label)) of each record of a source."""
    scheme = spec.partition(":")[0].lower()
    if scheme == "hf":
        yield from _hub_records(spec, columns)
    elif scheme in ("http", "https"):
        with TemporaryDirectory() as scratch:
            yield from _file_records(download(spec, Path(scratch), progress), columns, reading)
    else:
        for file in local_files(Path(spec).expanduser()):
            yield from _file_records(file, columns, reading)


def _file_records(file: InputFile, columns: Columns, reading: Reading) -> Records:
    def choose(found: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(chosen_columns(found, columns, file.label)))

    if file.kind in (".csv", ".tsv"):
        records = csv_records(file, reading, choose)
    elif file.kind == ".parquet":
        records = parquet_records(file, reading, choose)
    elif file.kind in (".jsonl", ".ndjson", ".json"):
        records = jsonl_records(file, reading)
    else:
        raise DataError(f"{file.label} has no labels: give a .csv, .tsv, .jsonl or .parquet file")
    wanted: tuple[str, str] | None = None
    for where, record in records:
        if not isinstance(record, dict):
            reading.reject(f"{where} is no record with a text and a label but a {type(record).__name__}")
            continue
        wanted = wanted or chosen_columns(list(record), columns, file.label)
        yield where, (record.get(wanted[0]), record.get(wanted[1]))


def _hub_records(spec: str, columns: Columns) -> Records:
    """Rows of the hub, whose numbered labels have names there."""
    wanted: tuple[str, str] | None = None
    names: Sequence[str] = ()
    for where, row, features in hub_rows(spec):
        if wanted is None:
            wanted = chosen_columns(list(row), columns, spec)
            names = getattr((features or {}).get(wanted[1]), "names", None) or ()
        label = row.get(wanted[1])
        if isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        yield where, (row.get(wanted[0]), label)


def chosen_columns(found: Sequence[str], columns: Columns, label: str) -> tuple[str, str]:
    """The columns of text and label among those there are. DataError where they cannot be told."""
    text = columns.text or _usual(found, TEXT_COLUMNS)
    target = columns.label or _usual(found, LABEL_COLUMNS)
    if text == "" and len(found) == 2 and target:
        text = next(name for name in found if name != target)
    for name, role, flag in ((target, "label", "--label-column"), (text, "text", "--text-column")):
        if name not in found:
            missing = f"no column {name!r}" if name else f"no column that is plainly the {role}"
            raise DataError(f"{label} has {missing}; its columns are {', '.join(found)[:500]}; choose with {flag}")
    return text, target


def _usual(found: Sequence[str], usual: Sequence[str]) -> str:
    by_lower = {name.lower(): name for name in reversed(found)}
    return next((by_lower[name] for name in usual if name in by_lower), "")
