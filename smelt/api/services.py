"""What the routes stand on, put together once by the process (or by a test); knows no route."""

from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import Engine

from smelt.control.abuse_checker import AbuseChecker
from smelt.control.adapters_in_training import AdaptersInTraining
from smelt.control.batches import Batches
from smelt.control.catalogue import Catalogue
from smelt.control.chunked_uploads import ChunkedUploads
from smelt.control.completions import Completions
from smelt.control.fine_tuning import FineTuning
from smelt.control.model_server import ModelServer
from smelt.control.post_training import PostTraining
from smelt.control.run_requests import RunRequests
from smelt.control.uploads import Uploads
from smelt.settings import Settings
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer


@dataclass(frozen=True)
class Services:
    """Everything a route may ask. `default_model` is the name or folder given to `smelt serve`, if any."""

    settings: Settings
    database: Engine  # for reading; whoever writes goes through the writer
    writer: Writer
    ledger: Ledger
    model_server: ModelServer
    abuse_checker: AbuseChecker
    default_model: str | None = None

    @cached_property
    def catalogue(self) -> Catalogue:
        """The models that may be asked: one for all routes, so that a change by one is seen by the others."""
        return Catalogue(self.settings.models, self.default_model)

    @cached_property
    def adapters(self) -> AdaptersInTraining:
        """Adapters that people have named."""
        return AdaptersInTraining(self.post_training, self.ledger, self.database, self.catalogue, self.model_server)

    @cached_property
    def completions(self) -> Completions:
        """What writes, now and for later."""
        return Completions(self.model_server, self.ledger, self.abuse_checker)

    @cached_property
    def post_training(self) -> PostTraining:
        """Sessions of training by request: one for all APIs, for what it remembers must be so for each of them."""
        return PostTraining(self.settings.home, self.database, self.writer, self.ledger, self.catalogue)

    @cached_property
    def uploads(self) -> Uploads:
        """The files that people upload."""
        return Uploads(self.settings.home, self.database, self.writer)

    @cached_property
    def chunked_uploads(self) -> ChunkedUploads:
        """Files that come in parts."""
        return ChunkedUploads(self.uploads, self.database, self.writer)

    @cached_property
    def batches(self) -> Batches:
        """Files of requests, answered beside the live ones."""
        return Batches(self.settings.home, self.database, self.writer, self.ledger, self.uploads)

    @cached_property
    def run_requests(self) -> RunRequests:
        """Runs that are asked for: one for all APIs, for it keeps how far it has read their files."""
        return RunRequests(self.settings, self.ledger, self.model_server, self.uploads)

    @cached_property
    def fine_tuning(self) -> FineTuning:
        """Jobs over runs, whose results are served."""
        return FineTuning(
            self.settings.models,
            self.database,
            self.writer,
            self.ledger,
            self.uploads,
            self.run_requests,
            self.catalogue,
        )
