"""Tinker's own client against `smelt serve` with a tiny model: it learns, and what is sampled is what was trained."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tinker
import torch
from tinker import types
from tinker.lib.api_future_impl import _APIFuture
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType
from tinker.lib.public_interfaces.training_client import fetch_training_info

from families import random_state
from leftovers import collected
from serving import CONFIG, Server, serving, write_tiny_model
from smelt.models.weights import write_model

pytestmark = [
    pytest.mark.timeout(180),
    # Its client keeps sessions of its own open until the process ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXTS = ["To be, or not to be", "All the world's a stage", "If music be the food of love"]
ADAM = types.AdamParams(learning_rate=3e-2)


def write_base(folder: Path) -> Path:
    """A model whose unembedding is large enough that what lies before it can say something."""
    write_tiny_model(folder)
    state = random_state(CONFIG)
    state["embedding.weight"] *= 5
    state["norm.weight"] += 1
    write_model(CONFIG, state, folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tinker-live")
    with collected(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        patch.setenv("SMELT_DTYPE", "float32")
        with serving(folder / "home", str(write_base(folder / "tiny"))) as started:
            yield started


@pytest.fixture(scope="module")
def service(server: Server) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-test") as client:
        yield client


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A model that has learnt something, so that its adapter is not zero."""
    training = service.create_lora_training_client("tiny", rank=8, seed=1).result(timeout=60)
    learn(training, num_steps=3)
    return training


def supervised(text: str) -> types.Datum:
    """Each byte is to be followed by the next."""
    tokens = list(text.encode())
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch(torch.tensor(tokens[1:])),
            "weights": types.TensorData.from_torch(torch.ones(len(tokens) - 1)),
        },
    )


def learn(training: tinker.TrainingClient, num_steps: int, adam: types.AdamParams = ADAM) -> list[float]:
    """The loss before each step."""
    losses = []
    for _ in range(num_steps):
        forward = training.forward_backward([supervised(text) for text in TEXTS], "cross_entropy")
        step = training.optim_step(adam)
        losses.append(forward.result(timeout=60).metrics["loss:sum"])
        step.result(timeout=60)
    return losses


def trainers_logprobs(training: tinker.TrainingClient, text: str) -> torch.Tensor:
    output = training.forward([supervised(text)], "cross_entropy").result(timeout=60)
    return output.loss_fn_outputs[0]["logprobs"].to_torch()


def samplers_logprobs(sampler: tinker.SamplingClient, text: str) -> torch.Tensor:
    first, *others = sampler.compute_logprobs(types.ModelInput.from_ints(list(text.encode()))).result(timeout=60)
    assert first is None
    return torch.tensor(others)


def test_a_model_in_training_says_what_it_is(training: tinker.TrainingClient) -> None:
    info = training.get_info()
    assert (info.model_data.model_name, info.is_lora, info.lora_rank) == ("tiny", True, 8)


def test_a_supervised_loop_learns(service: tinker.ServiceClient) -> None:
    training = service.create_lora_training_client("tiny", rank=16, seed=2).result(timeout=60)
    losses = learn(training, num_steps=40)
    assert losses[-1] < 0.75 * losses[0]


def test_a_step_on_rewards_makes_what_was_good_more_likely(training: tinker.TrainingClient) -> None:
    text = TEXTS[0]
    before = trainers_logprobs(training, text)
    datum = supervised(text)
    inputs = {
        "target_tokens": datum.loss_fn_inputs["target_tokens"],
        "logprobs": types.TensorData.from_torch(before),
        "advantages": types.TensorData.from_torch(torch.ones(len(before))),
    }
    rewarded = types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)
    output = training.forward_backward([rewarded], "importance_sampling").result(timeout=60)
    torch.testing.assert_close(output.metrics["loss:sum"], -float(len(before)), rtol=1e-4, atol=1e-4)
    step = training.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=60)
    assert step.metrics is not None
    assert step.metrics["grad_norm"] > 0
    assert trainers_logprobs(training, text).sum() > before.sum()


def whole_model(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """Of a `create_model` without lora_config, for which the client has no method."""
    holder = service.holder
    session_id, number = holder.get_session_id(), holder.get_training_client_id()

    async def create() -> tinker.TrainingClient:
        request = types.CreateModelRequest(session_id=session_id, model_seq_id=number, base_model="tiny")
        with holder.aclient(ClientConnectionPoolType.TRAIN) as client:
            promised = await client.models.create(request=request)
        started = time.time()
        future = _APIFuture(types.CreateModelResponse, holder, promised, started, request_type="CreateModel")
        made = await future.result_async()
        info = await fetch_training_info(holder, made.model_id)
        return tinker.TrainingClient(holder, model_seq_id=number, model_id=made.model_id, info=info)

    return holder.run_coroutine_threadsafe(create()).result(timeout=60)


@pytest.mark.slow
def test_all_weights_can_be_trained_sampled_and_loaded(service: tinker.ServiceClient) -> None:
    gentle = types.AdamParams(learning_rate=3e-3)
    training = whole_model(service)
    assert (training.get_info().is_lora, training.get_info().lora_rank) == (False, None)
    losses = learn(training, num_steps=20, adam=gentle)
    assert losses[-1] < 0.75 * losses[0]
    sampler = training.save_weights_and_get_sampling_client().result()
    learned = trainers_logprobs(training, TEXTS[0])
    torch.testing.assert_close(samplers_logprobs(sampler, TEXTS[0]), learned, atol=1e-4, rtol=0)
    path = training.save_state("whole").result(timeout=60).path
    losses = learn(training, num_steps=2, adam=gentle)
    again = service.create_training_client_from_state_with_optimizer(path).result(timeout=60)
    assert learn(again, num_steps=2, adam=gentle) == losses
    assert again.get_info().is_lora is False
    named = training.save_weights_for_sampler("kept").result(timeout=60).path
    plain = service.create_sampling_client(model_path=named)
    torch.testing.assert_close(
        samplers_logprobs(plain, TEXTS[1]), trainers_logprobs(training, TEXTS[1]), atol=1e-4, rtol=0
    )


def test_the_sampler_is_the_trainer(training: tinker.TrainingClient, service: tinker.ServiceClient) -> None:
    sampler = training.save_weights_and_get_sampling_client().result()
    named = training.save_weights_for_sampler("kept").result(timeout=60).path
    base = service.create_sampling_client(base_model="tiny")
    for text in TEXTS:
        trained = trainers_logprobs(training, text)
        assert (trained - samplers_logprobs(sampler, text)).abs().max() < 1e-4
        assert (trained - samplers_logprobs(base, text)).abs().max() > 1e-2
    again = service.create_sampling_client(model_path=named)
    assert torch.equal(samplers_logprobs(again, TEXTS[0]), samplers_logprobs(sampler, TEXTS[0]))


def test_what_is_drawn_has_the_trainers_logprobs(training: tinker.TrainingClient) -> None:
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(list(b"To be"))
    params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=3)
    drawn = sampler.sample(prompt, num_samples=4, sampling_params=params).result(timeout=60).sequences
    assert len({tuple(sequence.tokens) for sequence in drawn}) > 1
    for sequence in drawn:
        tokens = [*b"To be", *sequence.tokens]
        inputs = {"target_tokens": torch.tensor(tokens[1:]), "weights": torch.ones(len(tokens) - 1)}
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={name: types.TensorData.from_torch(value) for name, value in inputs.items()},
        )
        output = training.forward([datum], "cross_entropy").result(timeout=60).loss_fn_outputs[0]
        assert sequence.logprobs is not None
        trained = output["logprobs"].to_torch()[len(b"To be") - 1 :]
        assert (trained - torch.tensor(sequence.logprobs)).abs().max() < 1e-4


def test_a_sampler_stays_as_it_was(training: tinker.TrainingClient) -> None:
    sampler = training.save_weights_and_get_sampling_client().result()
    before = samplers_logprobs(sampler, TEXTS[1])
    learn(training, num_steps=2)
    assert torch.equal(samplers_logprobs(sampler, TEXTS[1]), before)


def test_training_goes_on_from_a_checkpoint(training: tinker.TrainingClient, service: tinker.ServiceClient) -> None:
    path = training.save_state("state").result(timeout=60).path
    at_checkpoint = trainers_logprobs(training, TEXTS[0])
    losses = learn(training, num_steps=2)
    training.load_state_with_optimizer(path).result(timeout=60)
    assert torch.equal(trainers_logprobs(training, TEXTS[0]), at_checkpoint)
    other = service.create_training_client_from_state_with_optimizer(path)
    assert learn(other, num_steps=2) == losses
    training.load_state(path).result(timeout=60)
    assert torch.equal(trainers_logprobs(training, TEXTS[0]), at_checkpoint)


def test_what_is_wrong_is_said_and_the_session_goes_on(training: tinker.TrainingClient) -> None:
    beyond = supervised(TEXTS[0])
    beyond.loss_fn_inputs["target_tokens"] = types.TensorData.from_torch(torch.full((len(TEXTS[0]) - 1,), 5000))
    with pytest.raises(tinker.RequestFailedError, match="target_tokens has tokens that the model does not"):
        training.forward_backward([beyond], "cross_entropy").result(timeout=60)
    with pytest.raises(tinker.RequestFailedError, match="dropped"):
        training.optim_step(ADAM).result(timeout=60)
    learn(training, num_steps=1)


@pytest.mark.parametrize("role", ["worker", "api"])
def test_a_session_survives_the_death_of_a_process(role: str, server: Server, service: tinker.ServiceClient) -> None:
    alone = service.create_lora_training_client("tiny", rank=4, seed=5).result(timeout=60)
    losses = learn(alone, num_steps=10)
    training = service.create_lora_training_client("tiny", rank=4, seed=5).result(timeout=60)
    assert learn(training, num_steps=2) == losses[:2]
    data = [supervised(text) for text in TEXTS]
    under_way = [(training.forward_backward(data, "cross_entropy"), training.optim_step(ADAM)) for _ in range(6)]
    assert under_way[0][0].result(timeout=60).metrics["loss:sum"] == losses[2]
    os.kill(server.pid_of(role), signal.SIGKILL)
    assert [forward.result(timeout=60).metrics["loss:sum"] for forward, _ in under_way] == losses[2:8]
    assert learn(training, num_steps=2) == losses[8:]


def test_openais_client_finds_what_was_saved(
    server: Server, training: tinker.TrainingClient, service: tinker.ServiceClient
) -> None:
    path = training.save_weights_for_sampler("for-others").result(timeout=60).path
    greedy = types.SamplingParams(max_tokens=8, temperature=0.0)
    prompt = types.ModelInput.from_ints(list(b"To be"))
    drawn = service.create_sampling_client(model_path=path).sample(prompt, 1, greedy).result(timeout=60).sequences[0]
    with openai.OpenAI(base_url=f"{server.url}/oai/api/v1", api_key="none", max_retries=2) as client:
        answer = client.completions.create(model=path, prompt="To be", max_tokens=8, temperature=0)
    assert answer.choices[0].text == bytes(drawn.tokens).decode(errors="replace")


@pytest.mark.parametrize("name", ["tinker_supervised", "tinker_rl"])
def test_the_examples_run(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name, server.url])
    example: dict[str, Any] = {"__name__": name}
    exec((EXAMPLES / f"{name}.py").read_text(), example)
    example["NUM_STEPS"] = 2
    example["main"]()
    written = capsys.readouterr().out
    assert "step 1: " in written
    assert "tinker://" in written
