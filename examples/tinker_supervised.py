"""Supervised training by request: Tinker's client teaches a served model answers, and samples from what it learnt.

Run it with `python examples/tinker_supervised.py` beside a server, which `python examples/basic_usage.py` and
`smelt serve out-basic-usage` give. It needs `pip install tinker transformers`, and a few seconds on two CPU cores.
Another address than http://127.0.0.1:8000 may follow.
"""

import sys

import tinker
import torch
from tinker import types

BASE_URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
API_KEY = "tml-any"  # the client wants a key that begins so, and a server without keys reads none
NUM_STEPS = 40

ANSWERS = {
    "The capital of France is": " Paris.",
    "The capital of Japan is": " Tokyo.",
    "The capital of Kenya is": " Nairobi.",
    "The capital of Peru is": " Lima.",
}


def datum_of(prompt_ids: list[int], answer_ids: list[int]) -> types.Datum:
    """Each token is to be followed by the next; only the answer counts."""
    ids = prompt_ids + answer_ids
    weights = [0.0] * (len(prompt_ids) - 1) + [1.0] * len(answer_ids)
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch(torch.tensor(ids[1:])),
            "weights": types.TensorData.from_torch(torch.tensor(weights)),
        },
    )


def main() -> None:
    """Train, save, sample."""
    service = tinker.ServiceClient(base_url=BASE_URL, api_key=API_KEY)
    training = service.create_lora_training_client(base_model="default", rank=8, seed=1).result()
    tokenizer = training.get_tokenizer()
    data = [datum_of(tokenizer.encode(prompt), tokenizer.encode(answer)) for prompt, answer in ANSWERS.items()]
    num_tokens = sum(len(tokenizer.encode(answer)) for answer in ANSWERS.values())
    for step in range(NUM_STEPS):
        # Both are sent before either is waited for, which saves a way to the server and back.
        forward = training.forward_backward(data, "cross_entropy")
        update = training.optim_step(types.AdamParams(learning_rate=5e-3))
        loss = forward.result().metrics["loss:sum"] / num_tokens
        update.result()
        if step % 5 == 0 or step == NUM_STEPS - 1:
            print(f"step {step}: loss {loss:.4f} per token")
    print("checkpoint:", training.save_state("capitals").result().path)
    sampler = training.save_weights_and_get_sampling_client().result()
    greedy = types.SamplingParams(max_tokens=8, temperature=0.0, stop=["."])
    for prompt, answer in ANSWERS.items():
        drawn = sampler.sample(types.ModelInput.from_ints(tokenizer.encode(prompt)), 1, greedy).result()
        written = tokenizer.decode(drawn.sequences[0].tokens)
        print(f"{prompt}{written!r}, to be {answer!r}")
    service.close("success").result()


if __name__ == "__main__":
    main()
