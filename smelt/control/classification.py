"""Classification: texts in, labels with their probabilities out; knows no HTTP and computes nothing.

What is asked at the same time by different clients is computed together, by the worker.
"""

import uuid
from collections.abc import Sequence

import numpy as np
from pydantic.dataclasses import dataclass

from smelt.control.catalogue import Catalogue
from smelt.control.model_server import ModelServer
from smelt.errors import InvalidInput
from smelt.transport.messages import Classified, Classify

NUM_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a text is, as far as a classifier knows; probabilities have four decimals."""

    label: str
    confidence: float
    all_probabilities: dict[str, float]


class Classification:
    """Finds the classifier that is meant, and asks it."""

    def __init__(self, catalogue: Catalogue, model_server: ModelServer) -> None:
        self._catalogue = catalogue
        self._model_server = model_server

    async def predict(self, texts: Sequence[str], model: str | None, owner: str) -> tuple[str, list[Prediction]]:
        """The model's name, and what it says of each text; without a name the only classifier there is.

        UnknownModel, Unavailable where there is none, InvalidInput where it is not clear which, or it is none.
        """
        served = await self._catalogue.find_classifier(model)
        if served.config is not None:
            raise InvalidInput(f"{served.name} writes text and has no labels; ask a classifier", "model")
        request = Classify(f"clas-{uuid.uuid4().hex}", owner, served.name, tuple(texts))
        return served.name, predictions(await self._model_server.classify(request))


def predictions(classified: Classified) -> list[Prediction]:
    """The most probable label of each text, and how probable all are."""
    rows = np.frombuffer(classified.probabilities, "<f4").reshape(-1, len(classified.labels)).astype(float)
    found = []
    for row in rows:
        shown = dict(zip(classified.labels, row.round(NUM_DECIMALS).tolist(), strict=True))
        label = classified.labels[int(row.argmax())]
        found.append(Prediction(label, shown[label], shown))
    return found
