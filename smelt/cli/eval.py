"""`smelt eval`: how well a model predicts texts or answers, as text or JSON; computes nothing."""

import json
from dataclasses import asdict
from typing import Any

import click

EXAMPLES = """\b
Examples:
  smelt eval out --data held-out.txt
  smelt eval gpt2 --data shakespeare --split val
  smelt eval out-qwen --data chats.jsonl --json
  smelt eval hf:Qwen/Qwen3-0.6B --data reviews.csv --max-length 1024 --limit 500"""


@click.command(epilog=EXAMPLES, short_help="Say how well a model predicts texts or answers.")
@click.argument("model")
@click.option("--data", required=True, help="Text, JSON lines, CSV or Parquet, or the name of a dataset.")
@click.option("--split", type=click.Choice(["val", "train"]), default="val", show_default=True, help="Of a dataset.")
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens seen at once.  [the model's context]")
@click.option("--limit", type=click.IntRange(min=1), help="Look at the first so many examples only.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Examples per pass.")
@click.option("--device", help="auto, cpu, cuda, cuda:N or mps")
@click.option("--dtype", help="auto, float32, bfloat16 or float16")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model: str, as_json: bool, **options: Any) -> None:
    """Score MODEL, a name or a folder, on data: loss, perplexity, bits per byte, accuracy.

    Of texts every token counts, in pieces of --max-length tokens that do not overlap; of conversations and of prompts
    with completions only what is to be answered. Bits per byte may be compared between models with other tokenizers,
    loss and perplexity may not.
    """
    from smelt.cli.data_progress import data_progress
    from smelt.library import evaluate

    with data_progress() as progress:
        found = evaluate(model, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    click.echo(
        f"loss {found.loss:.4f}, perplexity {found.perplexity:,.2f}, {found.bits_per_byte:.4f} bits per byte, "
        f"accuracy {found.accuracy:.2%}\n"
        f"over {found.num_tokens:,} tokens ({found.num_bytes:,} bytes) of {found.num_examples:,} examples, "
        f"in {found.seconds:.1f} s at {found.tokens_per_second:,.0f} tokens/s"
    )
