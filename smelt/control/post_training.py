"""What every API of training by request stands on, put together once; knows no API."""

from pathlib import Path

from sqlalchemy import Engine

from smelt.control.catalogue import Catalogue
from smelt.control.samplers import Samplers
from smelt.control.saved_weights import WeightsStore
from smelt.control.session_figures import SessionFigures
from smelt.control.sessions import Sessions
from smelt.control.training_models import TrainingModels
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer


class PostTraining:
    """Sessions, their models, what they save and what is sampled from it."""

    def __init__(self, home: Path, database: Engine, writer: Writer, ledger: Ledger, catalogue: Catalogue) -> None:
        self.ledger = ledger
        self.figures = SessionFigures(home)
        self.catalogue = catalogue
        self.sessions = Sessions(database, writer)
        self.weights = WeightsStore(database, writer, home, catalogue.models_folder)
        self.models = TrainingModels(ledger, database, catalogue, self.sessions, self.weights)
        self.samplers = Samplers(ledger, database, writer, catalogue, self.sessions, self.weights)
