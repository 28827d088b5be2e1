"""`smelt models`: list, show, import, export and remove models; prints tables, the work is in `control.models`."""

from pathlib import Path

import click

from smelt.settings import load_settings

EXAMPLES = """\b
Examples:
  smelt models ls
  smelt models show shakespeare
  smelt models import hf:Qwen/Qwen3-0.6B qwen
  smelt models import nanoGPT/out-shakespeare-char shakespeare
  smelt models export out my-model-for-transformers
  smelt models rm shakespeare"""


@click.group(epilog=EXAMPLES)
def command() -> None:
    """List, show, import, export and remove models."""


@command.command("ls")
def list_command() -> None:
    """List the registered models."""
    from rich.console import Console
    from rich.table import Table

    from smelt.control.models import list_models

    models = list_models(load_settings().models)
    if not models:
        click.echo("no models yet; make one with smelt train, or: smelt models import SOURCE NAME")
        return
    table = Table("name", "architecture", box=None, pad_edge=False)
    for heading in ("parameters", "context", "size"):
        table.add_column(heading, justify="right")
    table.add_column("tokenizer")
    table.add_column("from", overflow="fold")
    for model in models:
        shape = ("unusable, see show", "", "")
        if model.config is not None:
            shape = (model.config.architecture, f"{model.config.num_parameters:,}", f"{model.config.block_size:,}")
        table.add_row(model.name, *shape, size_text(model.num_bytes), model.tokenizer or "none", model.origin or "")
    Console().print(table)


@command.command("show", epilog="\b\nExample:\n  smelt models show out")
@click.argument("model")
def show_command(model: str) -> None:
    """Show the shape, size, tokenizer and origin of MODEL, a name or a folder."""
    from rich.console import Console
    from rich.table import Table

    from smelt.control.models import show_model

    info = show_model(model, load_settings().models)
    rows: dict[str, object] = {"name": info.name, "folder": info.folder, "size": size_text(info.num_bytes)}
    if info.problem is not None:
        rows["problem"] = info.problem
    if info.config is not None:
        rows |= {"parameters": f"{info.config.num_parameters:,}", "tokenizer": info.tokenizer or "none"}
        rows |= {name: value for name, value in info.config.model_dump().items() if value is not None}
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

    Weights (safetensors), config and tokenizer are copied; code and pickles are not.
    """
    from smelt.control.models import import_model, new_model
    from smelt.models.registry import check_name, resolve

    check_name(name)
    models_folder = load_settings().models
    path = resolve(source, models_folder)
    origin = source if source.startswith("hf:") else str(path)
    if path.is_file():
        from smelt.models.loading import convert_nanogpt

        with new_model(name, models_folder, origin) as folder:
            convert_nanogpt(path, folder)
    else:
        import_model(path, name, models_folder, origin)
    click.echo(f"imported {name}; write with it: smelt generate {name}", err=True)


@command.command("export", epilog="\b\nExample:\n  smelt models export out my-model-for-transformers")
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
def export_command(model: str, folder: Path) -> None:
    """Write MODEL, a name or a folder, as a new Hugging Face FOLDER that transformers loads."""
    from smelt.control.models import export_model, new_export
    from smelt.models.registry import resolve

    models_folder = load_settings().models
    path = resolve(model, models_folder)
    if path.is_file():
        from smelt.models.loading import convert_nanogpt

        with new_export(folder) as target:
            convert_nanogpt(path, target)
    else:
        export_model(path, folder)
    click.echo(f"exported to {folder}", err=True)


@command.command("rm", epilog="\b\nExample:\n  smelt models rm shakespeare")
@click.argument("name")
def remove_command(name: str) -> None:
    """Delete the registered model NAME; folders elsewhere are never touched."""
    from smelt.control.models import remove_model

    remove_model(name, load_settings().models)
    click.echo(f"removed {name}", err=True)


def size_text(num_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
