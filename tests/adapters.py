"""Tiny random LoRA adapters made by peft, for parity tests."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families import save_reference

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]


class PeftModel:
    """A transformers model of a family with several adapters; the plain one lies in `folder`."""

    def __init__(self, family: str, folder: Path, adapters: dict[str, dict[str, Any]]) -> None:
        import peft

        self.folder = folder
        self.base = save_reference(family, folder)
        self.names = list(adapters)
        torch.manual_seed(1)
        targets = GPT2_TARGETS if family.startswith("gpt2") else LLAMA_TARGETS
        is_gpt2 = family.startswith("gpt2")
        configs = {
            name: peft.LoraConfig(**{"target_modules": targets, "fan_in_fan_out": is_gpt2, **settings})
            for name, settings in adapters.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, config in configs.items():
                if not hasattr(self, "model"):
                    self.model = peft.PeftModel(self.base, config, adapter_name=name)
                else:
                    self.model.add_adapter(name, config)
        self.model.eval()
        with torch.no_grad():  # B is zero at first, and would change nothing
            for parameter_name, parameter in self.model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.normal_(0, 0.15)

    def folder_of(self, name: str) -> Path:
        """The adapter as peft saves it."""
        self.model.save_pretrained(self.folder / "adapters", selected_adapters=[name])
        return self.folder / "adapters" / name

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, name: str | None) -> Tensor:
        """What the model says with one adapter, or without any."""
        if name is None:
            with self.model.disable_adapter():
                return self.model(tokens_BT).logits
        self.model.set_adapter(name)
        return self.model(tokens_BT).logits
