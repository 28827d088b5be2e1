"""OpenAI's fine-tuning over runs: accepted, followed, paused, resumed, served; bad files by line; nobody else's."""

import asyncio
import csv
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from gated import ask, client_of, make_key, refused
from scripted import Scripted
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.cluster.trainer import values_of
from smelt.control.keys import LOCAL
from smelt.data.characters import ByteTokenizer
from smelt.errors import SmeltError
from smelt.library import run, run_config
from smelt.models.decoder import Decoder
from smelt.models.weights import write_model
from smelt.run_configs import TrainConfig
from smelt.transport.failures import failure_of
from smelt.transport.messages import TrainRequest

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

JOBS = "/v1/fine_tuning/jobs"
QUICK = {"learning_rate": 1e-2, "lora_rank": 4, "log_interval": 1}
CHATS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in [("a", "xyz"), ("b", "uvw"), ("c", "rst")] * 2
]
OVER = ("succeeded", "failed", "cancelled")


@pytest.fixture
def base(services: Services, home: Path) -> str:
    """A registered model that knows nothing."""
    assert services.settings.home == home, "runs find it there too"
    config = TrainConfig(n_layer=1, n_head=2, n_embd=16, block_size=64).decoder_config(257)
    model = Decoder(config)
    model.initialize(0)
    folder = services.settings.models / "base"
    write_model(config, model.state_dict(), folder)
    ByteTokenizer().save(folder)
    return "base"


@asynccontextmanager
async def training(services: Services) -> AsyncIterator[None]:
    """Do what a launcher does, in this process, and see jobs through."""

    async def train() -> None:
        epoch = await services.ledger.open_epoch()
        while True:
            for row in await services.ledger.next_grants(epoch, 1, ("train",)):
                assert row.request is not None
                request = msgspec.msgpack.decode(row.request, type=TrainRequest)
                try:
                    summary = await asyncio.to_thread(lambda request=request: run(run_config(values_of(request))))
                    body, category = msgspec.msgpack.encode(asdict(summary)), None
                except SmeltError as error:
                    body, category = msgspec.msgpack.encode(failure_of(error)), "user"
                await services.ledger.finish(row.id, epoch, body, category)

    task = asyncio.create_task(train())
    async with services.fine_tuning.running():
        yield
    task.cancel()
    await asyncio.wait([task])


async def uploaded(client: httpx.AsyncClient, lines: list[Any], name: str = "chats.jsonl") -> str:
    content = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": (name, content.encode())}}
    return str((await client.post("/v1/files", **form)).raise_for_status().json()["id"])


async def begun(client: httpx.AsyncClient, lines: list[Any], **body: Any) -> dict[str, Any]:
    asked = {"model": "base", "training_file": await uploaded(client, lines), "config": QUICK, **body}
    return await ask(client, JOBS, asked)


async def reached(
    client: httpx.AsyncClient, job: dict[str, Any], condition: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The job once that is so: its users have to ask, too."""
    while not condition(now := await read(client, job)):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return now


async def ended(client: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    return await reached(client, job, lambda now: now["status"] in OVER)


async def read(client: httpx.AsyncClient, job: dict[str, Any], more: str = "") -> Any:
    return (await client.get(f"{JOBS}/{job['id']}{more}")).raise_for_status().json()


@pytest.mark.parametrize("lora", [True, False])
async def test_a_job_is_done_told_of_and_served(
    client: httpx.AsyncClient, services: Services, model_server: Scripted, base: str, lora: bool
) -> None:
    held = await uploaded(client, CHATS[:2])
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 2, "beta": "auto"}}}
    config = {**QUICK, "lora": lora, "eval_interval": 3}
    given = {"method": method, "suffix": "mine", "seed": 7, "metadata": {"for": "me"}, "validation_file": held}
    async with training(services):
        job = await begun(client, CHATS, **given, config=config)
        assert (job["status"], job["object"], job["seed"]) == ("validating_files", "fine_tuning.job", 7)
        assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 3
        done = await ended(client, job)
    assert (done["status"], done["error"], done["metadata"]) == ("succeeded", None, {"for": "me"})
    name = done["fine_tuned_model"]
    assert name == f"ft:base:mine:{job['id'][-8:]}"
    assert done["trained_tokens"] > 0
    assert done["created_at"] <= done["finished_at"]
    says = {"model": name, "messages": [{"role": "user", "content": "a"}]}
    assert (await ask(client, "/v1/chat/completions", says))["model"] == name
    asked = model_server.asked[-1]
    assert (asked.model, asked.adapter) == (("base", f"models/{name}") if lora else (name, None))
    assert name in [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    events = await read(client, job, "/events?limit=100")
    told = [event["message"] for event in events["data"]][::-1]
    assert told[0] == f"Created fine-tuning job: {job['id']}"
    assert told[-2:] == [f"New fine-tuned model created: {name}", "The job has successfully completed"]
    steps = [event["data"] for event in events["data"][::-1] if event["type"] == "metrics"]
    assert [each["step"] for each in steps] == list(range(1, 10))
    assert steps[0]["train_loss"] > steps[-1]["train_loss"]
    assert steps[2].keys() >= {"valid_loss", "valid_mean_token_accuracy", "train_mean_token_accuracy"}
    table = (await client.get(f"/v1/files/{done['result_files'][0]}/content")).text
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    assert float(rows[8]["train_loss"]) == steps[8]["train_loss"]
    assert rows[0]["valid_loss"] == ""
    checkpoints = (await read(client, job, "/checkpoints"))["data"]
    assert checkpoints[0]["step_number"] == 9
    assert checkpoints[0]["metrics"]["train_loss"] == steps[8]["train_loss"]
    there = [await services.catalogue.find(name)]
    if lora:
        there += [await services.catalogue.find(each["fine_tuned_model_checkpoint"]) for each in checkpoints]
    assert all(each.created for each in there)


async def test_a_file_that_came_in_parts_is_learned(client: httpx.AsyncClient, services: Services, base: str) -> None:
    content = "".join(json.dumps(line) + "\n" for line in CHATS).encode()
    asked = {"filename": "chats.jsonl", "purpose": "fine-tune", "bytes": len(content), "mime_type": "text/jsonl"}
    upload = await ask(client, "/v1/uploads", asked)
    parts = []
    for half in (content[:100], content[100:]):
        answer = await client.post(f"/v1/uploads/{upload['id']}/parts", files={"data": ("part", half)})
        parts.append(answer.raise_for_status().json()["id"])
    done = await ask(client, f"/v1/uploads/{upload['id']}/complete", {"part_ids": parts})
    asked = {"model": "base", "training_file": done["file"]["id"], "config": {**QUICK, "max_iters": 2}}
    async with training(services):
        job = await ended(client, await ask(client, JOBS, asked))
    assert job["status"] == "succeeded", job["error"]


async def test_lists_go_page_by_page(client: httpx.AsyncClient, base: str) -> None:
    jobs = [await begun(client, CHATS) for _ in range(3)]
    page = (await client.get(f"{JOBS}?limit=2")).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([jobs[2]["id"], jobs[1]["id"]], True)
    page = (await client.get(f"{JOBS}?limit=2&after={page['last_id']}")).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([jobs[0]["id"]], False)
    tagged = [await begun(client, CHATS, metadata={"team": team, "x": "1"}) for team in "ab"]
    page = (await client.get(JOBS, params={"metadata[team]": "a", "metadata[x]": "1", "limit": 1})).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([tagged[0]["id"]], False)
    events = await read(client, jobs[0], "/events?limit=1")
    assert events["has_more"]
    later = await read(client, jobs[0], f"/events?after={events['last_id']}")
    assert [event["message"] for event in later["data"]] == [f"Created fine-tuning job: {jobs[0]['id']}"]
    assert (await client.get(f"{JOBS}/{jobs[0]['id']}/events?after=ftevent-none")).status_code == 404
    assert (await read(client, jobs[0], "/checkpoints"))["data"] == []


@pytest.mark.parametrize(
    ("lines", "method", "param", "message"),
    [
        ([CHATS[0], "{", CHATS[1], {"messages": []}], "supervised", "training_file", "line 2.*line 4"),
        ([*CHATS, {"messages": CHATS[0]["messages"][:1]}], "supervised", "training_file", "line 7.*nothing to learn"),
        (CHATS[:1], "dpo", "training_file", "line 1 is no preference, and the method is dpo"),
        (["x" * 10], "supervised", "training_file", "chats.jsonl, line 1"),
    ],
)
async def test_a_bad_file_fails_the_job_with_the_numbers_of_its_lines(
    client: httpx.AsyncClient, services: Services, base: str, lines: list[Any], method: str, param: str, message: str
) -> None:
    async with training(services):
        failed = await ended(client, await begun(client, lines, method={"type": method}))
    assert (failed["status"], failed["fine_tuned_model"]) == ("failed", None)
    error = failed["error"]
    assert (error["code"], error["param"]) == (f"invalid_{param}", param)
    assert re.search(message, error["message"], re.DOTALL)
    events = (await read(client, failed, "/events"))["data"]
    assert events[0]["level"] == "error"
    assert error["message"] in events[0]["message"]


async def test_what_only_the_trainer_finds_is_told_too(
    client: httpx.AsyncClient, services: Services, base: str
) -> None:
    long = {"prompt": "q", "completion": "x" * 500}
    async with training(services):
        failed = await ended(client, await begun(client, [CHATS[0], long]))
    assert (failed["status"], failed["error"]["code"]) == ("failed", "training_failed")
    assert "line 2" in failed["error"]["message"]
    assert str(services.settings.home) not in failed["error"]["message"]


async def test_a_paused_job_goes_on_to_the_same_result(
    client: httpx.AsyncClient, services: Services, base: str
) -> None:
    job = await begun(client, CHATS, seed=3)
    with_pause = await begun(client, CHATS, seed=3)
    async with services.fine_tuning.running():  # nobody trains yet
        await reached(client, with_pause, lambda now: now["status"] == "queued")
        await reached(client, job, lambda now: now["status"] == "queued")
        assert (await ask(client, f"{JOBS}/{with_pause['id']}/pause", {}))["status"] == "paused"
        await refused(client, f"{JOBS}/{with_pause['id']}/pause", {})
    async with training(services):
        whole = await ended(client, job)
        assert (await read(client, with_pause))["status"] == "paused"
        await refused(client, f"{JOBS}/{job['id']}/resume", {})
        assert (await ask(client, f"{JOBS}/{with_pause['id']}/resume", {}))["status"] in ("queued", "running")
        done = await ended(client, with_pause)
    tables = [(await client.get(f"/v1/files/{each['result_files'][0]}/content")).text for each in (whole, done)]
    assert tables[0] == tables[1]


async def test_a_cancelled_job_stays_so(client: httpx.AsyncClient, services: Services, base: str) -> None:
    early = await begun(client, CHATS)
    assert (await ask(client, f"{JOBS}/{early['id']}/cancel", {}))["status"] == "cancelled"
    late = await begun(client, CHATS)
    async with services.fine_tuning.running():
        queued = await reached(client, late, lambda now: now["status"] == "queued")
        cancelled = await ask(client, f"{JOBS}/{late['id']}/cancel", {})
        assert (cancelled["status"], cancelled["finished_at"] is None) == ("cancelled", False)
    assert (await services.run_requests.status(queued["run_id"])).state == "cancelled"
    assert (await read(client, early))["run_id"] is None
    for job in (early, late):
        assert (await ask(client, f"{JOBS}/{job['id']}/cancel", {}))["status"] == "cancelled"
        for verb in ("pause", "resume"):
            await refused(client, f"{JOBS}/{job['id']}/{verb}", {})


async def test_what_one_process_has_begun_the_next_one_ends(
    client: httpx.AsyncClient, services: Services, base: str
) -> None:
    jobs = [await begun(client, CHATS) for _ in range(2)]
    async with services.fine_tuning.running():
        await reached(client, jobs[0], lambda now: now["status"] == "queued")
    async with training(services):
        assert [(await ended(client, job))["status"] for job in jobs] == ["succeeded"] * 2


async def test_a_run_that_was_asked_for_before_a_death_is_not_asked_for_again(
    client: httpx.AsyncClient, services: Services, base: str
) -> None:
    job = await begun(client, CHATS)
    values = {"recipe": "fine-tune", "model": base, "data": job["training_file"], "train_val_split": 0.0, **QUICK}
    run = await services.run_requests.create(values, LOCAL.owner, label=job["id"])
    async with training(services):
        done = await ended(client, job)
    assert (done["status"], done["run_id"]) == ("succeeded", run.id)
    assert len(await services.run_requests.all()) == 1


async def test_what_was_fine_tuned_is_fine_tuned_further(
    client: httpx.AsyncClient, services: Services, base: str
) -> None:
    async with training(services):
        first = (await ended(client, await begun(client, CHATS)))["fine_tuned_model"]
        old = {path.name: path.read_bytes() for path in (services.settings.models / first).iterdir()}
        further = {"model": first, "suffix": "more"}
        second = await ended(client, await begun(client, CHATS, **further, config={"learning_rate": 1e-2}))
        whole = await ended(client, await begun(client, CHATS, model=first, config={"lora": False, "max_iters": 2}))
        other = await ended(client, await begun(client, CHATS, model=first, config={"lora_rank": 8}))
    assert (second["status"], whole["status"]) == ("succeeded", "succeeded"), (second["error"], whole["error"])
    name = second["fine_tuned_model"]
    assert name == f"ft:{first.removeprefix('ft:').replace(':', '-')}:more:{second['id'][-8:]}"
    served = await services.catalogue.find(name)
    assert (served.base, served.adapter) == ("base", f"models/{name}")
    assert {path.name: path.read_bytes() for path in (services.settings.models / first).iterdir()} == old
    served = await services.catalogue.find(whole["fine_tuned_model"])
    assert (served.base, served.adapter) == (None, None)
    assert other["status"] == "failed"
    assert f"lora_rank 8 is not the 4 of {first}; leave it out" in other["error"]["message"]


async def test_preferences_are_learned(client: httpx.AsyncClient, services: Services, base: str) -> None:
    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": question}]},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for question in "abcd"
    ]
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}
    async with training(services):
        done = await ended(client, await begun(client, pairs, method=method))
    assert done["status"] == "succeeded", done["error"]
    assert done["method"]["dpo"]["hyperparameters"]["beta"] == 0.2
    events = (await read(client, done, "/events?limit=100"))["data"]
    assert any("train_margin" in (event["data"] or {}) for event in events)


@pytest.mark.parametrize(
    ("change", "param", "status"),
    [
        ({"model": "unknown"}, "model", 404),
        ({"model": "tiny"}, "model", 400),
        ({"training_file": "file-none"}, "training_file", 400),
        ({"validation_file": "file-none"}, "validation_file", 400),
        ({"method": {"type": "reinforcement"}}, "method.type", 400),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "many"}}}}, None, 400),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"x": 1}}}}, "hyperparameters.x", 400),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", 400),
        ({"hyperparameters": {"n_epochs": 0}}, None, 400),
        ({"integrations": [{"type": "wandb"}]}, "integrations", 400),
        ({"suffix": "a b"}, "suffix", 400),
        ({"seed": -1}, "seed", 400),
        ({"config": {"out_dir": "/"}}, "config.out_dir", 400),
        ({"config": {"lora_rank": 0}}, None, 400),
        ({"more": 1}, "more", 400),
    ],
)
async def test_what_is_wrong_with_a_body_is_said(
    client: httpx.AsyncClient, base: str, change: dict[str, Any], param: str | None, status: int
) -> None:
    asked = {"model": "base", "training_file": await uploaded(client, CHATS)}
    error = await refused(client, JOBS, asked | change, status)
    assert param is None or error["param"] == param
    assert (await client.get(JOBS)).json()["data"] == []


async def test_a_job_that_is_asked_for_again_is_the_same(client: httpx.AsyncClient, base: str) -> None:
    asked = {"model": base, "training_file": await uploaded(client, CHATS)}
    key = {"Idempotency-Key": "mine"}
    jobs = [(await client.post(JOBS, json=asked, headers=key)).json() for _ in range(2)]
    assert jobs[0]["id"] == jobs[1]["id"]
    other = await client.post(JOBS, json=asked | {"seed": 5}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


async def test_permissions_are_refused_by_name(client: httpx.AsyncClient) -> None:
    error = await refused(client, "/v1/fine_tuning/checkpoints/ft:base:mine:1/permissions", {"project_ids": []})
    assert "needs no permissions" in error["message"]


async def test_jobs_are_their_owners_alone(services: Services, base: str) -> None:
    app = create_app(services)
    ann, bob, cyd = [
        make_key(services, name, owner=name, scopes=[scope])
        for name, scope in (("ann", "training"), ("bob", "training"), ("cyd", "inference"))
    ]
    async with client_of(app, ann) as client:
        job = await begun(client, CHATS)
    async with client_of(app, bob) as client:
        for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/checkpoints"), ("POST", "/cancel")):
            assert (await client.request(method, f"{JOBS}/{job['id']}{path}")).status_code == 404
        assert (await client.get(JOBS)).json()["data"] == []
        error = await refused(client, JOBS, {"model": "base", "training_file": job["training_file"]})
        assert error["param"] == "training_file"
    async with client_of(app, cyd) as client:
        assert (await client.get(JOBS)).status_code == 403
