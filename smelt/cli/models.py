"""`smelt models`: list, show, import, name, load and remove models; prints, the work is in `control.models`."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from smelt.errors import SmeltError, Unavailable
from smelt.settings import Settings, load_settings

if TYPE_CHECKING:
    from rich.table import Table

    from smelt.configs import DecoderConfig
    from smelt.control.models import ModelInfo

EXAMPLES = """\b
Examples:
  smelt models ls
  smelt models show shakespeare
  smelt models import hf:Qwen/Qwen3-0.6B Qwen/Qwen3-0.6B
  smelt models import nanoGPT/out-shakespeare-char shakespeare
  smelt models alias bard shakespeare
  smelt models load shakespeare
  smelt models unload shakespeare
  smelt models merge shakespeare peft-output polite-shakespeare
  smelt models export out my-model-for-transformers
  smelt models rm shakespeare"""

# Columns of `ls` that give way on a narrow terminal, the first one first.
LESS_IMPORTANT = ("from", "tokenizer", "architecture")
PIPE_WIDTH = 1000  # characters: a program that reads the list wants a line for each model

ALIAS_EXAMPLES = """\b
Examples:
  smelt models alias bard shakespeare
  smelt models alias default shakespeare
  smelt models alias --rm bard
  smelt models alias"""


@click.group(epilog=EXAMPLES)
def command() -> None:
    """List, show, import, export and remove models."""


@command.command("ls")
def list_command() -> None:
    """List the registered models and their aliases and, while a server runs, what it has loaded."""
    from rich.console import Console

    from smelt.control.models import list_models

    settings = load_settings()
    models = list_models(settings.models)
    if not models:
        click.echo("no models yet; make one with smelt train, or: smelt models import SOURCE NAME")
        return
    loaded = loaded_models(settings)
    console = Console()
    rows = [list_row(model, is_loaded=loaded is not None and model.name in loaded) for model in models]
    headings = [heading for heading in rows[0] if any(row[heading] for row in rows)]
    if console.is_terminal:
        headings = fitting(rows, headings, console.width)
    else:
        console.width = PIPE_WIDTH
    console.print(table_of(rows, headings), markup=False)


def fitting(rows: list[dict[str, str]], headings: list[str], width: int) -> list[str]:
    """The headings of a table that a terminal has room for; the less important ones give way."""
    kept = list(headings)
    for heading in LESS_IMPORTANT:
        widths = [max(len(heading), *(len(row[heading]) for row in rows)) for heading in kept]
        if sum(widths) + 2 * (len(kept) - 1) <= width:
            break
        kept = [other for other in kept if other != heading]
    return kept


def table_of(rows: list[dict[str, str]], headings: list[str]) -> "Table":
    """Rows as a table, with numbers to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        is_number = heading in ("parameters", "context", "size")
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[heading] for heading in headings))
    return table


def list_row(model: "ModelInfo", is_loaded: bool) -> dict[str, str]:
    """What `ls` says of a model, by heading."""
    config = model.config or model.classifier
    return {
        "name": model.name,
        "aliases": " ".join(model.aliases),
        "architecture": config.architecture if config else "unusable, see show",
        "parameters": f"{config.num_parameters:,}" if config else "",
        "context": f"{config.block_size:,}" if config else "",
        "size": size_text(model.num_bytes),
        "tokenizer": model.tokenizer or "none",
        "loaded": "yes" if is_loaded else "",
        "from": model.origin or "",
    }


@command.command("show", epilog="\b\nExample:\n  smelt models show out")
@click.argument("model")
def show_command(model: str) -> None:
    """Show the shape, size, tokenizer and origin of MODEL, a name or a folder, and the memory that it takes to serve.

    To the memory for weights comes what the cache takes for each token of the texts that are written at once.
    """
    from rich.console import Console
    from rich.table import Table

    from smelt.control.models import show_model

    info = show_model(model, load_settings().models)
    rows: dict[str, object] = {"name": info.name, "folder": info.folder, "size": size_text(info.num_bytes)}
    if info.problem is not None:
        rows["problem"] = info.problem
    if info.aliases:
        rows["aliases"] = ", ".join(info.aliases)
    if info.config is not None:
        rows |= {"parameters": f"{info.config.num_parameters:,}", "tokenizer": info.tokenizer or "none"}
        rows |= memory_rows(info.config)
        rows |= {name: value for name, value in info.config.model_dump().items() if value is not None}
    if info.classifier is not None:
        rows |= {"parameters": f"{info.classifier.num_parameters:,}", "tokenizer": info.tokenizer or "none"}
        rows["labels"] = ", ".join(info.classifier.labels) or "none yet (smelt train-classifier --model)"
        rows |= {name: value for name, value in info.classifier.backbone.model_dump().items() if value is not None}
    if info.origin is not None:
        rows["from"] = info.origin
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table, markup=False)


@command.command("import", epilog=EXAMPLES)
@click.argument("source")
@click.argument("name")
def import_command(source: str, name: str) -> None:
    """Register SOURCE under NAME: a model folder, a run, nanoGPT's ckpt.pt, gpt2...gpt2-xl or hf:ORG/NAME.

    Weights (safetensors), config and tokenizer are copied; code and pickles are not. Of a run of `smelt finetune` it is
    the adapter that is copied, which stays beside the model that it changes.
    """
    from smelt.cli.data_progress import data_progress
    from smelt.control.models import check_free, import_model, new_model
    from smelt.control.trained_models import register_adapter
    from smelt.models.folders import is_adapter
    from smelt.models.registry import resolve

    models_folder = load_settings().models
    check_free(name, models_folder)
    path = resolve(source, models_folder)
    origin = source if source.startswith("hf:") else str(path)
    if path.is_file():
        from smelt.models.loading import convert

        with new_model(name, models_folder, origin) as folder:
            convert(path, folder)
    elif is_adapter(path):
        register_adapter(path, name, models_folder, origin)
    else:
        with data_progress() as progress:
            import_model(path, name, models_folder, origin, progress)
    click.echo(f"imported {name}; write with it: smelt generate {name}", err=True)


@command.command("export", epilog="\b\nExample:\n  smelt models export out my-model-for-transformers")
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
def export_command(model: str, folder: Path) -> None:
    """Write MODEL, a name or a folder, as a new Hugging Face FOLDER that transformers loads.

    An adapter is added to the weights of the model that it changes.
    """
    from smelt.control.models import export_model, new_export
    from smelt.models.folders import is_adapter
    from smelt.models.registry import resolve

    models_folder = load_settings().models
    path = resolve(model, models_folder)
    if path.is_file() or is_adapter(path):
        from smelt.models.loading import convert

        with new_export(folder) as target:
            convert(path, target)
    else:
        export_model(path, folder)
    click.echo(f"exported to {folder}", err=True)


@command.command("alias", epilog=ALIAS_EXAMPLES)
@click.argument("name", required=False)
@click.argument("target", required=False)
@click.option("--rm", "removes", is_flag=True, help="Forget the alias NAME; the model stays.")
def alias_command(name: str | None, target: str | None, removes: bool) -> None:
    """Let NAME mean the model TARGET too, in requests and commands; without arguments list the aliases.

    The alias `default` chooses the model that `gpt` and `default` mean where `smelt serve` is given none.
    """
    from smelt.control.models import remove_alias, set_alias
    from smelt.models.aliases import read_aliases

    models_folder = load_settings().models
    if name is None:
        for alias, meant in read_aliases(models_folder).items():
            click.echo(f"{alias} -> {meant}")
    elif removes and target is None:
        remove_alias(name, models_folder)
        click.echo(f"removed the alias {name}", err=True)
    elif target is not None and not removes:
        click.echo(f"{name} now means {set_alias(name, target, models_folder)}", err=True)
    else:
        raise click.UsageError("give a NAME and a TARGET, or --rm and a NAME")


@command.command("merge", epilog="\b\nExample:\n  smelt models merge Qwen/Qwen3-0.6B peft-output polite-qwen")
@click.argument("model")
@click.argument("adapter")
@click.argument("name")
def merge_command(model: str, adapter: str, name: str) -> None:
    """Register as NAME what MODEL becomes with ADAPTER in its weights: a model that needs no adapter any more.

    ADAPTER is a LoRA adapter as PEFT saves them: a folder, or the name of one (smelt adapters ls).
    """
    from smelt.control.models import check_free, new_model
    from smelt.models.merging import merge_folders
    from smelt.models.registry import resolve

    models_folder = load_settings().models
    check_free(name, models_folder)
    base, given = resolve(model, models_folder), Path(adapter).expanduser()
    changes = given if given.is_dir() else resolve(adapter, models_folder)
    with new_model(name, models_folder, f"{model} with {adapter}") as folder:
        merge_folders(base, changes, folder)
    click.echo(f"registered {name}; write with it: smelt generate {name}", err=True)


@command.command("load", epilog="\b\nExample:\n  smelt models load shakespeare")
@click.argument("model")
def load_command(model: str) -> None:
    """Have the running server of this home folder load MODEL now, before anybody asks for it."""
    change_loaded(model, "load")


@command.command("unload", epilog="\b\nExample:\n  smelt models unload shakespeare")
@click.argument("model")
def unload_command(model: str) -> None:
    """Have the running server give back MODEL's memory, once its answers have ended. A request loads it again."""
    change_loaded(model, "unload")


@command.command("rm", epilog="\b\nExample:\n  smelt models rm shakespeare")
@click.argument("name")
@click.option("--force", is_flag=True, help="Remove its aliases too, which else forbid it.")
def remove_command(name: str, force: bool) -> None:
    """Delete the registered model NAME; folders elsewhere are never touched."""
    from smelt.control.models import remove_model

    remove_model(name, load_settings().models, force)
    click.echo(f"removed {name}", err=True)


def change_loaded(model: str, verb: str) -> None:
    """Ask the running server, and say who holds the model now. Unavailable where no server runs."""
    from smelt.cli.running_server import running_server

    settings = load_settings()
    with running_server(settings) as server:
        if server is None:
            raise Unavailable(f"no server runs in {settings.home}; start one: smelt serve")
        card = server.ask(f"/v1/models/{quote(model)}/{verb}", "POST")
    name = card["alias_of"] or card["id"]
    holders = ", ".join(card["loaded_by"])
    click.echo(f"{name} is loaded by {holders}" if holders else f"{name} is not loaded", err=True)


def loaded_models(settings: Settings) -> set[str] | None:
    """What the running server holds; None where none runs, or it does not say."""
    from smelt.cli.running_server import running_server

    try:
        with running_server(settings) as server:
            cards = None if server is None else server.ask("/v1/models")["data"]
            return None if cards is None else {card["id"] for card in cards if card["loaded_by"]}
    except SmeltError as error:
        click.echo(f"what is loaded is not known: {error}", err=True)
        return None


def memory_rows(config: "DecoderConfig") -> dict[str, str]:
    """What serving takes by dtype: for the weights, and for the cache of 1,000 tokens."""
    from smelt.models.footprint import kv_bytes_per_token, weights_bytes

    kinds = {"float32": (4, False), "bfloat16": (2, False), "int8": (2, True)}
    return {
        f"memory, {name}": f"{size_text(weights_bytes(config, num_bytes, quantized))} of weights, "
        f"{size_text(1000 * kv_bytes_per_token(config, num_bytes))} per 1,000 tokens"
        for name, (num_bytes, quantized) in kinds.items()
    }


def size_text(num_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
