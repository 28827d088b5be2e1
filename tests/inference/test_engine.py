from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_reference, save_reference
from smelt.configs import DecoderConfig
from smelt.errors import InvalidInput
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence, Status
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.weights import read_model
from smelt.types import SamplingParams

pytestmark = pytest.mark.usefixtures("computed_by")

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
PROMPTS = [[5, 9, 2], [1], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7], [3, 4, 60], [11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=61, block_size=64, n_layer=2, n_head=4, n_embd=32))
    decoder.initialize(0)
    with torch.no_grad():  # far from the uniform distribution, so that tokens depend on the context
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return decoder


def run(engine: Engine, sequences: list[Sequence]) -> list[Sequence]:
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(1000):
        if not engine.has_work:
            return sequences
        engine.step()
    raise AssertionError("the engine did not come to an end")


@torch.inference_mode()
def greedy_reference(reference: Any, prompt: list[int], num_tokens: int) -> list[int]:
    output = reference.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return list(output[0, len(prompt) :].tolist())


@torch.inference_mode()
def logprobs_without_cache(model: Decoder, sequence: Sequence) -> list[float]:
    tokens = torch.tensor([sequence.prompt_ids + sequence.output_ids])
    logprobs = model.logits(model(Batch(tokens))).log_softmax(-1)[0]
    start = len(sequence.prompt_ids) - 1
    return [float(logprobs[start + i, token]) for i, token in enumerate(sequence.output_ids)]


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama 3 rope", "mistral sliding", "qwen2", "qwen3"])
def test_greedy_output_equals_transformers_token_for_token(name: str, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path)
    engine = Engine(read_model(tmp_path), max_running=3)
    for sequence in run(engine, [Sequence(prompt, GREEDY) for prompt in PROMPTS]):
        assert sequence.output_ids == greedy_reference(reference, sequence.prompt_ids, 20)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral sliding", "qwen3"])
def test_logprobs_are_those_of_a_forward_pass_without_cache(name: str, tmp_path: Path) -> None:
    make_reference(name).save_pretrained(tmp_path)
    decoder = read_model(tmp_path)
    params = SamplingParams(max_tokens=30, temperature=1.3, top_k=20, top_p=0.9, seed=4)
    for sequence in run(Engine(decoder, max_running=3), [Sequence(prompt, params) for prompt in PROMPTS]):
        expected = logprobs_without_cache(decoder, sequence)
        assert sequence.logprobs == pytest.approx(expected, abs=1e-5)


def test_an_answer_does_not_depend_on_its_company(model: Decoder) -> None:
    def sequences() -> list[Sequence]:
        kinds: list[dict[str, Any]] = [
            {},
            {"top_k": 7},
            {"top_p": 0.8},
            {"top_k": 30, "top_p": 0.7},
            {"temperature": 0},
        ]
        return [
            Sequence(prompt, SamplingParams(**{"max_tokens": 10 + 5 * i, "temperature": 1.1, "seed": i, **kind}))
            for i, (prompt, kind) in enumerate(zip(PROMPTS, kinds, strict=True))
        ]

    alone = [run(Engine(model, max_running=1), [sequence])[0] for sequence in sequences()]
    for max_running in (2, 3, 8):
        together = run(Engine(model, max_running=max_running), sequences()[::-1])[::-1]
        for one, other in zip(alone, together, strict=True):
            assert one.output_ids == other.output_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_seeds_decide(model: Decoder) -> None:
    def output(seed: int | None) -> list[int]:
        return run(Engine(model), [Sequence([1, 2], SamplingParams(max_tokens=30, temperature=1.0, seed=seed))])[
            0
        ].output_ids

    assert output(1) == output(1)
    assert output(1) != output(2)
    assert output(None) != output(None)


def test_a_sequence_may_join_while_others_run(model: Decoder) -> None:
    engine = Engine(model, max_running=2)
    early = Sequence(PROMPTS[0], GREEDY)
    engine.add(early)
    engine.step()
    engine.step()
    late = Sequence(PROMPTS[2], GREEDY)
    produced = run(engine, [late])
    assert produced[0].output_ids == run(Engine(model), [Sequence(PROMPTS[2], GREEDY)])[0].output_ids
    assert early.output_ids == run(Engine(model), [Sequence(PROMPTS[0], GREEDY)])[0].output_ids


def test_step_reports_each_new_token_once_in_order(model: Decoder) -> None:
    engine = Engine(model, max_running=2)
    sequences = [Sequence(prompt, GREEDY) for prompt in PROMPTS]
    for sequence in sequences:
        engine.add(sequence)
    heard: dict[int, list[int]] = {id(sequence): [] for sequence in sequences}
    while engine.has_work:
        for sequence, token in engine.step():
            heard[id(sequence)].append(token)
    assert [heard[id(sequence)] for sequence in sequences] == [sequence.output_ids for sequence in sequences]
    assert engine.step() == []


def test_the_first_to_come_are_the_first_to_run(model: Decoder) -> None:
    engine = Engine(model, max_running=2)
    sequences = [Sequence([1], SamplingParams(max_tokens=2)) for _ in range(5)]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    assert [s.status for s in sequences] == [Status.RUNNING] * 2 + [Status.WAITING] * 3
    engine.step()
    engine.step()
    assert [s.status for s in sequences] == [Status.FINISHED] * 2 + [Status.RUNNING] * 2 + [Status.WAITING]


def test_max_tokens_and_stop_tokens_and_the_context_end_a_sequence(model: Decoder) -> None:
    (free,) = run(Engine(model), [Sequence([1], GREEDY)])
    assert (len(free.output_ids), free.finish_reason) == (20, "length")
    token = free.output_ids[4]
    first = free.output_ids.index(token)
    stopping = SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=frozenset({token}))
    (stopped,) = run(Engine(model), [Sequence([1], stopping)])
    assert stopped.output_ids == free.output_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    (full,) = run(Engine(model), [Sequence([1] * 60, GREEDY)])
    assert (full.num_tokens, full.finish_reason) == (64, "length")


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_frees_the_blocks_at_once_and_leaves_the_others_alone(model: Decoder, num_steps: int) -> None:
    engine = Engine(model, max_running=3)
    sequences = [Sequence(prompt, GREEDY) for prompt in PROMPTS]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(num_steps):
        engine.step()
    num_used = engine.stats.num_blocks_used
    engine.abort(sequences[0])
    engine.abort(sequences[4])
    assert engine.stats.num_blocks_used == max(0, num_used - 1)
    assert sequences[0].finish_reason == sequences[4].finish_reason == "aborted"
    assert len(sequences[0].output_ids) == num_steps
    run(engine, [])
    assert engine.stats.num_blocks_used == 0
    for sequence in sequences[1:4]:
        assert sequence.output_ids == run(Engine(model), [Sequence(sequence.prompt_ids, GREEDY)])[0].output_ids
    engine.abort(sequences[1])
    assert sequences[1].finish_reason == "length"


def test_an_answer_may_fill_many_blocks() -> None:
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(vocab_size=61, block_size=300, n_layer=1, n_head=2, n_embd=16))
    decoder.initialize(1)
    params = SamplingParams(max_tokens=290, temperature=1.0, seed=0)
    sequences = run(
        Engine(decoder, max_running=2), [Sequence([1, 2], params), Sequence([3], SamplingParams(max_tokens=40))]
    )
    assert len(sequences[0].output_ids) == 290
    assert sequences[0].logprobs == pytest.approx(logprobs_without_cache(decoder, sequences[0]), abs=1e-5)


def test_after_a_failed_step_all_go_on_to_the_same_answers(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def sequences() -> list[Sequence]:
        return [
            Sequence(prompt, SamplingParams(max_tokens=20, temperature=1.0, seed=i)) for i, prompt in enumerate(PROMPTS)
        ]

    engine, broken = Engine(model, max_running=4, max_step_tokens=9), sequences()
    for sequence in broken:
        engine.add(sequence)
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as patched:
        patched.setattr("smelt.inference.engine.sample", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.reset()
    assert (engine.stats.num_blocks_used, engine.stats.num_running) == (0, 0)
    engine.remove(broken[1])
    run(engine, [])
    assert (broken[1].status, len(broken[1].output_ids) < 20) == (Status.WAITING, True)
    run(engine, [broken[1]])
    for sequence, expected in zip(broken, run(Engine(model), sequences()), strict=True):
        assert sequence.output_ids == expected.output_ids
        assert sequence.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_grammar_hears_of_each_token_but_the_stop(model: Decoder) -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[int] = []

        def fill(self, mask: torch.Tensor) -> None:
            mask.fill_(-1)

        def accept(self, token: int) -> None:
            self.heard.append(token)

    (free,) = run(Engine(model), [Sequence([1], GREEDY)])
    stop = free.output_ids[-1]
    first = free.output_ids.index(stop)
    for block_size, num_blocks in ((16, 100), (1, 25)):  # the second has to preempt, and tells nothing twice
        engine = Engine(model, block_size=block_size, num_blocks=num_blocks)
        params = SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=frozenset({stop}))
        sequences = [Sequence([1], params, grammar=Listener()) for _ in range(2)]
        for sequence in run(engine, sequences):
            assert isinstance(sequence.grammar, Listener)
            assert sequence.grammar.heard == free.output_ids[:first]


def test_stats_tell_what_is_going_on(model: Decoder) -> None:
    engine = Engine(model, max_running=2, num_blocks=12, block_size=4, max_step_tokens=10)
    for _ in range(2):
        engine.add(Sequence([1] * 9, SamplingParams(max_tokens=40, seed=0)))
    engine.add(Sequence([2] * 5, SamplingParams(max_tokens=2, seed=0)))
    engine.step()
    expected = {"num_running": 2, "num_waiting": 1, "num_blocks": 12, "num_blocks_used": 5, "batch_size": 10}
    assert {name: getattr(engine.stats, name) for name in expected} == expected
    run(engine, [])
    expected = {"num_running": 0, "num_waiting": 0, "num_blocks_used": 0, "total_prompt_tokens": 23}
    assert {name: getattr(engine.stats, name) for name in expected} == expected
    assert engine.stats.total_cached_tokens == 8
    assert engine.stats.total_preempted > 0


def test_a_cache_is_as_large_as_it_is_told(model: Decoder) -> None:
    bytes_per_token = 2 * 2 * 32 * 4  # keys and values of two layers, each 32 wide, in fp32
    assert Engine(model, kv_bytes=100 * bytes_per_token).stats.num_blocks == 6
    assert Engine(model, max_running=3).stats.num_blocks == 3 * 4
    with pytest.raises(InvalidInput, match="a cache of 1000 bytes does not hold 16 tokens of this model, .* 8192;"):
        Engine(model, kv_bytes=1000)


def test_what_never_fits_into_the_cache_is_refused_and_the_rest_is_cut(model: Decoder) -> None:
    engine = Engine(model, num_blocks=5, block_size=4)
    with pytest.raises(InvalidInput, match="the prompt has 20 tokens, but the cache holds 5 blocks of 4 tokens"):
        engine.add(Sequence([1] * 20, GREEDY))
    (sequence,) = run(engine, [Sequence([1] * 15, GREEDY)])
    assert (sequence.num_tokens, sequence.finish_reason) == (20, "length")


def test_ids_beyond_the_tokenizer_are_never_drawn(model: Decoder) -> None:
    params = SamplingParams(max_tokens=60, temperature=5.0, seed=0)
    (sequence,) = run(Engine(model, vocab_size=7), [Sequence([1], params)])
    assert max(sequence.output_ids) < 7
    assert set(sequence.output_ids) == set(range(7))


def test_a_prompt_has_none_of_the_ids_beyond_the_tokenizer_s(model: Decoder) -> None:
    with pytest.raises(InvalidInput, match=r"outside of 0\.\.6"):
        Engine(model, vocab_size=7).add(Sequence([1, 7], SamplingParams()))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "no tokens"),
        ([1] * 64, {}, "64 tokens, but the model's context is 64"),
        ([61], {}, r"outside of 0\.\.60"),
        ([-1], {}, r"outside of 0\.\.60"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ([1], {"temperature": -0.5}, "not -0.5"),
        ([1], {"temperature": float("nan")}, "not nan"),
        ([1], {"top_k": 0}, "top_k must be at least 1"),
        ([1], {"top_p": 0.0}, "top_p must be above 0"),
        ([1], {"top_p": 1.5}, "not 1.5"),
        ([1], {"stop": ("",)}, "empty stop string"),
    ],
)
def test_what_cannot_run_is_refused_with_its_value(
    model: Decoder, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    engine = Engine(model)
    with pytest.raises(InvalidInput, match=message):
        engine.add(Sequence(prompt, SamplingParams(**params)))
    assert not engine.has_work
