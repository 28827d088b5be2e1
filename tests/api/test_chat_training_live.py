"""Plain HTTP against `smelt serve` with a tiny chat model: it learns what it is told, and goes on after a crash."""

import gc
import os
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from chat_templates import QWEN_3, write_tokenizer
from families import random_state
from serving import Server, serving
from smelt.configs import DecoderConfig
from smelt.control.adapters import import_adapter
from smelt.control.models import import_model
from smelt.models.weights import write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # Tinker's client leaves connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = DecoderConfig(vocab_size=288, block_size=128, n_layer=1, n_head=2, n_embd=32)
QUESTION = {"role": "user", "content": "What is 2+2?"}
SUM = [QUESTION, {"role": "assistant", "content": "4"}]
ADAM = {"learning_rate": 1e-2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chat-live")
    write_tokenizer(folder / "chat", QWEN_3)
    state = random_state(CONFIG)
    state["embedding.weight"] *= 5
    state["norm.weight"] += 1
    write_model(CONFIG, state, folder / "chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMELT_DTYPE", "float32")
        with serving(folder / "home", str(folder / "chat")) as started:
            yield started
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def post(client: httpx.Client, route: str, /, **body: Any) -> dict[str, Any]:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def result(client: httpx.Client, promised: dict[str, Any]) -> dict[str, Any]:
    return post(client, "/retrieve_future", request_id=promised["request_id"])


def learn(client: httpx.Client, num_steps: int, **body: Any) -> list[float]:
    """The loss before each step."""
    promises = []
    for _ in range(num_steps):
        promises.append(post(client, "/fwdbwd", **{"seed": 1, **body}))
        post(client, "/optim_step", model_id=body["model_id"], adam_params=ADAM)
    return [result(client, promised)["loss"] for promised in promises]


def say(client: httpx.Client, name: str | None) -> str:
    sampling = {"max_tokens": 4, "temperature": 0}
    told = post(client, "/sample", model_id=name, messages=[QUESTION], sampling_params=sampling)
    return str(told["generated_text"])


def test_an_answer_is_learned_and_the_base_model_stays(client: httpx.Client) -> None:
    before = say(client, None)
    losses = learn(client, 40, model_id="taught", data=[SUM], loss_fn="cross_entropy")
    assert losses[0] > 1 > 0.05 > losses[-1]
    assert say(client, "taught") == "4"
    assert say(client, None) == before != "4"


def test_a_seed_draws_the_same_first_weights_again(client: httpx.Client) -> None:
    first, again, other = (
        learn(client, 3, model_id=name, data=[SUM], seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == again
    assert first[0] == other[0]  # an adapter begins as nothing
    assert first[1:] != other[1:]


def test_a_policy_is_rewarded_for_what_it_drew(client: httpx.Client) -> None:
    learn(client, 1, model_id="rl-model", data=[SUM])
    prompts = [QUESTION]
    drawn = post(client, "/sample", model_id="rl-model", messages=prompts, sampling_params={"max_tokens": 3})
    [sequence] = drawn["sequences"]
    inputs = {
        "target_tokens": [sequence["tokens"]],
        "logprobs": [sequence["logprobs"]],
        "advantages": [[1.0] * len(sequence["tokens"])],
    }
    told = result(
        client, post(client, "/fwdbwd", model_id="rl-model", data=[prompts], loss_fn="ppo", loss_fn_inputs=inputs)
    )
    # The weights are those that drew: each ratio is 1, and the loss the sum of the advantages.
    assert told["loss"] == pytest.approx(-len(sequence["tokens"]), abs=1e-3)
    again = told["loss_fn_outputs"][0]["logprobs"][-len(sequence["tokens"]) :]
    assert again == pytest.approx(sequence["logprobs"], abs=1e-4)


def test_preferences_are_learned(client: httpx.Client) -> None:
    pair = {"prompt": [QUESTION], "chosen": SUM[1:], "rejected": [{"role": "assistant", "content": "5"}]}
    losses = learn(client, 15, model_id="dpo-model", data=[pair], loss_fn="dpo")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.3


def test_a_conversation_that_the_template_refuses_is_the_user_s_fault(client: httpx.Client) -> None:
    body = {"model_id": "taught", "data": [[{"role": "tool", "content": "x"}]]}
    answer = client.post("/fwdbwd", json=body)
    assert answer.status_code == 400
    assert "data[0]" in answer.json()["detail"]


def test_an_adapter_becomes_a_model_that_writes_the_same(client: httpx.Client) -> None:
    learn(client, 40, model_id="to-merge", data=[SUM])
    assert result(client, post(client, "/merge_lora", model_id="to-merge", name="whole"))["model"] == "whole"
    body = {"model": "whole", "messages": [QUESTION], "max_tokens": 4, "temperature": 0}
    said = post(client, "/v1/chat/completions", **body)["choices"][0]
    assert (said["message"]["content"], said["finish_reason"]) == ("4", "stop")


def test_an_adapter_leaves_and_comes_back(server: Server, client: httpx.Client) -> None:
    models = server.home / "models"
    import_model(server.home.with_name("chat"), "base-chat", models, "a test")
    learn(client, 20, model_id="leaving", data=[SUM], base_model="base-chat")
    promised = post(client, "/fwdbwd", model_id="leaving", data=[SUM], forward_only=True)
    path = result(client, post(client, "/save_weights_for_sampler", model_id="leaving", name="out"))["path"]
    [saved] = server.home.glob(f"sessions/*/{path.split('/', 3)[3]}")
    import_adapter(saved, "coming", models / "base-chat", models)
    post(client, "/add_lora", model_id="again", base_model="base-chat")
    path = "tinker://coming/sampler_weights/adapter"
    result(client, post(client, "/load_weights", model_id="again", path=path, optimizer=False))
    found = result(client, post(client, "/fwdbwd", model_id="again", data=[SUM], forward_only=True))
    assert found["loss_fn_outputs"] == result(client, promised)["loss_fn_outputs"]
    with tinker.ServiceClient(base_url=server.url, api_key="tml-test") as service:
        training = service.create_training_client_from_state(path).result(timeout=60)
        assert training.get_info().model_data.model_name == "base-chat"
        sampler = service.create_sampling_client(model_path=path).result(timeout=60)
        drawn = sampler.sample(types.ModelInput.from_ints([65, 66]), 1, types.SamplingParams(max_tokens=2)).result()
        assert drawn.sequences[0].tokens
    body = {"messages": [QUESTION], "max_tokens": 4, "temperature": 0}
    answers = [post(client, "/v1/chat/completions", model=name, **body) for name in ("coming", "base-chat")]
    said, base = (answer["choices"][0]["message"]["content"] for answer in answers)
    assert said == say(client, "again") != base


@pytest.mark.parametrize("library", ["requests", "tinker"])
def test_the_documentation_s_snippets_work(
    server: Server, client: httpx.Client, library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "tinker.md"
    section = page.read_text().partition("## Without the client")[2].partition("\n## ")[0]
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if f"import {library}" in code]
    exec(compile(snippet.replace("http://127.0.0.1:8000", server.url), str(page), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    if library == "requests":
        assert float(lines[0].removeprefix("Loss: ")) > 0.1 > float(lines[-2].removeprefix("Loss: "))
        assert lines[-1] == "4"
    else:
        assert "'grad_norm'" in lines[0]


def test_an_adapter_survives_the_worker(server: Server, client: httpx.Client) -> None:
    learn(client, 2, model_id="lasting", data=[SUM])
    promised = post(client, "/fwdbwd", model_id="lasting", data=[SUM], forward_only=True)
    expected = result(client, promised)
    os.kill(server.pid_of("worker"), signal.SIGKILL)
    again = result(client, post(client, "/fwdbwd", model_id="lasting", data=[SUM], forward_only=True))
    assert again["loss_fn_outputs"] == expected["loss_fn_outputs"]
    assert result(client, promised) == expected


def test_nothing_of_a_server_s_folder_is_named(client: httpx.Client, tmp_path: Path) -> None:
    answer = client.post("/fwdbwd", json={"model_id": "x", "data": [SUM], "base_model": str(tmp_path)})
    assert answer.status_code == 404
