"""Fine-tuning computes what transformers and PEFT compute, learns, resumes to the same bits, and says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import LLAMA_TARGETS
from families import make_reference, save_reference
from ranks import train_on_two_ranks
from smelt.data.characters import ByteTokenizer
from smelt.data.chat_format import ChatFormat
from smelt.data.preparation import PrepareOptions, prepare
from smelt.data.training_examples import Sample, TextExample, samples_of
from smelt.errors import AlreadyExists, ConfigError, DataError, NotFound
from smelt.models.adapter_folders import UNEMBEDDING, Factors, part_of, read_adapter, write_adapter
from smelt.models.decoder import Decoder
from smelt.models.folders import base_of
from smelt.models.loading import load_model
from smelt.models.weights import read_model, write_model
from smelt.run_configs import FineTuneConfig, TrainConfig, resumed_values
from smelt.training.example_batches import ExampleBatches, example_batch
from smelt.training.example_losses import preference, supervised
from smelt.training.fine_tuning import fine_tune, located_examples
from smelt.training.lora_factors import LoraFactors, chosen_parts, fresh_adapter, trained_matrices
from smelt.training.metrics import EvalMetrics, Event, RunSummary
from smelt.training.parallel import Ranks
from smelt.types import Datum
from stopping import stop_at

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "threads": 1,
    "dtype": "float32",
    "device": "cpu",
    "lora_rank": 4,
}


def make_datum(length: int, num_learned: int, seed: int) -> Datum:
    ids = np.random.default_rng(seed).integers(0, 61, length + 1)
    weights = np.zeros(length, np.float32)
    weights[-num_learned:] = 1
    return Datum(ids[:-1].astype(np.int32), {"target_tokens": ids[1:], "weights": weights})


SAMPLES = [Sample(f"line {n}", (make_datum(length, 1 + n, n),)) for n, length in enumerate((9, 4, 17, 9))]
PAIRS = [Sample(f"line {n}", (make_datum(7 + n, 3, n), make_datum(5, 4, 10 + n))) for n in range(3)]


def reference_logprobs(model: Any, datum: Datum) -> Tensor:
    """Of the learned tokens of a datum, alone, by transformers."""
    logits = model(torch.from_numpy(datum.tokens.astype(np.int64))[None]).logits[0]
    targets = torch.from_numpy(datum.inputs["target_tokens"])
    logprobs = torch.log_softmax(logits.float(), dim=-1)[torch.arange(len(targets)), targets]
    return logprobs[torch.from_numpy(datum.inputs["weights"]) > 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral sliding", "qwen3 tied"])
def test_packed_examples_have_transformers_loss_and_gradient(family: str, tmp_path: Path) -> None:
    theirs = save_reference(family, tmp_path)
    expected = -sum(reference_logprobs(theirs, sample.data[0]).sum() for sample in SAMPLES)
    expected.backward()
    ours = read_model(tmp_path)
    batch = example_batch(SAMPLES, CPU)
    total, metrics = supervised(ours, batch)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert batch.num_targets == sum(sample.num_targets for sample in SAMPLES) == 10
    assert 0 <= metrics["accuracy"].item() <= 10
    embedding = next(p for name, p in theirs.named_parameters() if name.endswith(("wte.weight", "embed_tokens.weight")))
    torch.testing.assert_close(ours.embedding.weight.grad, embedding.grad, rtol=1e-4, atol=1e-5)


def test_accuracy_counts_the_likeliest_tokens(tmp_path: Path) -> None:
    save_reference("llama", tmp_path)
    model = read_model(tmp_path)
    datum = make_datum(8, 8, 3)
    with torch.no_grad():
        first = model.logits(model(example_batch([Sample("", (datum,))], CPU).row))[0].argmax(-1).numpy()
    right = first.copy()
    right[:3] = (right[:3] + 1) % 61
    sample = Sample("", (Datum(datum.tokens, {**datum.inputs, "target_tokens": right}),))
    assert supervised(model, example_batch([sample], CPU))[1]["accuracy"].item() == 5


def test_preferences_have_the_loss_of_their_formula_and_its_gradient(tmp_path: Path) -> None:
    theirs, first = save_reference("llama", tmp_path), make_reference("llama", seed=5)
    total = torch.zeros(())
    references = torch.zeros(len(PAIRS), 2)
    for number, pair in enumerate(PAIRS):
        chosen, rejected = (reference_logprobs(theirs, datum).sum() for datum in pair.data)
        with torch.no_grad():
            references[number] = torch.stack([reference_logprobs(first, datum).sum() for datum in pair.data])
        margin = 0.3 * ((chosen - references[number, 0]) - (rejected - references[number, 1]))
        total = total - torch.nn.functional.logsigmoid(margin)
    total.backward()
    ours = read_model(tmp_path)
    batch = example_batch(PAIRS, CPU, references)
    value, metrics = preference(ours, batch, beta=0.3)
    value.backward()
    assert batch.num_targets == len(PAIRS)
    assert value.item() == pytest.approx(total.item(), rel=1e-4)
    assert 0 <= metrics["accuracy"].item() <= len(PAIRS)
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from inside peft
@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj", "mlp"])
def test_an_adapter_has_pefts_gradient_and_is_read_by_peft(targets: str, tmp_path: Path) -> None:
    base = save_reference("llama", tmp_path / "base")
    ours = read_model(tmp_path / "base")
    factors = LoraFactors(ours, fresh_adapter(ours.config, rank=4, alpha=8.0, targets=targets, seed=1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    tensors = {f"lora.{name}": p.detach() for name, p in factors.named_parameters()}
    files = factors.files(str(tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    files.write(tensors, tmp_path / "adapter", lambda *_: None)
    back = files.read(tmp_path / "adapter")
    assert all(torch.equal(tensors[name], back[name]) for name in tensors)
    assert len(back) == len(tensors)

    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    expected = -sum(reference_logprobs(theirs, sample.data[0]).sum() for sample in SAMPLES)
    expected.backward()
    total, _ = supervised(ours, example_batch(SAMPLES, CPU))
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected_names = {"all": LLAMA_TARGETS, "mlp": LLAMA_TARGETS[4:]}.get(targets, targets.split(","))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in gradients} == set(expected_names)
    own = factors.adapter_of({f"lora.{name}": p.grad for name, p in factors.named_parameters()})
    for name, parts in own.items():
        for theirs_name, part in zip(factors.matrices[name].names, parts, strict=True):
            if part is not None:
                key = f"base_model.model.{theirs_name}.lora_%s.default.weight"
                torch.testing.assert_close(part.a, gradients[key % "A"], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(part.b, gradients[key % "B"], rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for name, parameter in ours.named_parameters() if "lora" not in name)


def test_targets_that_the_model_has_not_are_named(tmp_path: Path) -> None:
    save_reference("llama", tmp_path)
    matrices = trained_matrices(read_model(tmp_path).config)
    with pytest.raises(ConfigError, match=r"has no query; it has all, attention, mlp, down_proj"):
        chosen_parts(matrices, "query")
    with pytest.raises(ConfigError, match="names nothing"):
        chosen_parts(matrices, " ,")


def test_each_epoch_sees_every_example_once_and_ranks_share_them() -> None:
    samples = [Sample(f"line {n}", (make_datum(3 + n % 5, 1, n),)) for n in range(12)]
    alone = ExampleBatches(samples, Ranks(), 4, 2, seed=3)
    epochs = [sorted(n for step in range(first, first + 3) for n in alone.numbers(step)) for first in (0, 3)]
    assert epochs == [list(range(12))] * 2
    assert alone.numbers(0) != alone.numbers(3), "the epochs' orders differ"
    shared = ExampleBatches(samples, Ranks(0, 2), 4, 2, seed=3)
    whole = sum(batch.row.tokens.numel() for batch in alone.micro_batches(1, CPU, 0))
    assert whole == alone.size(1).num_tokens
    parts = [sum(b.row.tokens.numel() for b in shared.micro_batches(1, CPU, rank)) for rank in range(2)]
    assert sum(parts) == whole
    assert abs(parts[0] - parts[1]) <= 4
    assert "line " in alone.describe(0)


class Lab:
    """A folder with a tiny model that knows nothing, and examples."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = TrainConfig(n_layer=1, n_head=2, n_embd=32, block_size=64).decoder_config(257)
        model = Decoder(config)
        model.initialize(0)
        write_model(config, model.state_dict(), folder / "models" / "base")
        ByteTokenizer().save(folder / "models" / "base")
        turns = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in [("a", "xyz"), ("b", "uvw"), ("c", "rst")] * 4
        ]
        self.chats = self.write("chats.jsonl", turns)

    def write(self, name: str, lines: list[Any]) -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    def config(self, out: str, **changes: Any) -> FineTuneConfig:
        values = {**TINY, "model": "base", "data": self.chats, "out_dir": str(self.folder / out)}
        return FineTuneConfig(**{**values, **changes})

    def run(self, config: FineTuneConfig, sink: Callable[[Event], None] | None = None) -> RunSummary:
        return fine_tune(config, self.folder / "datasets", self.folder / "models", [sink] if sink else [])

    def resume(self, out: str) -> RunSummary:
        values = resumed_values({"out_dir": str(self.folder / out), "init_from": "resume"})
        return self.run(FineTuneConfig(**values))

    def rows(self, out: str, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / out / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def tensors(self, out: str) -> dict[str, bytes]:
        last = self.folder / out / "last"
        return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.mark.parametrize("lora", [True, False])
def test_it_learns_and_reports_loss_and_accuracy(lab: Lab, lora: bool) -> None:
    changes: dict[str, Any] = {"learning_rate": 3e-2} if lora else {"lora": False, "learning_rate": 3e-3}
    summary = lab.run(lab.config("out", epochs=30, train_val_split=0.25, **changes))
    steps, evaluations = lab.rows("out", "step"), lab.rows("out", "evaluation")
    assert (summary.stop_reason, len(steps)) == ("done", 68), "9 examples, 4 a step, 30 epochs"
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert steps[-1]["figures"]["accuracy"] > steps[0]["figures"]["accuracy"]
    assert evaluations[-1]["final"]
    assert evaluations[-1]["figures"].keys() == {"accuracy"}
    assert lab.rows("out", "start") == [{"kind": "start", "step": 0, "num_steps": 68}]
    names = {path.name for path in (lab.folder / "out" / "best").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names if lora else {"config.json"} <= names


def test_without_a_validation_split_nothing_is_evaluated_and_all_is_learned(lab: Lab) -> None:
    summary = lab.run(lab.config("out", train_val_split=0.0))
    assert summary.val_loss is None
    assert lab.rows("out", "evaluation") == []
    assert (lab.folder / "out" / "last" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": False, "gradient_checkpointing": True},
        {"dropout": 0.1, "gradient_accumulation_steps": 2},
        {"dtype": "bfloat16", "gradient_checkpointing": True},
    ],
)
def test_stopping_and_resuming_gives_the_same_bits(lab: Lab, changes: dict[str, Any]) -> None:
    lab.run(lab.config("whole", **changes))
    assert lab.run(lab.config("parts", **changes), stop_at(4)).stop_reason == "interrupted"
    lab.resume("parts")
    assert lab.tensors("parts") == lab.tensors("whole")
    assert lab.rows("parts", "step")[-1]["loss"] == lab.rows("whole", "step")[-1]["loss"]


@pytest.mark.parametrize("begins_with", ["a model", "an adapter"])
def test_preferences_are_learned_against_the_first_model_also_after_a_resume(lab: Lab, begins_with: str) -> None:
    def line(question: str, better: str, worse: str) -> dict[str, Any]:
        def turn(text: str) -> list[dict[str, str]]:
            return [{"role": "assistant", "content": text}]

        asked = {"messages": [{"role": "user", "content": question}]}
        return {"input": asked, "preferred_output": turn(better), "non_preferred_output": turn(worse)}

    data = lab.write("pairs.jsonl", [line(q, "yes", "no") for q in "abcdefgh"])
    model = str(tuned(lab)) if begins_with == "an adapter" else "base"
    changes: dict[str, Any] = {"model": model, "data": data, "method": "dpo", "train_val_split": 0.25}
    lab.run(lab.config("whole", **changes))
    steps = lab.rows("whole", "step")
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5), "nothing is learned yet"
    assert steps[-1]["loss"] < 0.6
    assert steps[-1]["figures"]["margin"] > 0
    lab.run(lab.config("parts", **changes), stop_at(3))
    lab.resume("parts")
    assert lab.tensors("parts") == lab.tensors("whole")


def test_a_run_goes_on_from_its_adapter_and_its_weights_are_those_of_the_model(lab: Lab) -> None:
    lab.run(lab.config("out"))
    shape = read_model(lab.folder / "models" / "base").config
    adapter = read_adapter(lab.folder / "out" / "last", shape)
    assert {len(factors.a) for parts in adapter.values() for factors in parts if factors} == {4}
    settings = json.loads((lab.folder / "out" / "last" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(lab.folder / "models" / "base")
    with pytest.raises(AlreadyExists, match="already holds a run"):
        lab.run(lab.config("out"))


def test_a_dataset_holds_texts_and_wins_over_a_file_of_its_name(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    source = lab.write("source.jsonl", [{"text": f"line {number}"} for number in range(20)])
    options = PrepareOptions(val_fraction=0.2, block_size=8)
    prepare(source, lab.folder / "datasets", "lines", tokenizer="bytes", options=options)
    lab.write("lines", [{"text": "a file"}])
    train, valid = (located_examples("lines", split, lab.folder / "datasets") for split in ("train", "val"))
    assert {type(each.example) for each in train} == {TextExample}
    assert (len(train) + len(valid), len(valid) > 0) == (20, True)
    assert train[0].where == "lines, document 1"
    (text,) = located_examples("./lines", "train", lab.folder / "datasets")
    assert isinstance(text.example, TextExample)
    assert "a file" in text.example.completion


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "changes"),
    [("none", {}), ("full", {}), ("optimizer", {"lora": False}), ("full", {"method": "dpo", "batch_size": 1})],
)
def test_two_ranks_learn_as_one_process_does(lab: Lab, sharding: str, changes: dict[str, Any]) -> None:
    """With shards both go through as many passes, though 9 examples and 3 of validation are not shared equally."""
    if "method" in changes:
        answers = [("x", "uv"), ("xy", "uvuv"), ("xyz", "u")] * 4
        pairs = [
            {
                "input": {"messages": [{"role": "user", "content": "a"}]},
                "preferred_output": [{"role": "assistant", "content": chosen}],
                "non_preferred_output": [{"role": "assistant", "content": rejected}],
            }
            for chosen, rejected in answers
        ]
        changes = {**changes, "data": lab.write("pairs.jsonl", pairs)}
    changes = {"batch_size": 2, "gradient_accumulation_steps": 5, "train_val_split": 0.25, **changes}
    lab.run(lab.config("one", **changes))
    lab.folder.joinpath("run.json").write_text(lab.config("two", **changes, sharding=sharding).model_dump_json())
    train_on_two_ranks(["--config", str(lab.folder / "run.json")], lab.folder, OMP_NUM_THREADS="1")
    for kind, name in (("step", "loss"), ("evaluation", "val_loss")):
        alone, shared = ([row[name] for row in lab.rows(out, kind)] for out in ("one", "two"))
        assert shared == pytest.approx(alone, abs=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tuned(lab: Lab, out: str = "first", **changes: Any) -> Path:
    """The folder of an adapter that has learned something."""
    lab.run(lab.config(out, epochs=2, learning_rate=3e-2, **changes))
    return (lab.folder / out / "last").resolve()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from inside peft
def test_a_run_on_an_adapter_goes_on_from_it(lab: Lab) -> None:
    old = tuned(lab, lora_alpha=12.0)
    before = contents(old)
    data = lab.write("texts.jsonl", [{"text": text} for text in ("abcdef", "xyz", "hello there")])
    lab.run(lab.config("on", model=str(old), data=data, lora_rank=None, train_val_split=0.0, epochs=3))
    losses = [row["loss"] for row in lab.rows("on", "step")]
    base = transformers.AutoModelForCausalLM.from_pretrained(lab.folder / "models" / "base")
    theirs = peft.PeftModel.from_pretrained(base, str(old)).eval()
    merged, tokenizer = load_model(old, torch.float32)
    located = located_examples(data, "train", lab.folder / "datasets")
    chat_format = ChatFormat.of(lab.folder / "models" / "base", tokenizer)
    samples = samples_of(located, chat_format, tokenizer, 64, 257)
    num_targets = sum(sample.num_targets for sample in samples)
    with torch.no_grad():
        expected = -sum(reference_logprobs(theirs, sample.data[0]).sum().item() for sample in samples)
        assert supervised(merged, example_batch(samples, CPU))[0].item() == pytest.approx(expected, rel=1e-5)
        assert supervised(read_model(base_of(old)), example_batch(samples, CPU))[0].item() != pytest.approx(expected)
    assert losses[0] == pytest.approx(expected / num_targets, abs=1e-5)
    assert losses[-1] < losses[0]
    assert contents(old) == before
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (old, lab.folder / "on/last")]
    assert settings[0] == settings[1], "of the same base, rank, scale and matrices"
    assert contents(lab.folder / "on" / "last")["adapter_model.safetensors"] != before["adapter_model.safetensors"]


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"dropout": 0.1}])
def test_what_goes_on_from_an_adapter_resumes_to_the_same_bits(lab: Lab, changes: dict[str, Any]) -> None:
    changes = {"model": str(tuned(lab)), **changes}
    lab.run(lab.config("whole", **changes))
    assert lab.run(lab.config("parts", **changes), stop_at(4)).stop_reason == "interrupted"
    lab.resume("parts")
    assert lab.tensors("parts") == lab.tensors("whole")


def test_an_adapter_of_lower_precision_is_trained_in_fp32(lab: Lab) -> None:
    old = tuned(lab)
    halved = {name: tensor.half() for name, tensor in load_file(old / "adapter_model.safetensors").items()}
    (lab.folder / "half").mkdir()
    shutil.copy(old / "adapter_config.json", lab.folder / "half")
    save_file(halved, lab.folder / "half" / "adapter_model.safetensors")
    lab.run(lab.config("on", model=str(lab.folder / "half"), learning_rate=0.0))
    made = load_file(lab.folder / "on" / "last" / "adapter_model.safetensors")
    assert made.keys() == halved.keys()
    assert all(torch.equal(made[name], halved[name].float()) for name in made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, r"lora_rank 8 is not the 4 of .*leave it out, or make one model .*smelt models export"),
        ({"lora_alpha": 3.0}, r"lora_alpha 3 is not the 8 of "),
        ({"lora_targets": "all"}, r"lora_targets 'all' are not those of .*leave them out, or make one model"),
        ({"lora_targets": "c_fc"}, r"lora_targets 'c_fc' are not those of "),
    ],
)
def test_an_adapter_of_another_kind_than_the_one_to_go_on_from_is_refused(
    lab: Lab, changes: dict[str, Any], message: str
) -> None:
    old = tuned(lab, lora_targets="mlp")
    lab.run(lab.config("same", model=str(old), lora_rank=4, lora_alpha=8.0, lora_targets="c_fc,mlp", max_iters=1))
    made = read_adapter(lab.folder / "same" / "last", read_model(base_of(old)).config)
    assert {part_of(name) for name in made} == {"mlp"}
    with pytest.raises(ConfigError, match=message):
        lab.run(lab.config("other", model=str(old), **{"lora_rank": None, **changes}))


def test_an_adapter_that_a_run_cannot_train_is_refused(lab: Lab) -> None:
    base = lab.folder / "models" / "base"
    shape = read_model(base).config
    fresh = fresh_adapter(shape, 4, 8.0, "attention", 1)
    of_head = fresh | {UNEMBEDDING: (Factors(torch.ones(4, 32), torch.ones(257, 4), 2.0),)}
    write_adapter(of_head, shape, lab.folder / "head", str(base))
    with pytest.raises(ConfigError, match="head cannot be trained further .*unembedding.*smelt models export"):
        lab.run(lab.config("out", model=str(lab.folder / "head")))
    write_adapter(fresh, shape, lab.folder / "mixed", str(base))
    settings = json.loads((lab.folder / "mixed" / "adapter_config.json").read_text())
    settings["alpha_pattern"] = {"c_proj": 1}
    (lab.folder / "mixed" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="several ranks or scales"):
        lab.run(lab.config("out", model=str(lab.folder / "mixed")))


def test_all_weights_go_on_from_an_adapter_too(lab: Lab) -> None:
    lab.run(lab.config("second", model=str(tuned(lab)), lora=False, epochs=1))
    assert (lab.folder / "second" / "last" / "config.json").is_file()


def test_validation_examples_may_come_from_a_file_of_their_own(lab: Lab) -> None:
    valid = lab.write("valid.jsonl", [{"prompt": "q", "completion": "xyz"}])
    events: list[Event] = []
    lab.run(lab.config("out", valid_data=valid), events.append)
    final = [event for event in events if isinstance(event, EvalMetrics) and event.final]
    assert [event.num_tokens for event in final] == [4]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "nowhere.jsonl"}, NotFound, r"neither a file nor a dataset 'nowhere\.jsonl'; datasets: none"),
        ({"model": "unknown"}, NotFound, "no model or folder 'unknown'"),
        ({"method": "dpo"}, ConfigError, r"chats\.jsonl, line 1 is no preference, and the method is dpo"),
        ({"max_length": 65}, ConfigError, "more than the model's context of 64"),
        ({"max_length": 8}, DataError, r"line 1: .*\n.*line 2: "),
        ({"lora_targets": "q_proj"}, ConfigError, "lora_targets: this model has no q_proj"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(
    lab: Lab, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lab.run(lab.config("out", **changes))


def test_the_loss_takes_the_whole_head_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_reference("llama", tmp_path)
    model = read_model(tmp_path)
    losses = []
    for rows in (1024, 3):
        monkeypatch.setattr("smelt.training.example_losses.HEAD_ROWS", rows)
        model.zero_grad()
        total, _ = supervised(model, example_batch(SAMPLES, CPU))
        total.backward()
        losses.append((total.detach(), model.embedding.weight.grad.clone()))
    torch.testing.assert_close(losses[0], losses[1])
