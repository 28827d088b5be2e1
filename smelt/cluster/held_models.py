"""Models that sessions stand on: they come with the first session and leave with the last; computes nothing itself."""

import itertools
from collections.abc import Callable
from functools import partial

from smelt.cluster.lanes import Base
from smelt.inference.sample_jobs import Holding
from smelt.inference.server import InferenceServer
from smelt.inference.service import TextModel
from smelt.training.session import SessionTrainer

Come = Callable[[Base], None]
Refused = Callable[[Exception], None]


class HeldModels:
    """Everything here happens on the server's thread. `leave` ends what is done with a model that others want gone."""

    def __init__(self, server: InferenceServer, leave: Callable[[Base], None]) -> None:
        self._server = server
        self._leave = leave
        self._held: dict[str, Base] = {}
        self._holdings: dict[str, Holding] = {}
        self._visitors: dict[str, list[tuple[Come, Refused]]] = {}
        self._numbers = itertools.count()

    def need(self, name: str, come: Come, refused: Refused) -> None:
        """Call one of the two, at once where the model is there."""
        if name in self._held:
            come(self._held[name])
            return
        self._visitors.setdefault(name, []).append((come, refused))
        if name not in self._holdings:
            key = f"sessions/{next(self._numbers)}"
            holding = Holding(key, partial(self._take, name), partial(self._refuse, name), partial(self._go, name))
            self._holdings[name] = holding
            self._server.hold(name, holding)

    def release_all_but(self, names: set[str]) -> None:
        """On no others does a session stand any more."""
        for name in self._held.keys() - names:
            self._release(name)

    def _release(self, name: str) -> None:
        self._held.pop(name, None)
        if holding := self._holdings.pop(name, None):
            self._server.release(holding)

    def _take(self, name: str, model: TextModel) -> None:
        try:
            base = Base(name, model, SessionTrainer(model.model))
        except Exception as error:  # noqa: BLE001 - what cannot be trained must not end the thread
            holding = self._holdings[name]
            self._refuse(name, error)
            self._server.release(holding)
            return
        self._held[name] = base
        for come, _ in self._visitors.pop(name, []):
            come(base)

    def _refuse(self, name: str, error: Exception) -> None:
        self._holdings.pop(name, None)
        for _, refused in self._visitors.pop(name, []):
            refused(error)

    def _go(self, name: str) -> None:
        base = self._held.get(name)
        self._release(name)
        if base is not None:
            self._leave(base)
