"""/api/training: a form, a config file or JSON becomes a run with that server's defaults; stopped, resumed, told of."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from gated import client_of
from live import with_caller
from smelt.api import failures, training_form
from smelt.api.services import Services
from smelt.api.training_form import run_values
from smelt.configs import RUN_LOG, RUN_METRICS
from smelt.control.dataset_requests import DatasetRequests
from smelt.control.keys import Caller
from smelt.errors import InvalidInput
from smelt.transport.messages import TrainRequest

pytestmark = pytest.mark.anyio

ADA = Caller("ada", "key", frozenset({"training"}))
EVE = Caller("eve", "other", frozenset({"training"}))
TEXT = "It was the best of times, it was the worst of times.\n" * 200
SMALL = {"tokenizer": "char", "n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 32, "max_iters": 7}


class Server:
    """The routes, and what stands behind them."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.datasets = DatasetRequests(services.settings, services.ledger, services.uploads)
        self.runs = services.run_requests
        self.app = FastAPI()
        failures.install(self.app)
        self.app.include_router(training_form.router(services, self.datasets))

    async def granted(self) -> TrainRequest:
        """What a launcher would be asked to train."""
        ledger = self.services.ledger
        (granted,) = await ledger.next_grants(await ledger.open_epoch(), 1, ("train",))
        assert granted.request is not None
        return msgspec.msgpack.decode(granted.request, type=TrainRequest)


@pytest.fixture
def server(services: Services) -> Server:
    return Server(services)


@pytest.fixture
async def ada(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(with_caller(server.app, ADA)) as client, server.datasets.running():
        yield client


async def start(client: httpx.AsyncClient, status: int = 200, **parts: Any) -> dict[str, Any]:
    answer = await client.post("/api/training/start", **parts)
    assert answer.status_code == status, answer.text
    said: dict[str, Any] = answer.json()
    return said


async def test_a_form_with_a_file_becomes_a_run_with_that_servers_defaults(
    server: Server, ada: httpx.AsyncClient
) -> None:
    files = {
        "file": ("tale of two.txt", TEXT),
        "config_file": ("config.yaml", "max_iters: 99\nbatch_size: 3\nmodel:\n  n_layer: 1\n"),
        "config": (None, json.dumps(SMALL | {"out_dir": "elsewhere"})),
        "init_from": (None, "scratch"),
        "out_dir": (None, "out-tale"),
    }
    started = await start(ada, files=files)
    assert started["success"]
    config = (await server.granted()).config
    assert (config["max_iters"], config["batch_size"], config["learning_rate"]) == (7, 3, 6e-4)
    assert (config["train_val_split"], config["eval_interval"], config["compile"]) == (0.1, 500, "false")
    made = await server.datasets.read(config["dataset"], "ada")
    assert (made.state, made.source, made.tokenizer, made.owner) == ("ready", "tale of two.txt", "char", "ada")
    status = (await ada.get("/api/training/status")).json()
    assert (status["is_training"], status["run_id"], status["state"]) == (True, started["run_id"], "queued")
    assert status["config"]["n_embd"] == 16
    again = await start(ada, 409, files=files)
    assert again == {
        "success": False,
        "error": f"training is under way already: {started['run_id']} is queued; stop it first",
    }
    assert (await ada.post("/api/training/stop")).json() == {"success": True}
    assert (await ada.post("/api/training/stop")).json() == {"success": False}
    assert (await ada.get("/api/training/status")).json()["state"] == "cancelled"


async def test_a_run_is_resumed_by_its_out_dir_and_says_how_it_ended(server: Server, ada: httpx.AsyncClient) -> None:
    fields = {"config": json.dumps(SMALL), "out_dir": "out-b", "dataset": "words"}
    assert (await start(ada, 404, data=fields))["success"] is False
    sent = await ada.post("/api/training/start", data=fields | {"dataset": ""}, files={"file": ("words.txt", TEXT)})
    run_id = sent.json()["run_id"]
    folder = server.services.settings.runs / run_id
    (folder / RUN_LOG).write_text("\n".join(f"line {number}" for number in range(150)) + "\n")
    (folder / RUN_METRICS).write_text(
        '{"kind": "step", "step": 2, "loss": 1.5}\n{"kind": "failure", "message": "nan"}\n'
    )
    status = (await ada.get("/api/training/status")).json()
    assert (status["is_training"], status["state"], status["reason"], status["loss"]) == (False, "failed", "nan", 1.5)
    assert [line["message"] for line in status["logs"]] == [f"line {number}" for number in range(50, 150)]
    assert status["logs"][0]["timestamp"].startswith("20")
    await ada.post("/api/training/stop")
    resume = {"init_from": "resume", "out_dir": "out-b", "max_iters": 12}
    assert (await start(ada, 404, json=resume | {"out_dir": "other"}))["success"] is False
    await server.runs.cancel(run_id)
    assert (await start(ada, json=resume)) == {"success": True, "run_id": run_id}
    config = (await server.runs.show(run_id)).config
    assert (config["max_iters"], config["n_embd"]) == (12, 16)


async def test_others_do_not_see_it(server: Server, ada: httpx.AsyncClient) -> None:
    await ada.post("/api/training/start", data={"config": json.dumps(SMALL)}, files={"file": ("words.txt", TEXT)})
    async with client_of(with_caller(server.app, EVE)) as eve:
        nothing = {"is_training": False, "config": {}, "logs": [], "run_id": None, "state": None}
        assert (await eve.get("/api/training/status")).json().items() >= nothing.items()
        assert (await eve.post("/api/training/stop")).json() == {"success": False}


async def test_what_is_wrong_is_said(ada: httpx.AsyncClient) -> None:
    assert await start(ada, 400, data={"init_from": "scratch"}) == {
        "success": False,
        "error": "No data source provided",
    }
    file = {"file": ("words.txt", TEXT)}
    for config, words in (
        ("{", "neither JSON nor YAML"),
        ("[1]", "must be a mapping"),
        ('{"n_layers": 3}', "unknown key 'n_layers'"),
        ('{"max_iters": "many", "tokenizer": "char"}', "max_iters"),
        ('{"nnodes": 2}', "several machines"),
    ):
        assert words in (await start(ada, 400, data={"config": config}, files=file))["error"]
    short = await start(ada, 400, data={"config": json.dumps(SMALL)}, files={"file": ("a.txt", "short")})
    assert short["error"].startswith("a.txt gives 6 tokens")
    inner = {"url": "http://127.0.0.1:1/x.txt", "config": json.dumps(SMALL)}
    assert "inner network" in (await start(ada, 400, data=inner))["error"]


def test_the_keys_are_nanogpts() -> None:
    values = run_values({"config": '{"beta1": 0.8, "n_head": 4}', "ddp_enabled": "true", "nproc_per_node": "2"})
    assert (values["betas"], values["ranks"], values["n_head"], values["n_embd"]) == ((0.8, 0.95), "2", 4, 768)
    assert "n_layer" not in run_values({"init_from": "gpt2"})
    with pytest.raises(InvalidInput, match="nnodes 'x'"):
        run_values({"nnodes": "x"})
