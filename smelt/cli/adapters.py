"""`smelt adapters`: register, list and remove LoRA adapters; prints, the work is in `control.adapters`."""

from pathlib import Path

import click

from smelt.settings import load_settings

EXAMPLES = """\b
Examples:
  smelt adapters import peft-output polite --model Qwen/Qwen3-0.6B
  smelt adapters ls
  smelt generate polite --prompt "Good morning"
  smelt models merge Qwen/Qwen3-0.6B polite polite-qwen
  smelt adapters rm polite"""


@click.group(epilog=EXAMPLES)
def command() -> None:
    """Register, list and remove LoRA adapters.

    A registered adapter is a model by its own name: a server writes with it, beside its model and others of the same.
    """


@command.command("import", epilog=EXAMPLES)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--model", required=True, help="the registered model that it was trained on")
def import_command(source: Path, name: str, model: str) -> None:
    """Register the adapter in the folder SOURCE, as PEFT or Tinker saves them, under NAME.

    Training by request can go on from it too: load_state("tinker://NAME/sampler_weights/adapter").
    """
    from smelt.control.adapters import base_for, import_adapter
    from smelt.control.models import check_free
    from smelt.models.adapter_folders import read_adapter
    from smelt.models.folders import read_config

    models_folder = load_settings().models
    check_free(name, models_folder)
    base = base_for(model, models_folder)
    read_adapter(source.expanduser(), read_config(base))  # says what is wrong with it, before anything is copied
    import_adapter(source.expanduser(), name, base, models_folder)
    click.echo(f"registered {name}; write with it: smelt generate {name}", err=True)


@command.command("ls")
def list_command() -> None:
    """List the registered adapters, those that fine-tuning has made too."""
    from rich.console import Console

    from smelt.cli.models import PIPE_WIDTH, size_text, table_of
    from smelt.control.adapters import list_adapters

    adapters = list_adapters(load_settings().models)
    if not adapters:
        click.echo("no adapters yet; make one with smelt finetune, or: smelt adapters import FOLDER NAME --model MODEL")
        return
    rows = [
        {
            "name": each.model.name,
            "model": each.base or "gone",
            "rank": "" if each.rank is None else str(each.rank),
            "size": size_text(each.model.num_bytes),
            "from": each.model.origin or "",
        }
        for each in adapters
    ]
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table_of(rows, list(rows[0])), markup=False)


@command.command("rm", epilog="\b\nExample:\n  smelt adapters rm polite")
@click.argument("name")
def remove_command(name: str) -> None:
    """Delete the adapter NAME; the model that it changes stays."""
    from smelt.control.adapters import remove_adapter

    remove_adapter(name, load_settings().models)
    click.echo(f"removed {name}", err=True)
