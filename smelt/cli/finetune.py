"""`smelt finetune`: flags and files to a config of the fine-tune recipe, then what to do next; computes nothing."""

from typing import Any

from smelt.cli.config_flags import ConfigCommand, run_values
from smelt.run_configs import FINE_TUNE_SECTIONS, FineTuneConfig

HELP = """Teach a model from examples of what to answer, given as JSON lines.

\b
A line is a conversation, a prompt with its completion, a text, or a preference:
  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
  {"prompt": "2+2=", "completion": "4"}
  {"text": "Once upon a time"}
  {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}

Only what the assistant says, and what follows a prompt, is learned. The result is an adapter (LoRA) beside the model,
unless --lora false trains all of its weights. Every flag is also a key of the --config file; flags win over the file.
A run stops cleanly on Ctrl-C and continues with --init-from resume, exactly as if it had never stopped."""

EXAMPLES = """\b
Examples:
  smelt finetune --model qwen --data chats.jsonl --epochs 3
  smelt finetune --model qwen --data chats.jsonl --valid-data held-out.jsonl --learning-rate 1e-4
  smelt finetune --model gpt2 --data stories.jsonl --lora false --max-length 512
  smelt finetune --model out-qwen-whole --data pairs.jsonl --method dpo --beta 0.1
  smelt finetune --init-from resume --out-dir out-qwen
  smelt models import out-qwen my-qwen      # and it is served under that name"""


def finetune(**flags: Any) -> None:
    """Run the fine-tuning that the flags ask for."""
    from smelt.cli.run_here import run_here, say_what_next
    from smelt.library import run_config

    config = run_config({**run_values(flags), "recipe": "fine-tune"})
    say_what_next(run_here(config), "smelt finetune", "write with it: smelt generate")


command = ConfigCommand(
    FineTuneConfig,
    FINE_TUNE_SECTIONS,
    name="finetune",
    callback=finetune,
    help=HELP,
    epilog=EXAMPLES,
    short_help="Teach a model from conversations, texts or preferences.",
)
