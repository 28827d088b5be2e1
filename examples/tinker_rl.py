"""Reinforcement learning by request: answers are drawn, a rule rewards them, and the good ones become likelier.

Run it with `python examples/tinker_rl.py` beside a server, which `python examples/basic_usage.py` and
`smelt serve out-basic-usage` give. It needs `pip install tinker transformers`, and 20 seconds on two CPU cores.
Another address than http://127.0.0.1:8000 may follow.
The reward can be checked by eye: how many of an answer's tokens have the letter e.
"""

import sys

import httpx
import tinker
import torch
from tinker import types

BASE_URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
API_KEY = "tml-any"  # the client wants a key that begins so, and a server without keys reads none
NUM_STEPS = 30
GROUP_SIZE = 16
PROMPTS = ["The function returns", "If the file", "This module", "A list of"]


def reward_of(pieces: list[str]) -> float:
    """The share of tokens that have the letter e."""
    return sum("e" in piece for piece in pieces) / len(pieces)


def datum_of(prompt_ids: list[int], drawn: types.SampledSequence, advantage: float) -> types.Datum:
    """An answer as importance_sampling wants it: what was drawn, how likely it was, and how good."""
    ids = prompt_ids + list(drawn.tokens)
    before = [0.0] * (len(prompt_ids) - 1)
    inputs = {
        "target_tokens": torch.tensor(ids[1:]),
        "logprobs": torch.tensor(before + list(drawn.logprobs or [])),
        "advantages": torch.tensor(before + [advantage] * len(drawn.tokens)),
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={name: types.TensorData.from_torch(values) for name, values in inputs.items()},
    )


def tell_reward(training: tinker.TrainingClient, reward: float) -> None:
    """Have the dashboard draw it: only the client knows it."""
    session = str(training.model_id).partition(":")[0]
    address = f"{BASE_URL}/v1/sessions/{session}/models/{training.model_id}/figures"
    httpx.post(address, json={"figures": {"reward": reward}}).raise_for_status()


def main() -> None:
    """Sample from the weights in training, reward, step."""
    service = tinker.ServiceClient(base_url=BASE_URL, api_key=API_KEY)
    training = service.create_lora_training_client(base_model="default", rank=8, seed=1).result()
    tokenizer = training.get_tokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    for step in range(NUM_STEPS):
        sampler = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=step * GROUP_SIZE)
        answers = [sampler.sample(types.ModelInput.from_ints(ids), GROUP_SIZE, params) for ids in prompts]
        data, rewards_seen = [], []
        for ids, answer in zip(prompts, answers, strict=True):
            group = answer.result().sequences
            rewards = torch.tensor([reward_of([tokenizer.decode([token]) for token in one.tokens]) for one in group])
            rewards_seen.append(rewards)
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            data += [datum_of(ids, one, float(good)) for one, good in zip(group, advantages, strict=True)]
        reward = float(torch.cat(rewards_seen).mean())
        tell_reward(training, reward)
        forward = training.forward_backward(data, "importance_sampling")
        update = training.optim_step(types.AdamParams(learning_rate=4e-3))
        forward.result()
        update.result()
        if step % 5 == 0 or step == NUM_STEPS - 1:
            print(f"step {step}: mean reward {reward:.3f}")
    print("to sample from later:", training.save_weights_for_sampler("letter-e").result().path)
    service.close("success").result()


if __name__ == "__main__":
    main()
