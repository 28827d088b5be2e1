"""The peers of `classifier.py`: Hugging Face Trainer with dynamic padding, and transformers behind FastAPI.

The server does one text at a time, padded to 128 tokens, as the system that smelt replaces does (`--unpadded`: as long
as the text is). Each is a process of its own, and prints one line of JSON.
"""

import argparse
import csv
import json
import logging
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

MAX_LENGTH = 128


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def train_theirs(arguments: argparse.Namespace) -> dict[str, float]:
    """Steps of Hugging Face Trainer; the first one is left out of the time."""
    import transformers

    tokenizer = transformers.BertTokenizerFast.from_pretrained(arguments.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(arguments.model)
    rows = read_rows(arguments.data)
    texts = [tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH) for row in rows]
    samples = [
        {
            **{name: text[name] for name in ("input_ids", "attention_mask")},
            "labels": model.config.label2id[row["label"]],
        }
        for text, row in zip(texts, rows, strict=True)
    ]
    clock = Clock()

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.note()

    settings = transformers.TrainingArguments(
        output_dir=str(arguments.model.parent / "hf"),
        per_device_train_batch_size=arguments.batch_size,
        max_steps=arguments.steps + 1,
        learning_rate=2e-5,
        weight_decay=0.01,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        bf16=arguments.bf16,
        disable_tqdm=True,
    )
    collate = transformers.DataCollatorWithPadding(tokenizer)
    transformers.Trainer(model, settings, train_dataset=samples, data_collator=collate, callbacks=[Watch()]).train()
    return clock.figures(arguments.steps * arguments.batch_size)


def train_ours(arguments: argparse.Namespace) -> dict[str, float]:
    """The same steps through smelt."""
    from smelt.library import run, run_config
    from smelt.training.metrics import StepMetrics

    clock = Clock()

    def sink(event: object) -> None:
        if isinstance(event, StepMetrics):
            clock.note()

    config = run_config(
        {
            "recipe": "classify",
            "data": str(arguments.data),
            "valid": str(arguments.valid),
            "model": str(arguments.model),
            "out_dir": str(arguments.model.parent / f"ours-{time.time_ns()}"),
            "batch_size": arguments.batch_size,
            "max_iters": arguments.steps + 1,
            "eval_interval": 10**6,
            "num_samples": 5000,
            "device": "cpu",
            "threads": arguments.threads,
            "dtype": "bfloat16" if arguments.bf16 else "float32",
        }
    )
    with suppress(Enough):
        run(config, [sink, clock.stop_after(arguments.steps + 1)])
    return clock.figures(arguments.steps * arguments.batch_size)


class Enough(Exception):
    """The steps are done: what follows them is not measured."""


class Clock:
    """Time on the wall and of the processor, from the end of the first step to that of the last."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def note(self) -> None:
        """A step has ended."""
        self.marks.append((time.perf_counter(), time.process_time()))

    def stop_after(self, num_steps: int) -> Any:
        """A sink that ends the run then."""

        def sink(_event: object) -> None:
            if len(self.marks) >= num_steps:
                raise Enough

        return sink

    def figures(self, num_samples: int) -> dict[str, float]:
        """Samples per second of each."""
        (wall, processor), (wall_end, processor_end) = self.marks[0], self.marks[-1]
        return {"wall": num_samples / (wall_end - wall), "processor": num_samples / (processor_end - processor)}


def serve(arguments: argparse.Namespace) -> None:
    """transformers behind FastAPI, one text at a time."""
    import fastapi
    import pydantic
    import transformers
    import uvicorn

    tokenizer = transformers.BertTokenizerFast.from_pretrained(arguments.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(arguments.model).eval()
    app = fastapi.FastAPI()
    padding = False if arguments.unpadded else "max_length"

    class Body(pydantic.BaseModel):
        text: str

    @app.post("/predict")
    async def predict(body: Body) -> dict[str, Any]:
        encoded = tokenizer(body.text, truncation=True, max_length=MAX_LENGTH, padding=padding, return_tensors="pt")
        with torch.inference_mode():
            shares = model(**encoded).logits.softmax(-1)[0].tolist()
        labels = [model.config.id2label[number] for number in range(len(shares))]
        best = max(range(len(shares)), key=shares.__getitem__)
        rounded = {label: round(share, 4) for label, share in zip(labels, shares, strict=True)}
        return {"label": labels[best], "confidence": rounded[labels[best]], "all_probabilities": rounded}

    uvicorn.run(app, port=arguments.port, log_level="warning")


def main() -> None:
    """Do one of the three."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["theirs", "ours", "serve"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--valid", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--unpadded", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.work == "serve":
        serve(arguments)
        return
    figures = train_theirs(arguments) if arguments.work == "theirs" else train_ours(arguments)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
