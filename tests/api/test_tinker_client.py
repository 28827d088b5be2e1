"""Tinker's own client against a server on a socket: every public method of its four clients, without a model."""

import pickle
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import tinker
import torch
from starlette.requests import Request
from tinker import types

from scripted import CONTEXT
from scripted_training import FILES, LOGPROB, TOKEN, ScriptedWorker, training_server
from smelt.api import tinker as tinker_routes
from smelt.api.services import Services
from smelt.api.tinker import config_for
from smelt.errors import InvalidInput
from smelt.storage.futures import Granted

pytestmark = [
    pytest.mark.timeout(120),
    # Its client keeps sessions of its own open until the process ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:RestClient.search_sessions"),
]

PROMPT = types.ModelInput.from_ints([1, 2, 3])
ADAM = types.AdamParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ScriptedWorker, Services]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        with training_server(tmp_path_factory.mktemp("tinker") / "home") as started:
            yield started


@pytest.fixture(scope="module")
def worker(server: tuple[str, ScriptedWorker, Services]) -> ScriptedWorker:
    return server[1]


@pytest.fixture(scope="module")
def service(server: tuple[str, ScriptedWorker, Services]) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(
        base_url=server[0], api_key="tml-test", user_metadata={"team": "a"}, display_name="Nightly demo"
    )
    yield client
    client.close("success", "done").result()


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", rank=8, seed=7, user_metadata={"renderer": "plain"}).result()


@pytest.fixture(scope="module")
def rest(service: tinker.ServiceClient) -> Any:
    return service.create_rest_client()


def datum(num: int = 3, **inputs: Any) -> types.Datum:
    given = {"target_tokens": torch.arange(num), "weights": torch.ones(num)} | inputs
    tensors = {name: types.TensorData.from_torch(value) for name, value in given.items()}
    return types.Datum(model_input=types.ModelInput.from_ints(list(range(num))), loss_fn_inputs=tensors)


def lane_of(worker: ScriptedWorker, model_id: str) -> list[tuple[int | None, str]]:
    return [(seq, kind) for lane, seq, kind in worker.done if lane == model_id]


def test_what_a_server_can_do(service: tinker.ServiceClient) -> None:
    models = {each.model_name: each for each in service.get_server_capabilities().supported_models}
    assert models["tiny"].max_context_length == CONTEXT
    assert models["tiny"].trainable
    assert models["tiny"].sampleable
    assert "default" in models


def test_a_model_says_what_it_is(training: tinker.TrainingClient, server: tuple[str, ScriptedWorker, Services]) -> None:
    info = training.get_info()
    assert info.model_id.endswith(":train:0")
    assert (info.is_lora, info.lora_rank, info.model_data.model_name, info.model_data.arch) == (True, 8, "tiny", "gpt2")
    assert info.model_data.tokenizer_id == server[2].default_model


def test_a_step_of_training(training: tinker.TrainingClient, worker: ScriptedWorker) -> None:
    forward, step = training.forward_backward([datum(), datum(2)], "cross_entropy"), training.optim_step(ADAM)
    output = forward.result()
    assert [each["logprobs"].to_torch().tolist() for each in output.loss_fn_outputs] == [[LOGPROB] * 3, [LOGPROB] * 2]
    assert output.metrics == {"loss:sum": 2.5}
    assert step.result().metrics == {"grad_norm": 1.0, "lr": 1e-3}
    assert worker.steps[-1].beta2 == 0.95
    only_forward = training.forward([datum(2)], "cross_entropy").result()
    assert len(only_forward.loss_fn_outputs) == 1


def test_packed_chunks_that_come_out_of_order_are_done_in_order(
    server: tuple[str, ScriptedWorker, Services], worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_pieces(request: Request, max_body_bytes: int) -> dict[str, Any]:
        small = {"parallel_fwdbwd_chunks": True, "fwdbwd_max_chunk_len": 2, "proto_compress_fwdbwd": True}
        return config_for(request, max_body_bytes) | small

    monkeypatch.setattr(tinker_routes, "config_for", in_pieces)
    with tinker.ServiceClient(base_url=server[0], api_key="tml-test") as client:
        training = client.create_lora_training_client("tiny", rank=4).result()
        forward, step = training.forward_backward([datum()] * 7, "cross_entropy"), training.optim_step(ADAM)
        assert len(forward.result().loss_fn_outputs) == 7
        assert forward.result().metrics["loss:sum"] == 7 * 1.5
        assert step.result().metrics
        kinds = [(seq, "forward_backward") for seq in range(1, 5)]
        lane = lane_of(worker, training.get_info().model_id)
        assert lane == [(0, "create_model"), *kinds, (5, "optim_step")]


def test_a_loss_of_the_clients_own(training: tinker.TrainingClient) -> None:
    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.stack([each.sum() for each in logprobs]).sum(), {"mine": 1.0}

    output = training.forward_backward_custom([datum()], loss).result()
    assert output.metrics["mine"] == 1.0
    training.optim_step(ADAM).result()


@pytest.mark.parametrize(
    ("loss", "config", "told"),
    [
        ("stable_reinforce", None, "use importance_sampling"),
        ("custom", {"loss_id": "x"}, "use forward_backward_custom"),
    ],
)
def test_a_loss_that_we_lack_is_a_failed_future(
    training: tinker.TrainingClient, loss: Any, config: Any, told: str
) -> None:
    with pytest.raises(tinker.RequestFailedError, match=told) as failure:
        training.forward_backward([datum()], loss, config).result()
    assert failure.value.category.value == "user"


def test_data_that_no_model_takes_are_failed_futures_and_the_lane_goes_on(training: tinker.TrainingClient) -> None:
    image = types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png")])
    wrong = [
        (datum(CONTEXT + 1), "context window"),
        (datum(3, target_tokens=torch.tensor([1, 2, 9999])), "tokens that the model does not"),
        (types.Datum(model_input=image, loss_fn_inputs={}), "only text is supported"),
    ]
    for bad, told in wrong:
        with pytest.raises(tinker.RequestFailedError, match=told):
            training.forward_backward([bad], "cross_entropy").result()
    assert training.forward_backward([datum()], "cross_entropy").result().metrics
    with pytest.raises(tinker.RequestFailedError, match="dimuon"):
        training.optim_step(types.DimuonParams(learning_rate=0.1)).result()
    assert training.optim_step(ADAM).result().metrics


def test_a_workers_refusal_is_the_users_to_hear(training: tinker.TrainingClient, worker: ScriptedWorker) -> None:
    def refuse(row: Granted) -> None:
        if row.kind == "forward_backward":
            raise InvalidInput("no such loss")

    worker.before = refuse
    try:
        with pytest.raises(tinker.RequestFailedError, match="no such loss"):
            training.forward_backward([datum()], "cross_entropy").result()
    finally:
        worker.before = lambda _row: None


def test_weights_are_saved_loaded_and_gone_on_from(
    service: tinker.ServiceClient, training: tinker.TrainingClient, worker: ScriptedWorker
) -> None:
    saved = training.save_state("ck1", ttl_seconds=7200).result()
    assert saved.path == f"tinker://{training.get_info().model_id}/weights/ck1"
    assert training.load_state(saved.path).result().path == saved.path
    assert worker.loads[-1].with_optimizer is False
    training.load_state_with_optimizer(saved.path).result()
    assert worker.loads[-1].with_optimizer is True
    for resume, with_optimizer in (
        (service.create_training_client_from_state, False),
        (service.create_training_client_from_state_with_optimizer, True),
    ):
        resumed = resume(saved.path, user_metadata={"from": "ck1"}).result()
        assert worker.loads[-1].with_optimizer is with_optimizer
        assert resumed.get_info().lora_rank == 8
        assert resumed.forward_backward([datum()], "cross_entropy").result().metrics
        assert lane_of(worker, resumed.get_info().model_id) == [(0, "load_weights"), (1, "forward_backward")]
    with pytest.raises(tinker.RequestFailedError, match="no weights"):
        training.load_state("tinker://nobody/weights/none").result()
    with pytest.raises(tinker.NotFoundError):
        service.create_training_client_from_state("tinker://nobody/weights/none").result()


def test_a_name_is_taken_once_unless_it_is_to_be_overwritten(training: tinker.TrainingClient) -> None:
    assert training.save_state("twice").result().path
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        training.save_state("twice").result()
    assert training.save_state("twice", overwrite=True).result().path
    for wrong in ("a/b", "../up", ""):
        with pytest.raises(tinker.RequestFailedError, match="cannot be called"):
            training.save_state(wrong).result()
    with pytest.raises(tinker.RequestFailedError, match="ttl_seconds"):
        training.save_state("short", ttl_seconds=5).result()


def test_what_is_sampled(training: tinker.TrainingClient, worker: ScriptedWorker) -> None:
    sampler = training.save_weights_and_get_sampling_client()
    sampler = getattr(sampler, "result", lambda: sampler)()
    params = types.SamplingParams(max_tokens=4, seed=3, stop=["\n"], temperature=0.7, top_k=5, top_p=0.9)
    response = sampler.sample(
        PROMPT, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=1
    ).result()
    assert [each.tokens for each in response.sequences] == [[TOKEN] * 4] * 2
    assert response.sequences[0].logprobs == [LOGPROB] * 4
    assert response.prompt_logprobs == [None, LOGPROB, LOGPROB]
    assert response.topk_prompt_logprobs[1][0] == (TOKEN, LOGPROB)
    assert len({each.sequence_id for each in response.sequences}) == 2
    asked = worker.samples[-1]
    assert (asked.prompt_ids, asked.num_samples, asked.sampler.base_model) == ((1, 2, 3), 2, "tiny")
    assert (asked.params.seed, asked.params.stop, asked.params.top_k, asked.params.num_logprobs) == (3, ("\n",), 5, 1)
    assert (asked.sampler.lane, asked.sampler.folder is not None) == (training.get_info().model_id, True)
    assert sampler.compute_logprobs(PROMPT).result() == [None, LOGPROB, LOGPROB]
    assert worker.samples[-1].params.max_tokens == 1


def test_seeds_are_drawn_and_stops_understood(service: tinker.ServiceClient, worker: ScriptedWorker) -> None:
    sampler = service.create_sampling_client(base_model="tiny")
    sampler = getattr(sampler, "result", lambda: sampler)()
    seeds = []
    for stop, ids, ignores in ((None, set(), False), ([], set(), True), ([5, 6], {5, 6}, False), ("x", set(), False)):
        sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=1, stop=stop)).result()
        asked = worker.samples[-1].params
        assert (asked.stop_token_ids, asked.ignore_eos) == (ids, ignores)
        seeds.append(asked.seed)
    assert len(set(seeds)) == 4
    assert None not in seeds
    sampler.sample(PROMPT, 1, types.SamplingParams()).result()
    assert worker.samples[-1].params.max_tokens == CONTEXT - 3
    with pytest.raises(tinker.BadRequestError, match="Prompt length plus max_tokens"):
        sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=CONTEXT)).result()
    with pytest.raises(tinker.BadRequestError, match="tokens that the model does not"):
        sampler.sample(types.ModelInput.from_ints([9999]), 1, types.SamplingParams(max_tokens=1)).result()


def test_targets_alternatives_and_the_last_tokens(service: tinker.ServiceClient, worker: ScriptedWorker) -> None:
    sampler = service.create_sampling_client(base_model="tiny")
    sampler = getattr(sampler, "result", lambda: sampler)()
    params = types.SamplingParams(max_tokens=1)
    targets = types.TensorData.from_torch(torch.tensor([[4, -1], [5, 6]]))
    scored = sampler.sample(PROMPT, 1, params, target_prompt_logprobs=targets).result()
    assert scored.target_prompt_logprobs.to_torch().tolist() == [[LOGPROB, 0.0], [LOGPROB, LOGPROB]]
    drawn = sampler.sample(PROMPT, 1, params, prompt_alt_tokens_k=3).result()
    assert drawn.prompt_alt_tokens.tokens.to_torch().shape == (2, 3)
    last = sampler.sample(PROMPT, 1, params, include_prompt_logprobs=True, prompt_logprobs_last_n=1).result()
    assert last.prompt_logprobs == [None, None, LOGPROB]
    sparse = types.TensorData(
        data=[9], dtype="int64", shape=[2, 3], sparse_crow_indices=[0, 0, 1], sparse_col_indices=[2]
    )
    sampler.sample(PROMPT, 1, params, target_prompt_logprobs=sparse).result()
    assert worker.samples[-1].target_ids == (-1, -1, -1, -1, -1, 9)


def test_samplers_by_path_by_handle_and_by_pickle(
    service: tinker.ServiceClient, training: tinker.TrainingClient, rest: Any, worker: ScriptedWorker
) -> None:
    path = training.save_weights_for_sampler("s1", ttl_seconds=None).result().path
    assert path.endswith("/sampler_weights/s1")
    by_path = training.create_sampling_client(path)
    by_path = getattr(by_path, "result", lambda: by_path)()
    assert by_path.get_base_model() == "tiny"
    by_path.sample(PROMPT, 1, types.SamplingParams(max_tokens=1)).result()
    assert worker.samples[-1].sampler.folder.endswith("sampler_weights/s1")
    for copy in (
        pickle.loads(pickle.dumps(by_path)),
        tinker.SamplingClient.from_sampler_handle(by_path.get_sampler_handle(), api_key="tml-test"),
    ):
        copy.sample(PROMPT, 1, types.SamplingParams(max_tokens=1)).result()
        assert worker.samples[-1].sampler.folder.endswith("sampler_weights/s1")
    shown = rest.get_sampler(by_path._sampling_session_id).result()
    assert (shown.base_model, shown.model_path) == ("tiny", path)


def test_weights_for_others_are_fetched_without_a_key(training: tinker.TrainingClient, rest: Any) -> None:
    path = training.save_weights_external("out").result().path
    found = rest.get_external_weights_urls(path).result()
    assert sorted(found.urls) == sorted(FILES)
    assert found.expires.timestamp() > time.time()
    for name, url in found.urls.items():
        with urllib.request.urlopen(url) as answer:
            assert answer.read().decode().startswith(name)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(found.urls[FILES[0]].replace(FILES[0], FILES[1]))
    with pytest.raises(tinker.RequestFailedError, match="encrypted"):
        training.save_weights_external("age", age_encryption_recipients=["age1x"]).result()


def test_runs_and_checkpoints(training: tinker.TrainingClient, rest: Any) -> None:
    model_id = training.get_info().model_id
    for name in ("r1", "r2"):
        training.save_state(name, user_metadata={"step": name}).result()
    training.save_weights_for_sampler("r3").result()
    run = rest.get_training_run(model_id).result()
    assert (run.base_model, run.lora_rank, run.user_metadata) == ("tiny", 8, {"renderer": "plain"})
    assert (run.last_checkpoint.checkpoint_id, run.last_checkpoint.user_metadata) == ("weights/r2", {"step": "r2"})
    assert run.last_sampler_checkpoint.checkpoint_id == "sampler_weights/r3"
    assert run.last_checkpoint.size_bytes > 0
    assert rest.get_training_run_by_tinker_path(run.last_checkpoint.tinker_path).result() == run
    listed = rest.list_training_runs(limit=1).result()
    assert (len(listed.training_runs), listed.cursor.limit) == (1, 1)
    assert listed.cursor.total_count >= 1
    later = rest.list_training_runs(limit=5, offset=listed.cursor.total_count).result()
    assert later.training_runs == []
    ids = [each.checkpoint_id for each in rest.list_checkpoints(model_id).result().checkpoints]
    assert ids[:3] == ["sampler_weights/r3", "weights/r2", "weights/r1"]
    page = rest.list_user_checkpoints(limit=2).result()
    assert [each.checkpoint_id for each in page.checkpoints] == ids[:2]


def test_checkpoints_are_published_kept_copied_and_removed(training: tinker.TrainingClient, rest: Any) -> None:
    path = training.save_state("mine").result().path
    model_id = training.get_info().model_id

    def shown() -> Any:
        found = rest.list_checkpoints(model_id).result().checkpoints
        return next((each for each in found if each.tinker_path == path), None)

    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    assert shown().public
    assert 7100 < shown().expires_at.timestamp() - time.time() < 7300
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert (shown().public, shown().expires_at) == (False, None)
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == ("tiny", 8, True)
    copied = rest.copy_weights(path, "archive").result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert shown() is None
    with pytest.raises(tinker.NotFoundError):
        rest.get_weights_info_by_tinker_path(path).result()
    assert rest.get_weights_info_by_tinker_path(copied).result().lora_rank == 8
    run_id, checkpoint_id = copied.removeprefix("tinker://").split("/", 1)
    assert rest.list_checkpoints(run_id).result().checkpoints[0].size_bytes > 0, "the copy keeps the files"
    rest.delete_checkpoint(run_id, checkpoint_id).result()
    assert rest.list_checkpoints(run_id).result().checkpoints == []


def test_sessions_are_listed_searched_and_traced(
    service: tinker.ServiceClient, training: tinker.TrainingClient, rest: Any
) -> None:
    session_id = training.get_info().model_id.partition(":")[0]
    assert session_id in rest.list_sessions().result().sessions
    shown = rest.get_session(session_id).result()
    assert training.get_info().model_id in shown.training_run_ids
    assert (shown.user_metadata, shown.display_name) == ({"team": "a"}, "Nightly demo")
    rest.assign_session_project(session_id, "p1").result()
    for query, is_found in (
        ({"display_name": "DEMO nightly"}, True),
        ({"display_name": "weekly"}, False),
        ({"session_id": session_id}, True),
        ({"user_metadata": {"team": "b"}}, False),
        ({"project_ids": ["p1"]}, True),
        ({"statuses": [types.ActiveSessionStatusQuery()]}, True),
        ({"statuses": [types.ClientFinishedSessionStatusQuery()]}, False),
    ):
        page = rest.search_sessions(types.SessionSearchRequest(**query)).result()
        assert (session_id in [each.session_id for each in page.sessions]) is is_found, query
    [summary] = rest.search_sessions(types.SessionSearchRequest(session_id=session_id)).result().sessions
    assert (summary.project_id, summary.status.type) == ("p1", "active")
    first = rest.search_sessions(types.SessionSearchRequest(limit=1)).result()
    if first.next_cursor is not None:
        second = rest.search_sessions(types.SessionSearchRequest(limit=1, cursor=first.next_cursor)).result()
        assert second.sessions[0].session_id != first.sessions[0].session_id
    with urllib.request.urlopen(rest.export_session_trace(session_id).result()) as answer:
        assert b"create_model" in answer.read()


def test_what_an_account_is_asked(rest: Any, training: tinker.TrainingClient) -> None:
    training.save_state("stored").result()
    [item] = rest.get_current_checkpoint_storage_usage().result().data
    assert item.checkpoint_count >= 1
    assert item.size_bytes > 0
    with pytest.raises(tinker.NotFoundError, match="no audit log"):
        rest.get_audit_log().result()
    with pytest.raises(RuntimeError):
        rest.whoami().result()


def test_finished_sessions_say_so(server: tuple[str, ScriptedWorker, Services], rest: Any) -> None:
    with tinker.ServiceClient(base_url=server[0], api_key="tml-test") as client:
        model = client.create_lora_training_client("tiny", rank=4).result()
    session_id = model._guaranteed_model_id().split(":")[0]
    query = types.SessionSearchRequest(
        session_id=session_id, statuses=[types.ClientFinishedSessionStatusQuery(reasons=["success"])]
    )
    assert [each.session_id for each in rest.search_sessions(query).result().sessions] == [session_id]


def test_a_model_that_is_not_served_is_told_at_once(service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.NotFoundError, match="no model 'other' is served"):
        service.create_lora_training_client("other").result()
    with pytest.raises(tinker.BadRequestError, match="rank"):
        service.create_lora_training_client("tiny", rank=100_000).result()


@pytest.mark.anyio
async def test_the_asynchronous_methods(service: tinker.ServiceClient) -> None:
    training = await service.create_lora_training_client_async("tiny", rank=2)
    forward = await training.forward_backward_async([datum()], "cross_entropy")
    step = await training.optim_step_async(ADAM)
    assert (await forward).metrics
    assert (await step).metrics
    sampler = await training.save_weights_and_get_sampling_client_async()
    response = await sampler.sample_async(PROMPT, 1, types.SamplingParams(max_tokens=2))
    assert response.sequences[0].tokens == [TOKEN] * 2
    assert (await sampler.compute_logprobs_async(PROMPT))[1] == LOGPROB


def test_many_samples_at_once(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="tiny")
    sampler = getattr(sampler, "result", lambda: sampler)()
    futures = [sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=1)) for _ in range(64)]
    assert all(future.result().sequences[0].tokens == [TOKEN] for future in futures)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
