"""Training by plain HTTP: the snippets of the README that it comes from, and what else may be asked or be wrong."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gated import client_of, make_key
from scripted import Scripted, scripted
from scripted_training import LOGPROB, ScriptedWorker
from smelt.api import chat_training
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.control.session_cleanup import SessionCleanup
from smelt.transport.tinker_wire import decode_forward_backward

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

SUM = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
PROMPT = b"User: What is 2+2?\n\nAssistant:"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Services, Scripted]]:
    with scripted(tmp_path / "home") as served:
        yield served


@pytest.fixture
async def worker(services: Services) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker(services.ledger, services.settings.home)
    task = asyncio.create_task(worker.run())
    yield worker
    task.cancel()
    await asyncio.wait([task])


async def post(client: httpx.AsyncClient, route: str, /, **body: Any) -> dict[str, Any]:
    answer = await client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def result(client: httpx.AsyncClient, promised: dict[str, Any]) -> dict[str, Any]:
    return await post(client, "/retrieve_future", request_id=promised["request_id"])


def body_of(worker: ScriptedWorker, services: Services, request_id: str) -> Any:
    future = services.ledger._read("local", request_id)
    assert future.request is not None
    return decode_forward_backward(future.request)


async def test_the_readme_s_supervised_example(client: httpx.AsyncClient, services: Services, worker: Any) -> None:
    response = await client.post(
        "/fwdbwd",
        json={
            "model_id": "my-model",
            "data": [[{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]],
            "loss_fn": "cross_entropy",
        },
    )
    future_id = response.json()["request_id"]
    told = (await client.post("/retrieve_future", json={"request_id": future_id})).json()
    num_tokens = len(PROMPT) + len(" 4$") - 1
    assert f"Loss: {told['loss']:.4f}" == f"Loss: {-LOGPROB * num_tokens:.4f}"
    assert (told["num_samples"], told["model_id"]) == (1, "my-model")
    assert told["metrics"] == {"loss:sum": told["loss"], "num_tokens": num_tokens}
    assert told["loss_fn_outputs"][0]["logprobs"] == [LOGPROB] * num_tokens
    (datum,) = body_of(worker, services, future_id).data
    assert bytes(datum.tokens.tolist()) == PROMPT + b" 4"
    assert datum.inputs["target_tokens"].tolist() == [*(PROMPT + b" 4")[1:], 256]
    assert datum.inputs["weights"].tolist() == [0.0] * (len(PROMPT) - 1) + [1.0] * 3


async def test_the_readme_s_example_of_ppo(client: httpx.AsyncClient, services: Services, worker: Any) -> None:
    promised = await post(
        client,
        "/fwdbwd",
        model_id="rl-model",
        data=[[{"role": "user", "content": "What is 10-3?"}, {"role": "assistant", "content": "7"}]],
        loss_fn="ppo",
        loss_fn_inputs={
            "target_tokens": [[32, 55, -100, -100]],
            "logprobs": [[-0.5, -0.25, 0, 0]],
            "advantages": [[1.0, 2.0, 0, 0]],
        },
    )
    assert (await result(client, promised))["model_id"] == "rl-model"
    request = body_of(worker, services, promised["request_id"])
    assert request.loss_name == "ppo"
    (datum,) = request.data
    assert datum.inputs["target_tokens"].tolist()[-2:] == [32, 55]
    assert datum.inputs["advantages"].tolist()[-3:] == [0.0, 1.0, 2.0]
    assert datum.inputs["logprobs"].tolist()[-3:] == [0.0, -0.5, -0.25]


async def test_a_step_has_the_defaults_of_this_api(client: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    await post(client, "/fwdbwd", model_id="a", data=[SUM])
    told = await result(client, await post(client, "/optim_step", model_id="a"))
    assert (told["metrics"]["step_completed"], told["model_id"]) == (1.0, "a")
    step = worker.steps[0]
    assert (step.learning_rate, step.beta2, step.eps, step.weight_decay) == (5e-4, 0.999, 1e-8, 0.01)
    again = await client.post("/optim_step", json={"model_id": "a"})
    assert (again.status_code, "forward_backward first" in again.text) == (400, True)


async def test_the_aliases_below_api_v1_know_whose_body_it_is(client: httpx.AsyncClient, worker: Any) -> None:
    promised = await post(client, "/api/v1/forward_backward", model_id="a", data=[SUM, SUM])
    assert (await result(client, promised))["num_samples"] == 2
    step = await post(client, "/api/v1/optim_step", model_id="a", adam_params={"learning_rate": 0.25})
    assert (await result(client, step))["metrics"]["step_completed"] == 1.0
    [adapter] = (await client.get("/adapters")).json()["adapters"]
    tinkers = await client.post("/api/v1/optim_step", json={"model_id": adapter["tinker_id"], "seq_id": 3})
    assert "request_id" in tinkers.json()
    assert (worker.steps[0].learning_rate, worker.steps[0].weight_decay) == (0.25, 0.01)
    assert (await client.post("/api/v1/forward_backward", content=b"x")).status_code == 415


async def test_adapters_are_listed_and_removed_and_may_come_again(client: httpx.AsyncClient, worker: Any) -> None:
    await post(client, "/fwdbwd", model_id="a", data=[SUM], rank=4)
    made = await post(client, "/add_lora", base_model="base", rank=8, alpha=32)
    assert (await result(client, made))["model_id"] == made["model_id"]
    assert made["model_id"].startswith("base_lora_")
    listed = (await client.get("/adapters")).json()["adapters"]
    assert [(each["model_id"], each["rank"], each["has_gradients"]) for each in listed] == [
        (made["model_id"], 8, False),
        ("a", 4, True),
    ]
    # GPT-2's layer of width 8: attention (24 and 8 rows), MLP (32 and 8)
    assert listed[1]["trainable_params"] == 4 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8))
    assert (await client.delete("/adapters/a")).json()["status"] == "deleted"
    assert (await client.delete("/adapters/a")).status_code == 404
    gone = await result(client, await post(client, "/remove_lora", adapter_id=made["model_id"]))
    assert gone["status"] == "deleted"
    assert (await client.get("/adapters")).json() == {"adapters": []}
    again = await result(client, await post(client, "/fwdbwd", model_id="a", data=[SUM]))
    assert again["model_id"] == "a"
    assert [each["rank"] for each in (await client.get("/adapters")).json()["adapters"]] == [16]


async def test_a_name_is_taken_once(client: httpx.AsyncClient, worker: Any) -> None:
    await post(client, "/add_lora", model_id="a")
    assert (await client.post("/add_lora", json={"model_id": "a"})).status_code == 409


async def test_weights_are_saved_and_loaded(client: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    await post(client, "/fwdbwd", model_id="a", data=[SUM])
    saved = await result(client, await post(client, "/save_weights", model_id="a", name="best"))
    assert saved["path"].endswith("/weights/best")
    await result(client, await post(client, "/load_weights", model_id="a", path=saved["path"]))
    assert worker.loads[0].with_optimizer
    sampler = await result(client, await post(client, "/save_weights_for_sampler", model_id="a", name="s"))
    assert sampler["path"].endswith("/sampler_weights/s")


async def test_an_adapter_from_elsewhere_can_be_gone_on_with(
    client: httpx.AsyncClient, services: Services, worker: ScriptedWorker
) -> None:
    folder = services.settings.models
    for name, file, settings in (
        ("tiny", "config.json", {"model_type": "gpt2"}),
        ("polite", "adapter_config.json", {"r": 16, "base_model_name_or_path": str(folder / "tiny")}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(json.dumps(settings))
    path = "tinker://polite/sampler_weights/adapter"
    await post(client, "/add_lora", model_id="a")
    loaded = await post(client, "/load_weights", model_id="a", path=path, optimizer=False)
    assert (await result(client, loaded))["path"] == path
    assert worker.loads[0].folder == "models/polite"
    info = await post(client, "/api/v1/weights_info", tinker_path=path)
    assert (info["base_model"], info["lora_rank"], info["is_lora"]) == ("tiny", 16, True)
    for name, wrong in (("narrow", {"rank": 8}), ("optimized", {})):
        await post(client, "/add_lora", model_id=name, **wrong)
        refused = await post(client, "/load_weights", model_id=name, path=path, optimizer=name == "optimized")
        answer = await client.post("/retrieve_future", json={"request_id": refused["request_id"]})
        assert answer.status_code == 400


@pytest.mark.parametrize("path", ["/sample", "/generate"])
async def test_texts_are_written_by_the_weights_as_they_are(
    client: httpx.AsyncClient, model_server: Scripted, worker: ScriptedWorker, path: str
) -> None:
    base = await post(client, path, base_model="tiny", prompts=["a", "b"], sampling_params={"max_tokens": 2})
    assert base["completions"] == ["<a> two", "<b> two"]
    assert base["generated_text"] == "<a> two"
    assert base["sequences"][0] == {"tokens": [1, 2], "logprobs": [-0.25, -0.25], "stop_reason": "length"}
    await post(client, "/fwdbwd", model_id="a", data=[SUM])
    for learns in (False, False, True):
        if learns:
            await post(client, "/optim_step", model_id="a")
        told = await post(client, path, model_id="a", messages=SUM[:1], sampling_params={"top_k": -1, "seed": 3})
        assert told["model_id"] == "a"
    folders = [asked.adapter for asked in model_server.asked[2:]]
    assert folders[0] is not None
    assert folders[0] == folders[1] != folders[2]  # saved once for each step
    assert [kind for _, _, kind in worker.done].count("save_weights_for_sampler") == 2
    assert model_server.asked[-1].params.top_k is None


NO_SAMPLES: list[tuple[dict[str, Any], str]] = [
    ({}, "one of prompts, prompt and messages"),
    ({"prompts": ["a"], "prompt": "b"}, "one of prompts, prompt and messages"),
    ({"prompts": ["a"], "sampling_params": {"beam": 3}}, "unknown sampling_params.beam"),
    ({"prompts": ["a"], "sampling_params": {"temperature": -1}}, "temperature"),
    ({"model_id": "nobody", "prompts": ["a"]}, "neither an adapter nor a model 'nobody'"),
]


async def test_samples_that_cannot_be_are_refused(client: httpx.AsyncClient) -> None:
    for body, told in NO_SAMPLES:
        answer = await client.post("/sample", json=body)
        assert answer.status_code == (404 if "nobody" in told else 400), told
        assert told in answer.json()["detail"]


NO_LESSONS: list[tuple[dict[str, Any], str]] = [
    ({"model_id": "a"}, "data is missing"),
    ({"data": [SUM]}, "model_id is missing"),
    ({"model_id": "a", "data": []}, "data should"),
    ({"model_id": "a", "data": [SUM], "loss_fn": "magic"}, "unknown loss function 'magic'; known: cross_entropy"),
    ({"model_id": "a", "data": [SUM], "loss_fn": "custom"}, "no loss functions of its clients"),
    ({"model_id": "a", "data": [SUM], "loss_fn": "ppo"}, "ppo needs loss_fn_inputs.target_tokens"),
    ({"model_id": "a", "data": [SUM], "loss_fn": "dpo"}, "data[0]: dpo learns from pairs"),
    ({"model_id": "a", "data": [SUM, SUM[:1]]}, "data[1]: there is no turn of the role `assistant`"),
    ({"model_id": "a", "data": [[{"role": "user"}]]}, "data[0]: turn 1 of `messages` must have"),
    ({"model_id": "a", "data": ["text"]}, "data[0]: `messages` must be a list"),
    ({"model_id": "a", "data": [{"messages": SUM, "tools": 5}]}, "data[0]: `tools` must be a list"),
    ({"model_id": "a", "data": [[*SUM[:1], {**SUM[1], "weight": "x"}]]}, "data[0]: turn 2 has the weight 'x'"),
    ({"model_id": "a", "data": [[SUM[0], {**SUM[1], "content": "x" * 50}]]}, "data[0]: a conversation has"),
    ({"model_id": "a", "data": [SUM], "loss_fn_inputs": {"magic": [[1]]}}, "unknown loss_fn_inputs.magic"),
    ({"model_id": "a", "data": [SUM], "loss_fn_inputs": {"weights": [[1]]}}, "loss_fn_inputs needs target_tokens"),
    ({"model_id": "a", "data": [SUM], "loss_fn_inputs": {"target_tokens": [[1], [2]]}}, "has 2 lists"),
    ({"model_id": "a", "data": [SUM], "loss_fn_inputs": {"target_tokens": [[1.5]]}}, "whole numbers"),
    ({"model_id": "a", "data": [SUM], "loss_fn_inputs": {"target_tokens": [[999]]}}, "has tokens that the model"),
    ({"model_id": "a", "data": [[*SUM, *SUM * 100]] * 41}, "8282 turns, and a request may have 8192"),
    ({"model_id": "a", "data": [SUM], "base_model": "gone"}, "no model 'gone' is served"),
    ({"model_id": "../a", "data": [SUM]}, "an adapter cannot be called '../a'"),
    ({"model_id": "a", "data": [SUM], "rank": 9999}, "rank must be from 1 to 512"),
]


async def test_what_cannot_be_learned_is_refused_at_once(client: httpx.AsyncClient) -> None:
    statuses = {"gone": 404, "8192": 413}
    for body, told in NO_LESSONS:
        answer = await client.post("/fwdbwd", json=body)
        expected = next((status for word, status in statuses.items() if word in told), 400)
        assert (answer.status_code, told in answer.text.replace("\\", "")) == (expected, True), answer.text
    assert (await client.get("/adapters")).json() == {"adapters": []}  # and nothing was made


async def test_preferences_are_pairs(client: httpx.AsyncClient, services: Services, worker: Any) -> None:
    worse = [SUM[0], {"role": "assistant", "content": "5!"}]
    whole = {"chosen": SUM, "rejected": worse}
    parts = {"prompt": SUM[:1], "chosen": SUM[1:], "rejected": worse[1:]}
    promised = await post(
        client, "/fwdbwd", model_id="p", data=[whole, parts], loss_fn="dpo", loss_fn_config={"beta": 0.2}
    )
    request = body_of(worker, services, promised["request_id"])
    assert dict(request.loss_settings) == {"beta": 0.2}
    first, second = request.data
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.inputs["segment_ids"].tolist() == second.inputs["segment_ids"].tolist()
    assert first.inputs["weights"].sum() == 3 - 4


async def test_what_failed_is_an_error(client: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    await post(client, "/add_lora", model_id="a")
    failed = await post(client, "/load_weights", model_id="a", path="tinker://nobody:train:0/weights/x")
    answer = await client.post("/retrieve_future", json={"request_id": failed["request_id"]})
    assert (answer.status_code, "no weights" in answer.json()["detail"]) == (400, True)
    for body, status in (({"request_id": "nothing"}, 404), ({}, 400)):
        assert (await client.post("/retrieve_future", json=body)).status_code == status
    assert (await client.post("/optim_step", json={"model_id": "nobody"})).status_code == 404
    assert (await client.post("/add_lora", json={"alpha": 5})).status_code == 400


async def test_what_takes_long_is_pending(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_training, "POLL_S", 0.01)
    promised = await post(client, "/fwdbwd", model_id="a", data=[SUM])
    answer = await client.post("/retrieve_future", json={"request_id": promised["request_id"]})
    assert (answer.status_code, answer.json()["status"]) == (202, "pending")


async def test_adapters_are_their_owner_s_and_stay(services: Services, worker: Any) -> None:
    ann, eve = (make_key(services, name, owner=name) for name in ("ann", "eve"))
    app = create_app(services)
    async with client_of(app, ann) as hers, client_of(app, eve) as others:
        promised = await post(hers, "/fwdbwd", model_id="a", data=[SUM])
        for path, body in (("/optim_step", {"model_id": "a"}), ("/retrieve_future", promised)):
            assert (await others.post(path, json=body)).status_code == 404
        assert (await others.get("/adapters")).json() == {"adapters": []}
        await post(others, "/fwdbwd", model_id="a", data=[SUM])
        cleanup = SessionCleanup(services.post_training, services.database, services.writer, services.settings.home)
        services.post_training.sessions._started -= 30 * 86400
        await cleanup.tidy()
        assert [each["model_id"] for each in (await hers.get("/adapters")).json()["adapters"]] == ["a"]


async def test_an_adapter_becomes_a_model(client: httpx.AsyncClient, services: Services, worker: Any) -> None:
    await post(client, "/fwdbwd", model_id="a", data=[SUM])
    merged = await result(client, await post(client, "/merge_lora", model_id="a", name="whole"))
    assert merged == {"model": "whole", "model_id": "a"}
    folder = services.settings.models / "taken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name, status in (("taken", 409), ("../out", 400)):
        assert (await client.post("/merge_lora", json={"model_id": "a", "name": name})).status_code == status
    assert (await client.post("/merge_lora", json={"model_id": "b", "name": "x"})).status_code == 404


async def test_each_route_has_its_scope(services: Services, worker: Any) -> None:
    keys = {scope: make_key(services, scope, scopes=[scope]) for scope in ("inference", "training")}
    app = create_app(services)
    async with client_of(app, keys["inference"]) as reader:
        assert (await reader.post("/fwdbwd", json={"model_id": "a", "data": [SUM]})).status_code == 403
        assert (await reader.get("/adapters")).status_code == 403
        assert (await reader.post("/sample", json={"prompts": ["a"]})).status_code == 200
    async with client_of(app, keys["training"]) as trainer:
        await post(trainer, "/add_lora", model_id="a")
        assert (await trainer.post("/merge_lora", json={"model_id": "a", "name": "x"})).status_code == 403
    async with client_of(app) as nobody:
        assert (await nobody.post("/retrieve_future", json={"request_id": "x"})).status_code == 401
        assert (await nobody.get("/healthz")).status_code == 200


async def test_what_there_is_can_be_asked(client: httpx.AsyncClient) -> None:
    losses = (await client.get("/loss_functions")).json()
    assert {"cross_entropy", "importance_sampling", "ppo", "dpo"} <= set(losses["available_loss_functions"])
    assert losses["descriptions"].keys() == set(losses["available_loss_functions"])
    [model] = (await client.get("/get_server_capabilities")).json()["supported_models"]
    assert model == {"model_id": "tiny", "model_name": "tiny", "arch": "gpt2"}
    assert (await client.get("/healthz")).json() == {"status": "ok"}
