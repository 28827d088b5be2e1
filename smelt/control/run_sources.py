"""What a run that is asked of a server may read: its sender's uploads and datasets, registered models, built-in text.

A path or a URL in a request would make the server read what its sender cannot. Knows no HTTP and no torch.
"""

import asyncio
from pathlib import Path
from typing import TypeVar

from smelt.control.dataset_requests import check_tokenizer
from smelt.control.datasets import open_for
from smelt.control.uploads import Uploads
from smelt.errors import InvalidInput, NotFound
from smelt.models.registry import registered_name, registered_names
from smelt.run_configs import ClassifierConfig, FineTuneConfig, RunConfig, TrainConfig
from smelt.settings import Settings
from smelt.storage.records import Upload

UPLOAD = "file-"
R = TypeVar("R", bound=RunConfig)


class RunSources:
    """The files, datasets and models of one server."""

    def __init__(self, settings: Settings, uploads: Uploads) -> None:
        self._settings = settings
        self._uploads = uploads

    async def resolved(self, config: RunConfig, out_dir: Path, owner: str) -> RunConfig:
        """The config with places of the server in place of names; uploads lie in the run's folder too from now on.

        InvalidInput for what a request may not name, NotFound for what the owner does not have.
        """
        if isinstance(config, TrainConfig):
            return await asyncio.to_thread(self._checked_pretraining, config, owner)
        if config.init_from == "resume":
            raise InvalidInput("a run is resumed by POST /v1/runs/ID/resume; leave init_from out", param="init_from")
        if isinstance(config, FineTuneConfig):
            model = await asyncio.to_thread(self._model, config.model, "model")
            return await self._with_data(config.replace(model=model), ("data", "valid_data"), out_dir, owner)
        if isinstance(config, ClassifierConfig):
            if config.model != "scratch":
                config = config.replace(model=await asyncio.to_thread(self._model, config.model, "model"))
            check_tokenizer(config.tokenizer)
            return await self._with_data(config, ("data", "valid"), out_dir, owner, may_be_dataset=False)
        raise InvalidInput(f"recipe {config.recipe!r} cannot be asked of a server", param="recipe")

    def _checked_pretraining(self, config: TrainConfig, owner: str) -> TrainConfig:
        if config.dataset is not None:
            open_for(self._settings.datasets, config.dataset, owner)
        elif config.data_path is None:
            raise InvalidInput("no data to train on: give dataset, the name of a registered one", param="dataset")
        elif not config.data_path.startswith("builtin:"):
            raise InvalidInput(
                f"data_path {config.data_path!r} is not built in; a run on a server takes builtin:pydoc, or dataset, "
                f"the name of a registered one",
                param="data_path",
            )
        if config.tokenizer is not None:
            check_tokenizer(config.tokenizer)
        if config.init_from == "scratch":
            return config
        return config.replace(init_from=self._model(config.init_from, "init_from"))

    def _model(self, name: str, field: str) -> str:
        found = registered_name(name, self._settings.models)
        if found is None:
            known = ", ".join(registered_names(self._settings.models)) or "none"
            raise NotFound(f"{field} {name!r} is no registered model; registered: {known}")
        return found

    async def _with_data(
        self, config: R, fields: tuple[str, ...], out_dir: Path, owner: str, *, may_be_dataset: bool = True
    ) -> R:
        """The config with its uploads in the run's folder, where they stay when their sender deletes them."""
        uploads: dict[str, Upload] = {}
        for field in fields:
            value = getattr(config, field)
            if value is not None and value.startswith(UPLOAD):
                uploads[field] = await self._uploads.find(owner, value)
            elif value is not None and may_be_dataset:
                await asyncio.to_thread(open_for, self._settings.datasets, value, owner)
            elif value is not None:
                raise InvalidInput(f"{field} {value!r} is no upload; give the id of one, file-...", param=field)
        places = {field: out_dir / f"{field}{upload.suffix}" for field, upload in uploads.items()}
        for field, upload in uploads.items():
            await asyncio.to_thread(out_dir.mkdir, parents=True, exist_ok=True)
            await self._uploads.lend(upload, places[field])
        return config.replace(**{field: str(place) for field, place in places.items()})
