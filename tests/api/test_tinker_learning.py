"""Tinker's own client on `smelt serve` until something is learnt: by heart, by reward, and by preference."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tinker
import torch
from tinker import types
from torch import Tensor

from families import random_state
from leftovers import collected
from serving import serving, write_tiny_model
from smelt.configs import DecoderConfig
from smelt.models.weights import write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # Its client keeps sessions of its own open until the process ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

GROUP_SIZE = 16


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinker.ServiceClient]:
    """Of a random model whose unembedding is large enough that what lies before it can say something."""
    folder = tmp_path_factory.mktemp("learning")
    config = DecoderConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=64)
    state = random_state(config)
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            tensor += 1
    write_tiny_model(folder / "tiny")
    write_model(config, state, folder / "tiny")
    with collected(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        patch.setenv("SMELT_DTYPE", "float32")
        with (
            serving(folder / "home", str(folder / "tiny")) as server,
            tinker.ServiceClient(base_url=server.url, api_key="tml-test") as client,
        ):
            yield client


def datum_of(prompt: bytes, answer: bytes | Sequence[int], **of_answer: Sequence[float]) -> types.Datum:
    """An answer's tokens, and what is said of each of them; 0 is said of the prompt's."""
    ids = [*prompt, *answer]
    inputs = {"target_tokens": torch.tensor(ids[1:])}
    for name, values in of_answer.items():
        inputs[name] = torch.tensor([0.0] * (len(prompt) - 1) + list(values))
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={name: types.TensorData.from_torch(value) for name, value in inputs.items()},
    )


def step(training: tinker.TrainingClient, data: list[types.Datum], loss: Any, learning_rate: float) -> float:
    forward = training.forward_backward(data, loss)
    update = training.optim_step(types.AdamParams(learning_rate=learning_rate))
    value = forward.result(timeout=60).metrics["loss:sum"]
    update.result(timeout=60)
    return value


def test_thirty_two_examples_are_learnt_by_heart(service: tinker.ServiceClient) -> None:
    training = service.create_lora_training_client("tiny", rank=32, seed=1).result(timeout=60)
    answers = [(f"Number {index} is".encode(), f" {index * 37 % 101}.".encode()) for index in range(32)]
    data = [datum_of(prompt, answer, weights=[1.0] * len(answer)) for prompt, answer in answers]
    num_tokens = sum(len(answer) for _, answer in answers)
    rates = [5e-3 * (1 - index / 200) for index in range(200)]
    losses = [step(training, data, "cross_entropy", rate) / num_tokens for rate in rates]
    assert losses[0] > 3
    assert losses[-1] < 0.05


def test_rewards_are_sought(service: tinker.ServiceClient) -> None:
    """The reward is the share of bytes below 64, a quarter of them all."""
    training = service.create_lora_training_client("tiny", rank=8, seed=1).result(timeout=60)
    prompts = [b"Go:", b"On:", b"Up:", b"At:"]
    rewards_of_steps = []
    for index in range(40):
        sampler = training.save_weights_and_get_sampling_client().result(timeout=60)
        params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=index * GROUP_SIZE)
        drawn = [sampler.sample(types.ModelInput.from_ints(list(prompt)), GROUP_SIZE, params) for prompt in prompts]
        data, rewards_seen = [], []
        for prompt, future in zip(prompts, drawn, strict=True):
            group = future.result(timeout=60).sequences
            rewards = torch.tensor([sum(token < 64 for token in one.tokens) / len(one.tokens) for one in group])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            rewards_seen.append(rewards)
            for one, advantage in zip(group, advantages.tolist(), strict=True):
                assert one.logprobs is not None
                inputs = {"logprobs": one.logprobs, "advantages": [advantage] * len(one.tokens)}
                data.append(datum_of(prompt, one.tokens, **inputs))
        step(training, data, "importance_sampling", 1e-2)
        rewards_of_steps.append(float(torch.cat(rewards_seen).mean()))
    assert rewards_of_steps[0] < 0.5
    assert sum(rewards_of_steps[-5:]) / 5 > 0.9


def test_preferences_are_taken_on(service: tinker.ServiceClient) -> None:
    """DPO (Rafailov et al. 2023): the loss is the client's own, the reference the model as it was."""
    training = service.create_lora_training_client("tiny", rank=8, seed=1).result(timeout=60)
    pairs = [(b"How?", b" Well.", b" Bad."), (b"Where?", b" Here.", b" No."), (b"When?", b" Now.", b" Never.")]
    data = [datum_of(prompt, answer) for prompt, *answers in pairs for answer in answers]
    lengths = [len(answer) for _, *answers in pairs for answer in answers]

    def sums(logprobs: Sequence[Tensor]) -> Tensor:
        return torch.stack([each[-length:].sum() for each, length in zip(logprobs, lengths, strict=True)])

    output = training.forward(data, "cross_entropy").result(timeout=60)
    reference = sums([each["logprobs"].to_torch() for each in output.loss_fn_outputs])

    def dpo(_: list[types.Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        chosen, rejected = (sums(logprobs) - reference).view(-1, 2).unbind(1)
        margins = 0.1 * (chosen - rejected)
        return -torch.nn.functional.logsigmoid(margins).sum(), {"margin": float(margins.detach().mean())}

    margins = []
    for _ in range(20):
        output = training.forward_backward_custom(data, dpo).result(timeout=60)
        training.optim_step(types.AdamParams(learning_rate=5e-3)).result(timeout=60)
        margins.append(output.metrics["margin"])
    assert abs(margins[0]) < 1e-5
    assert margins[-1] > 1
