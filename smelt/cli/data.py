"""`smelt data`: add, list, show and remove datasets; knows no file formats."""

from typing import TYPE_CHECKING

import click

from smelt.cli.data_progress import data_progress
from smelt.settings import load_settings

if TYPE_CHECKING:
    from smelt.control.datasets import DatasetInfo

SHOWN_CHARS = 600  # of a document


@click.group(
    short_help="Add, list, show and remove datasets.",
    epilog="""\b
Examples:
  smelt data add shakespeare --from input.txt --tokenizer char
  smelt data add docs --from builtin:pydoc
  smelt data ls
  smelt data show docs --documents 2
  smelt data rm shakespeare""",
)
def command() -> None:
    """Turn text into datasets that models train on, and look after them.

    A dataset is a folder in the home folder: numbered shards of tokens, a tokenizer, and a manifest.
    """


@command.command(
    short_help="Make a dataset of a source.",
    epilog="""\b
Examples:
  smelt data add shakespeare --from input.txt --tokenizer char
  smelt data add books --from ~/books --tokenizer bpe:16384 --val-fraction 0.05
  smelt data add news --from news.csv.gz --column text --errors skip
  smelt data add web --from https://example.com/corpus.jsonl --tokenizer gpt2
  smelt data add stories --from hf:roneneldan/TinyStories --shard-tokens 50000000

\b
Sources:
  a file or a folder   .txt .md (a document each), .jsonl .json (a line each: the column, or `messages`),
                       .csv .tsv .parquet (a row each); all of them also as .gz and .zst
  http:// https://     one such file
  hf:ORG/NAME[:config][:split]   a dataset of the Hugging Face hub, streamed
  builtin:pydoc        the documentation that Python carries; needs no network

\b
Tokenizers:
  bytes     no vocabulary to learn, long sequences
  char      one id per character of the text
  bpe:N     byte-level BPE with N ids, learned from the text
  gpt2      or another of tiktoken's names
  FOLDER    a Hugging Face folder with tokenizer.json, or nanoGPT's meta.pkl""",
)
@click.argument("name")
@click.option("--from", "source", required=True, metavar="SOURCE", help="Where the documents come from; see below.")
@click.option("--tokenizer", default="bpe:4096", show_default=True, metavar="SPEC", help="See below.")
@click.option("--val-fraction", default=0.1, show_default=True, help="Part of the documents kept for validation.")
@click.option("--block-size", default=128, show_default=True, help="Tokens that each split must hold at least.")
@click.option("--shard-tokens", default=100_000_000, show_default=True, help="Tokens in one file.")
@click.option("--column", default="text", show_default=True, help="Field of a record that holds the text.")
@click.option(
    "--errors",
    type=click.Choice(["strict", "skip"]),
    default="strict",
    show_default=True,
    help="Stop at the first bad record, or leave bad records out and count them.",
)
def add(
    name: str,
    source: str,
    tokenizer: str,
    val_fraction: float,
    block_size: int,
    shard_tokens: int,
    column: str,
    errors: str,
) -> None:
    """Tokenize SOURCE into the dataset NAME. Interrupted or failed, it leaves nothing behind."""
    from smelt.control.datasets import info
    from smelt.data.preparation import PrepareOptions, prepare

    options = PrepareOptions(
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        errors="skip" if errors == "skip" else "strict",
        column=column,
        block_size=block_size,
    )
    with data_progress() as progress:
        dataset = prepare(
            source, load_settings().datasets, name, tokenizer=tokenizer, options=options, progress=progress
        )
    _describe(info(dataset.folder.parent, name))
    click.echo(f"\ntrain on it: smelt train --dataset {name}", err=True)


@command.command(short_help="List the datasets.")
def ls() -> None:
    """List the datasets with their sizes."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from smelt.control.datasets import infos

    folder = load_settings().datasets
    found = infos(folder)
    if not found:
        click.echo(f"no datasets in {folder}; make one: smelt data add NAME --from SOURCE", err=True)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "tokenizer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("train tokens", "val tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for info in found:
        if info.problem is not None:
            table.add_row(info.name, "", "damaged", "", f"smelt data show {info.name} says how")
            continue
        sizes = [f"{num_tokens:,}" for num_tokens in (info.num_train_tokens, info.num_val_tokens)]
        table.add_row(info.name, escape(info.tokenizer), *sizes, escape(info.source))
    Console().print(table)


@command.command(
    short_help="Show what a dataset is, and some of its documents.",
    epilog="""\b
Examples:
  smelt data show docs
  smelt data show docs --documents 3
  smelt data show docs --verify""",
)
@click.argument("name")
@click.option("--documents", default=0, metavar="N", help="Also print the beginnings of N documents.")
@click.option("--verify", is_flag=True, help="Compare every file with its hash.")
def show(name: str, documents: int, verify: bool) -> None:
    """Show where the dataset NAME came from, its tokenizer, counts and shards."""
    from smelt.control.datasets import info, open_for, rows

    folder = load_settings().datasets
    dataset = open_for(folder, name, owner=None)
    _describe(info(folder, name))
    for shard in (*dataset.manifest.train, *dataset.manifest.val):
        click.echo(f"  {shard.name}  {shard.num_tokens:>15,} tokens  sha256 {shard.sha256[:16]}")
    if verify:
        dataset.verify()
        click.echo("every file is as its hash says")
    for row in rows(dataset, "train", limit=documents, max_chars=SHOWN_CHARS):
        click.secho(f"\n--- document {row.index} of train, {row.num_tokens:,} tokens", fg="cyan")
        click.echo(row.text + ("..." if row.is_cut else ""))


@command.command(short_help="Remove a dataset.")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Remove the dataset NAME and its files, unless a run trains on it now."""
    from smelt.control.datasets import info, remove

    folder = load_settings().datasets
    found = info(folder, name)
    if not yes:
        click.confirm(f"remove {found.folder} ({found.num_bytes / 1e6:,.1f} MB)?", abort=True)
    remove(folder, name)
    click.echo(f"removed {name}", err=True)


def _describe(info: "DatasetInfo") -> None:
    click.echo(f"dataset     {info.name}")
    click.echo(f"folder      {info.folder} ({info.num_bytes / 1e6:,.1f} MB)")
    click.echo(f"source      {info.source} ({info.num_source_bytes / 1e6:,.1f} MB)")
    click.echo(f"tokenizer   {info.tokenizer} ({info.vocab_size:,} ids, {info.dtype} on disk)")
    click.echo(f"train       {info.num_train_tokens:,} tokens in {info.num_train_documents:,} documents")
    click.echo(f"val         {info.num_val_tokens:,} tokens in {info.num_val_documents:,} documents")
    if info.num_skipped:
        click.echo(f"skipped     {info.num_skipped:,} bad records")
