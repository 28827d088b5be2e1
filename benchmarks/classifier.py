"""Classifiers: accuracy from scratch, training against Hugging Face Trainer, two ranks against one process, serving.

    python benchmarks/classifier.py accuracy training ranks serving

From scratch: three seeds on AG News, beside TF-IDF with logistic regression (measured where scikit-learn is installed).
Training and serving: a DistilBERT of its real shape with random weights, in turns with its peers, each in a process of
its own. Speeds are also given by the processor's time, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from classifier_contender import read_rows
from machine import describe_machine, write_result

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("SMELT_SHARED", HERE.parents[1] / "shared")) / "data"
TRAIN, VALID = SHARED / "ag_news_train.csv", SHARED / "ag_news_valid.csv"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def main() -> None:
    """Measure what was asked for; the table is kept when all of it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--concurrency", type=int, default=16)
    arguments = parser.parse_args()
    lines = [line for part in arguments.parts or PARTS for line in PARTS[part](arguments)]
    versions = describe_machine(["torch", "transformers", "accelerate", "scikit-learn"])
    write_result("classifier", "Text classifiers", lines, versions)


# --- Accuracy from scratch -----------------------------------------------------------------------------------


def accuracy(arguments: argparse.Namespace) -> list[str]:
    """Three seeds on AG News, and the baseline."""
    rows = [from_scratch(seed, arguments.threads) for seed in (1, 2, 3)]
    lines = ["## From scratch: 5,000 texts of AG News, judged by 1,000 others", ""]
    lines += ["| | accuracy of the last epoch | of the best by loss | macro F1 | seconds | processor's seconds |"]
    lines += ["|---|---|---|---|---|---|"]
    for seed, row in zip((1, 2, 3), rows, strict=True):
        lines.append(f"| smelt, seed {seed} | " + " | ".join(row["cells"]) + " |")
    means = [mean(row[name] for row in rows) for name in ("last", "best", "macro_f1")]
    lines.append("| **smelt, mean of three seeds** | " + " | ".join(f"{value:.4f}" for value in means) + " | | |")
    lines.append(f"| TF-IDF (1-2-grams), logistic regression | {baseline()} | | | | |")
    return [*lines, ""]


def from_scratch(seed: int, threads: int) -> dict[str, Any]:
    """One run, as `smelt train-classifier --data TRAIN --valid VALID` does it."""
    with tempfile.TemporaryDirectory() as home:
        began, used = time.perf_counter(), children_seconds()
        lines = train_classifier(home, "--seed", str(seed), "--threads", str(threads))
        seconds, processor = time.perf_counter() - began, children_seconds() - used
        last = accuracy_in(lines)
        best = json.loads(Path(home, "run/evaluation.json").read_text())
    cells = [f"{last:.4f}", f"{best['accuracy']:.4f}", f"{best['macro_f1']:.4f}", f"{seconds:.0f}", f"{processor:.0f}"]
    return {"last": last, "best": best["accuracy"], "macro_f1": best["macro_f1"], "cells": cells}


def train_classifier(home: str, *flags: str) -> list[dict[str, Any]]:
    """The command on AG News, into `run` below a home of its own; its metrics."""
    command = [sys.executable, "-m", "smelt", "train-classifier", "--data", str(TRAIN), "--valid", str(VALID)]
    command += ["--out-dir", f"{home}/run", "--device", "cpu", *flags]
    subprocess.run(command, check=True, env={**os.environ, "SMELT_HOME": home}, capture_output=True)
    return [json.loads(line) for line in Path(home, "run/metrics.jsonl").read_text().splitlines()]


def accuracy_in(lines: list[dict[str, Any]]) -> float:
    """Of a run's last evaluation."""
    accuracy: float = [line for line in lines if line["kind"] == "evaluation"][-1]["figures"]["accuracy"]
    return accuracy


def children_seconds() -> float:
    """Processor time of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def baseline() -> str:
    """TF-IDF of words and pairs of words with logistic regression, at scikit-learn's defaults."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return "0.863 (as given; scikit-learn is not installed here)"
    train, valid = read_rows(TRAIN), read_rows(VALID)
    words = TfidfVectorizer(ngram_range=(1, 2))
    model = LogisticRegression(max_iter=1000)
    model.fit(words.fit_transform([row["text"] for row in train]), [row["label"] for row in train])
    score = model.score(words.transform([row["text"] for row in valid]), [row["label"] for row in valid])
    return f"{score:.4f}"


# --- Training ------------------------------------------------------------------------------------------------


def training(arguments: argparse.Namespace) -> list[str]:
    """The same DistilBERT, batches of 32 texts, in turns."""
    contenders = {
        "HF Trainer, dynamic padding, fp32": ["theirs"],
        "HF Trainer, dynamic padding, bf16": ["theirs", "--bf16"],
        "smelt, fp32": ["ours"],
        "smelt, bf16": ["ours", "--bf16"],
    }
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        make_distilbert(Path(folder, "model"))
        for _ in range(arguments.rounds):
            for name, work in contenders.items():
                figures[name].append(contend(work, Path(folder), arguments))
    lines = ["## Training DistilBERT (66M, random weights), batches of 32 texts, at most 128 tokens", ""]
    lines += [
        "| | samples/s | x HF fp32 | x HF bf16 | samples per second of one core | x HF fp32 |",
        "|---|---|---|---|---|---|",
    ]
    walls = {name: median(each["wall"] for each in found) for name, found in figures.items()}
    cores = {name: median(each["processor"] for each in found) for name, found in figures.items()}
    fp32, bf16 = list(contenders)[:2]
    for name in contenders:
        ratios = walls[name] / walls[fp32], walls[name] / walls[bf16], cores[name] / cores[fp32]
        lines.append(
            f"| {name} | {walls[name]:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {cores[name]:.1f} | {ratios[2]:.2f} |"
        )
    return [*lines, ""]


def contend(work: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One turn of a contender."""
    command = [sys.executable, str(HERE / "classifier_contender.py"), *work, "--model", str(folder / "model")]
    command += ["--data", str(TRAIN), "--valid", str(VALID)]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    environment = {**os.environ, "SMELT_HOME": str(folder / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def make_distilbert(folder: Path) -> None:
    """DistilBERT's real shape with random weights, the labels of AG News, and a vocabulary of its words."""
    import transformers

    rows = read_rows(TRAIN)
    labels = sorted({row["label"] for row in rows})
    config = transformers.DistilBertConfig(
        id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)}
    )
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    counts = Counter(word for row in rows for word in row["text"].lower().replace(",", " ").replace(".", " ").split())
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    words = [word for word, _ in counts.most_common(20_000) if word not in pieces]
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *pieces, *words]), encoding="utf-8")


# --- Ranks ---------------------------------------------------------------------------------------------------

NUM_TEXTS = 5000  # of the training data
# Processes, and the threads of all of them together.
RANKS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 2)}


def ranks(arguments: argparse.Namespace) -> list[str]:
    """The same command on one process and on two ranks: from scratch to the end, DistilBERT for some steps."""
    lines = ["## Two ranks, 32 texts a step (DistilBERT: times the accumulation)", ""]
    lines += ["| | | s per epoch | speed-up over 1 thread | efficiency at equal threads | accuracy |"]
    lines += ["|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        make_distilbert(Path(folder, "model"))
        some_steps = ["--model", f"{folder}/model", "--eval-interval", "1000000", "--eval-iters", "1"]
        some_steps += ["--max-iters", str(arguments.steps + 1)]  # the first one warms up
        works = {
            "scratch, 10 epochs": [],
            "DistilBERT": some_steps,
            "DistilBERT, accumulation 4": [*some_steps, "--gradient-accumulation-steps", "4"],
        }
        for name, flags in works.items():
            found = {how: on_ranks(flags, *shape) for how, shape in RANKS.items()}
            alone, together, _ = (each["epoch"] for each in found.values())
            for how, each in found.items():
                efficiency = f"{together / each['epoch']:.2f}" if RANKS[how][0] > 1 else ""
                cells = [name, how, f"{each['epoch']:.1f}", f"{alone / each['epoch']:.2f}", efficiency]
                lines.append("| " + " | ".join([*cells, "" if flags else f"{each['accuracy']:.3f}"]) + " |")
    return [*lines, ""]


def on_ranks(flags: list[str], num_ranks: int, threads: int) -> dict[str, float]:
    """Seconds of an epoch, by the median step, and the accuracy at the end."""
    with tempfile.TemporaryDirectory() as home:
        shape = ["--ranks", str(num_ranks), "--threads", str(threads)]
        lines = train_classifier(home, "--log-interval", "1", *shape, *flags)
    paces = [line["samples_per_second"] for line in lines if line["kind"] == "step"][1:]
    return {"epoch": NUM_TEXTS / median(paces), "accuracy": accuracy_in(lines)}


# --- Serving -------------------------------------------------------------------------------------------------


def serving(arguments: argparse.Namespace) -> list[str]:
    """Requests per second and the slowest ones, at the same concurrency."""
    lines = [f"## Serving that DistilBERT, {arguments.concurrency} clients, one text a request", ""]
    lines += ["| | requests/s | x one at a time | p50 | p99 |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_distilbert(model)
        peer = [sys.executable, str(HERE / "classifier_contender.py"), "serve", "--model", str(model)]
        peer += ["--threads", str(arguments.threads)]
        ours = [sys.executable, "-m", "smelt", "serve", str(model)]
        servers = {
            "transformers, one at a time, padded to 128": peer,
            "transformers, one at a time, not padded": [*peer, "--unpadded"],
            "smelt": ours,
        }
        found = {name: ask(command, folder, arguments) for name, command in servers.items()}
    slowest = next(iter(found.values()))["pace"]
    for name, each in found.items():
        cells = [f"{each['pace']:.1f}", f"{each['pace'] / slowest:.2f}", f"{each['p50']:.2f} s", f"{each['p99']:.2f} s"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def ask(command: list[str], folder: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Have as many clients as that ask one after the other, and look at the clock."""
    port = random.randrange(20_000, 30_000)
    texts = [row["text"] for row in read_rows(VALID)]
    with running([*command, "--port", str(port)], {"SMELT_HOME": f"{folder}/home", "SMELT_DEVICE": "cpu"}):
        until_it_answers(port, texts[0])
        clients(port, texts, arguments.concurrency, arguments.concurrency * 2)  # to be warm
        began = time.perf_counter()
        seconds = sorted(clients(port, texts, arguments.concurrency, arguments.requests))
        pace = len(seconds) / (time.perf_counter() - began)
    return {"pace": pace, "p50": seconds[len(seconds) // 2], "p99": seconds[int(len(seconds) * 0.99) - 1]}


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """A server, as long as the block lasts."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def until_it_answers(port: int, text: str) -> None:
    """Return when a text was classified."""
    deadline = time.monotonic() + 300
    while True:
        try:
            predict(port, text)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def clients(port: int, texts: list[str], concurrency: int, num_requests: int) -> list[float]:
    """How long each request took."""
    waiting = iter(texts[number % len(texts)] for number in range(num_requests))
    lock, seconds = threading.Lock(), []

    def work() -> None:
        while True:
            with lock:
                text = next(waiting, None)
            if text is None:
                return
            began = time.perf_counter()
            predict(port, text)
            seconds.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def predict(port: int, text: str) -> dict[str, Any]:
    """One request."""
    body = json.dumps({"text": text}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", body, {"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


PARTS = {"accuracy": accuracy, "training": training, "ranks": ranks, "serving": serving}

if __name__ == "__main__":
    main()
