"""How well labels are told apart: accuracy, F1 and confusions from counts; knows no model and no data."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCORES_FILE = "evaluation.json"  # of the best evaluation, in the run's folder


@dataclass(frozen=True, slots=True)
class LabelScores:
    """What came of looking at every text: its mean loss, and how often label i (row) was taken for j (column)."""

    labels: tuple[str, ...]
    loss: float
    confusion: tuple[tuple[int, ...], ...]

    @property
    def accuracy(self) -> float:
        """The fraction of texts whose label was said."""
        total = sum(map(sum, self.confusion))
        return sum(row[number] for number, row in enumerate(self.confusion)) / total

    def f1(self, number: int) -> float:
        """2 TP / (2 TP + FP + FN) of one label; 0 where it neither occurs nor is said, as scikit-learn has it."""
        hits = self.confusion[number][number]
        num_said = sum(row[number] for row in self.confusion)
        num_there = sum(self.confusion[number])
        return 2 * hits / (num_said + num_there) if num_said + num_there else 0.0

    @property
    def macro_f1(self) -> float:
        """The mean F1 of all labels, rare or not."""
        return sum(self.f1(number) for number in range(len(self.labels))) / len(self.labels)

    def as_json(self) -> dict[str, Any]:
        """What `evaluation.json` holds."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "labels": list(self.labels),
            "f1": [self.f1(number) for number in range(len(self.labels))],
            "confusion": [list(row) for row in self.confusion],
        }

    def lines(self) -> list[str]:
        """A table for people: of the texts of each label, how many were taken for which."""
        width = max(6, *(min(20, len(label)) for label in self.labels)) + 2
        names = [label[: width - 2] for label in self.labels]
        head = "label".ljust(width) + "".join(name.rjust(width) for name in names) + "F1".rjust(8)
        rows = [
            name.ljust(width)
            + "".join(str(count).rjust(width) for count in self.confusion[number])
            + f"{self.f1(number):8.3f}"
            for number, name in enumerate(names)
        ]
        return [f"accuracy {self.accuracy:.4f}, macro F1 {self.macro_f1:.4f}, loss {self.loss:.4f}", head, *rows]


def confusions(logits_BL: Tensor, labels_B: Tensor) -> Tensor:
    """(L, L) in float64: how many of these texts of label i have their largest logit at j."""
    num_labels = logits_BL.shape[1]
    places_B = labels_B * num_labels + logits_BL.argmax(dim=-1)
    return torch.bincount(places_B, minlength=num_labels**2).view(num_labels, num_labels).double()


def write_scores(scores: LabelScores, path: Path) -> None:
    """Replace the file whole."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(scores.as_json(), file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_scores(path: Path) -> LabelScores | None:
    """What `write_scores` wrote; None where nothing was."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return LabelScores(tuple(values["labels"]), values["loss"], tuple(tuple(row) for row in values["confusion"]))
