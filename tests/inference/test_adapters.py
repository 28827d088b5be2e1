from pathlib import Path

import pytest
import torch

from adapters import PeftModel
from smelt.errors import AlreadyExists, InvalidInput, UnknownAdapter
from smelt.inference.adapters import AdapterPool
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence
from smelt.models.adapter_folders import read_adapter
from smelt.models.weights import read_model
from smelt.types import SamplingParams

pytestmark = pytest.mark.usefixtures("computed_by")

ADAPTERS = {"a": {"r": 4, "lora_alpha": 8}, "b": {"r": 9, "lora_alpha": 9}}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[5, 9, 2], [7] * 20, [3, 4, 60], [11, 12, 13, 14, 15], [7] * 20, [7] * 20]
NAMES = ["a", "b", None, "a", None, "a"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def peft_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    return PeftModel(request.param, tmp_path_factory.mktemp("base"), ADAPTERS)


def engine_with(peft_model: PeftModel, *names: str, max_step_tokens: int = 512) -> Engine:
    engine = Engine(read_model(peft_model.folder), max_step_tokens=max_step_tokens)
    for name in names:
        engine.adapters.add(name, peft_model.folder_of(name))
    return engine


def greedy_reference(peft_model: PeftModel, prompt: list[int], name: str | None) -> list[int]:
    tokens = list(prompt)
    for _ in range(GREEDY.max_tokens):
        tokens.append(int(peft_model.logits(torch.tensor([tokens]), name)[0, -1].argmax()))
    return tokens[len(prompt) :]


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("max_step_tokens", [512, 8], ids=["whole prompts", "prompts in chunks"])
def test_greedy_answers_in_one_batch_are_peft_s_token_for_token(peft_model: PeftModel, max_step_tokens: int) -> None:
    engine = engine_with(peft_model, "a", "b", max_step_tokens=max_step_tokens)
    sequences = [Sequence(prompt, GREEDY, adapter=name) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
    for sequence in sequences:
        engine.add(sequence)
    finish(engine)
    for sequence in sequences:
        assert sequence.output_ids == greedy_reference(peft_model, sequence.prompt_ids, sequence.adapter)


def test_adapters_come_and_go_while_others_are_answered(peft_model: PeftModel) -> None:
    engine = engine_with(peft_model, "a")
    first = Sequence([7] * 20, GREEDY, adapter="a")
    engine.add(first)
    engine.step()
    engine.adapters.add("b", peft_model.folder_of("b"))
    second = Sequence([7] * 20, GREEDY, adapter="b")
    engine.add(second)
    engine.step()
    assert engine.adapters.names == ["a", "b"]
    finish(engine)
    engine.adapters.remove("a")
    third = Sequence([7] * 20, GREEDY, adapter="b")
    engine.add(third)
    finish(engine)
    expected = {name: greedy_reference(peft_model, [7] * 20, name) for name in ("a", "b")}
    assert [first.output_ids, second.output_ids, third.output_ids] == [expected["a"], expected["b"], expected["b"]]


def test_an_unknown_adapter_is_refused_by_name(peft_model: PeftModel) -> None:
    engine = engine_with(peft_model, "a")
    with pytest.raises(UnknownAdapter, match="no adapter 'c' is loaded; known: a") as failure:
        engine.add(Sequence([1], GREEDY, adapter="c"))
    assert failure.value.param == "adapter"
    with pytest.raises(UnknownAdapter):
        engine.adapters.remove("c")
    with pytest.raises(AlreadyExists):
        engine.adapters.add("a", peft_model.folder_of("a"))


def test_an_answer_does_not_go_on_with_another_adapter_of_the_same_name(peft_model: PeftModel) -> None:
    engine = engine_with(peft_model, "a")
    engine.add(Sequence([1, 2], GREEDY, adapter="a"))
    engine.step()
    engine.adapters.remove("a")
    with pytest.raises(UnknownAdapter, match="known: none"):
        engine.step()
    engine.adapters.add("a", peft_model.folder_of("b"))
    with pytest.raises(UnknownAdapter, match="was replaced"):
        engine.step()


def test_a_replaced_adapter_finds_nothing_of_the_old_one_in_the_cache(peft_model: PeftModel) -> None:
    engine = engine_with(peft_model, "a")
    engine.add(Sequence([7] * 40, GREEDY, adapter="a"))
    finish(engine)
    engine.adapters.remove("a")
    engine.adapters.add("a", peft_model.folder_of("b"))
    again = Sequence([7] * 40, GREEDY, adapter="a")
    engine.add(again)
    finish(engine)
    assert again.num_cached_tokens == 0
    assert again.output_ids == greedy_reference(peft_model, [7] * 40, "b")


def test_there_is_a_limit(peft_model: PeftModel, tmp_path: Path) -> None:
    pool = AdapterPool(read_model(peft_model.folder), max_adapters=1)
    pool.add("a", peft_model.folder_of("a"))
    with pytest.raises(InvalidInput, match="1 adapters are loaded, which is the limit"):
        pool.add("b", peft_model.folder_of("b"))


def test_those_that_come_and_go_make_way_for_each_other_unless_they_are_in_use(peft_model: PeftModel) -> None:
    model = read_model(peft_model.folder)
    pool = AdapterPool(model, max_adapters=2)
    adapter = read_adapter(peft_model.folder_of("a"), model.config)
    for name in ("a", "b"):
        pool.keep(name, adapter, in_use=())
    version = pool.version("a")
    pool.keep("a", adapter, in_use=())
    assert pool.version("a") == version
    pool.keep("c", adapter, in_use=())
    assert pool.names == ["a", "c"]
    pool.keep("d", adapter, in_use=("a", "c"))
    assert pool.names == ["a", "c", "d"]
