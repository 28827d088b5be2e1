"""What a live client notices of a batch: one streamed answer after the other, alone and beside a batch, in turns.

    python benchmarks/batches.py [--rounds 3] [--answers 6] [--new 33] [--threads 2]

The batch has the same kind of requests. The last column is the work that got done in that time.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import openai
from machine import describe_machine, write_result
from serving_http import Load, ask, running

from serving import make_model, middle_and_end, random_prompts

WAYS = ("alone", "beside a batch")
LINES = 2000  # more than are answered while somebody measures
WARM_UP_ANSWERS = 8  # of the batch, before it counts


def main() -> None:
    """Take turns, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=6, help="live ones in each turn")
    parser.add_argument("--new", type=int, default=33, help="tokens that each answer has")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smelt-bench-") as folder:
        model = Path(folder) / "model"
        make_model(model)
        home = Path(folder) / "home"
        home.mkdir()
        with running("smelt serve", model, home, arguments.threads) as address:
            lines = measured(address, model, arguments)
    title = f"A live client beside a batch, 135M Llama shape, {arguments.new} tokens, {arguments.threads} threads"
    load = f"- load average of the last quarter of an hour: {os.getloadavg()[2]:.1f}"
    write_result("batches", title, lines, [*describe_machine(["torch", "openai"]), load])


def measured(address: str, model: Path, arguments: argparse.Namespace) -> list[str]:
    """A row for each way."""
    loads: dict[str, Load] = defaultdict(Load)
    num_done: dict[str, int] = defaultdict(int)
    client = openai.OpenAI(base_url=address, api_key="none")
    for number in range(arguments.rounds):
        for way in WAYS:
            batch_id = begin_batch(client, str(model), arguments.new, number) if way != "alone" else None
            before = num_answered(client, batch_id)
            texts = prompts(arguments.answers, seed=1000 * number + WAYS.index(way))
            asyncio.run(ask(address, str(model), texts, 1, arguments.new, loads[way]))
            num_done[way] += num_answered(client, batch_id) - before
            end_batch(client, batch_id)
        sys.stderr.write(f"round {number + 1} of {arguments.rounds}\n")
    head = ["TTFT p50 ms", "TTFT p99 ms", "between pieces p50 ms", "p99 ms", "all output tokens/s"]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for way, load in loads.items():
        times = [1000 * figure for seconds in (load.first_tokens, load.gaps) for figure in middle_and_end(seconds)]
        rate = load.rate + arguments.new * num_done[way] / load.seconds
        lines.append("| " + " | ".join([way, *(f"{each:,.0f}" for each in times), f"{rate:,.1f}"]) + " |")
    return [*lines, ""]


def prompts(count: int, seed: int) -> list[str]:
    """Never the same twice."""
    return [" ".join(f"w{token}" for token in prompt) for prompt in random_prompts(count, seed)]


def begin_batch(client: openai.OpenAI, model: str, num_new: int, number: int) -> str:
    """The id of a batch that is well under way."""
    lines = [
        {
            "custom_id": f"line-{index}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": model, "prompt": prompt, "max_tokens": num_new, "temperature": 0},
        }
        for index, prompt in enumerate(prompts(LINES, seed=50_000 + number))
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    while num_answered(client, batch.id) < WARM_UP_ANSWERS:
        time.sleep(0.1)
    return batch.id


def num_answered(client: openai.OpenAI, batch_id: str | None) -> int:
    """How many requests of a batch have their answer; SystemExit where some have failed."""
    if batch_id is None:
        return 0
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None, "a batch has them"
    if counts.failed:
        raise SystemExit(f"{counts.failed} requests have failed")
    return counts.completed


def end_batch(client: openai.OpenAI, batch_id: str | None) -> None:
    """Give it up, and wait until nothing of it is under way."""
    if batch_id is None:
        return
    client.batches.cancel(batch_id)
    while client.batches.retrieve(batch_id).status != "cancelled":
        time.sleep(0.1)


if __name__ == "__main__":
    main()
