"""Models with an adapter in their weights, against peft's own."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters import PeftModel
from chat_templates import QWEN_3, write_tokenizer
from smelt.data.chat_format import ChatFormat
from smelt.data.tokenizers import load_tokenizer
from smelt.errors import NotFound, UnsupportedModel
from smelt.models.batch import Batch
from smelt.models.loading import load_model
from smelt.models.merging import merge_folders

TOKENS = torch.arange(22).view(2, 11)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_model_is_that_of_peft(family: str, tmp_path: Path) -> None:
    peft_model = PeftModel(family, tmp_path / "base", {"a": {"r": 4, "lora_alpha": 16}})
    adapter = peft_model.folder_of("a")
    merge_folders(peft_model.folder, adapter, tmp_path / "whole")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = peft_model.model.merge_and_unload()(TOKENS).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()(TOKENS).logits
        model, _ = load_model(tmp_path / "whole")
        ours = model.logits(model(Batch(TOKENS)))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)


def test_the_chat_template_and_the_tokenizer_come_along(tmp_path: Path) -> None:
    peft_model = PeftModel("llama", tmp_path / "base", {"a": {"r": 2}})
    write_tokenizer(peft_model.folder, QWEN_3)
    merge_folders(peft_model.folder, peft_model.folder_of("a"), tmp_path / "whole")
    tokenizer = load_tokenizer(tmp_path / "whole")
    assert ChatFormat.of(tmp_path / "whole", tokenizer).has_template


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    llama, gpt2 = (PeftModel(family, tmp_path / family, {"a": {"r": 2}}) for family in ("llama", "gpt2"))
    with pytest.raises(UnsupportedModel):
        merge_folders(llama.folder, gpt2.folder_of("a"), tmp_path / "whole")
    with pytest.raises(NotFound):
        merge_folders(llama.folder, llama.folder, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
