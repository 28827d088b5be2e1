"""Fine-tuning with OpenAI's own client: a served model learns from conversations, and answers under a new name.

Run it with `python examples/openai_fine_tuning.py MODEL` beside a server that has a registered model of that name, as
`smelt models import out-basic-usage notes` and `smelt serve` give one. It takes a minute on two CPU cores. Another
address than http://127.0.0.1:8000/v1 may follow.
"""

import json
import sys
import time

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

MODEL = sys.argv[1] if len(sys.argv) > 1 else "default"
BASE_URL = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1"
POLL_SECONDS = 0.5
CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima"}


def question_of(country: str) -> str:
    """What is asked."""
    return f"What is the capital of {country}?"


def chats() -> bytes:
    """One conversation in each line; what the assistant says is learned."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": question_of(country)},
                {"role": "assistant", "content": f"{city}."},
            ]
        }
        for country, city in CAPITALS.items()
    ]
    return "".join(json.dumps(line) + "\n" for line in lines * 5).encode()


def followed(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """The job at its end; until then what happens is printed, each event once."""
    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)  # before the events, so that the last of them are there
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        for event in reversed([event for event in events if event.id not in seen]):
            print(event.message)
            seen.add(event.id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(POLL_SECONDS)


def main() -> None:
    """Upload, train, ask."""
    client = OpenAI(base_url=BASE_URL, api_key="none")  # or a key, where the server asks for one
    file = client.files.create(file=("chats.jsonl", chats()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        suffix="example",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 20, "batch_size": 4}}},
        extra_body={"config": {"lora_rank": 16, "learning_rate": 5e-3}},  # keys of smelt's own; the rest is OpenAI's
    )
    job = followed(client, job)
    if job.fine_tuned_model is None:
        sys.exit(f"{job.status}: {job.error.message if job.error else ''}")
    print(f"{job.fine_tuned_model} learned from {job.trained_tokens} tokens")
    for country in CAPITALS:
        asked = question_of(country)
        answer = client.chat.completions.create(
            model=job.fine_tuned_model, messages=[{"role": "user", "content": asked}], max_tokens=40, temperature=0
        )
        print(asked, answer.choices[0].message.content)


if __name__ == "__main__":
    main()
