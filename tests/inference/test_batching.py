"""A sequence gets what it would get alone: in any company, in chunks, from shared prefixes, after preemptions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import PeftModel
from families import save_reference
from smelt.configs import DecoderConfig
from smelt.errors import UnknownAdapter
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence, Status
from smelt.models.batch import NO_ADAPTER, Batch
from smelt.models.decoder import Decoder
from smelt.models.weights import read_model
from smelt.types import SamplingParams

pytestmark = pytest.mark.usefixtures("computed_by")

SYSTEM = [9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 3, 4, 5]
PROMPTS = [
    [5, 9, 2],
    [1],
    [7] * 23,
    SYSTEM,
    [*SYSTEM, 60, 59],
    [*SYSTEM, 60, 59],
    [*SYSTEM, 60, 11, 12, 13, 14, 15],
    [3, 4, 60, 5, 9, 2, 6, 5],
]
# Of 64 tokens at most each: cut into every size of chunk, alone and together, with and without enough blocks.
ENGINES: list[dict[str, Any]] = [
    {"max_running": 1},
    {"max_running": 8},
    {"max_running": 3, "max_step_tokens": 4, "block_size": 4},
    {"max_running": 8, "max_step_tokens": 9, "block_size": 3},
    {"max_running": 8, "block_size": 1},
    {"max_running": 8, "max_step_tokens": 16, "block_size": 8, "num_blocks": 8},
    {"max_running": 8, "block_size": 2, "num_blocks": 40},
]


def make_model(**changes: Any) -> Decoder:
    """Far from the uniform distribution, so that each token depends on the whole context."""
    shape = {"vocab_size": 61, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**shape | changes))
    decoder.initialize(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return decoder


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model()


def run(engine: Engine, sequences: list[Sequence]) -> list[Sequence]:
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(3000):
        if not engine.has_work:
            assert engine.stats.num_blocks_used == 0
            return sequences
        engine.step()
    raise AssertionError("the engine did not come to an end")


def is_same(one: Sequence, other: Sequence) -> bool:
    """Tokens equal, and log-probabilities of answer and prompt too."""
    return (
        one.output_ids == other.output_ids
        and one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        and one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-5)
    )


def count_tokens(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many tokens have gone through the model since."""
    counts: list[int] = []
    forward = model.forward

    def counting(batch: Batch, attend: Any = None) -> torch.Tensor:
        counts.append(batch.tokens.numel())
        return forward(batch, attend)

    monkeypatch.setattr(model, "forward", counting)
    return lambda: sum(counts)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral sliding", "qwen3"])
def test_greedy_output_equals_transformers_in_any_mix(name: str, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path)
    model = read_model(tmp_path)
    greedy = SamplingParams(max_tokens=40, temperature=0.0)
    with torch.inference_mode():
        expected = [
            reference.generate(torch.tensor([p]), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
            for p in PROMPTS
        ]
    for engine in ENGINES:
        sequences = run(Engine(model, **engine), [Sequence(p, greedy) for p in PROMPTS])
        for sequence, ids in zip(sequences, expected, strict=True):
            assert sequence.prompt_ids + sequence.output_ids == ids[0].tolist(), engine


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6, "position": "rope", "n_kv_head": 2}])
def test_tokens_and_logprobs_are_those_of_a_sequence_alone(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    kinds: list[dict[str, Any]] = [{}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 0}, {"num_prompt_logprobs": 3}]

    def sequences() -> list[Sequence]:
        return [
            Sequence(prompt, SamplingParams(**{"max_tokens": 12 + 4 * i, "temperature": 1.1, "seed": i} | kinds[i % 5]))
            for i, prompt in enumerate(PROMPTS)
        ]

    alone = [run(Engine(model), [sequence])[0] for sequence in sequences()]
    for engine in ENGINES:
        together = run(Engine(model, **engine), sequences()[::-1])[::-1]
        assert all(is_same(one, other) for one, other in zip(alone, together, strict=True)), engine


def test_sequences_that_do_not_fit_together_are_preempted_and_go_on(model: Decoder) -> None:
    def sequences() -> list[Sequence]:
        return [Sequence([i, 1, 2], SamplingParams(max_tokens=40, temperature=1.0, seed=i)) for i in range(6)]

    engine = Engine(model, num_blocks=30, block_size=4)
    together = run(engine, sequences())
    assert engine.stats.total_preempted > 3
    for one, other in zip(together, sequences(), strict=True):
        assert is_same(one, run(Engine(model), [other])[0])


def test_samples_of_one_prompt_compute_it_once(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = count_tokens(model, monkeypatch)
    prompt = [*SYSTEM, *SYSTEM, *SYSTEM]  # 39 tokens: two blocks of 16, and 7 tokens of a third
    samples = [Sequence(prompt, SamplingParams(max_tokens=2, temperature=1.0, seed=seed)) for seed in range(8)]
    run(Engine(model), samples)
    # The prompt once, its last token again for each of the others, and the first token of each answer.
    assert computed() == len(prompt) + 7 + 8
    assert [sample.num_cached_tokens for sample in samples] == [0] + [len(prompt) - 1] * 7


@pytest.mark.parametrize("num_tokens", [31, 32, 33, 48, 49])
def test_a_prompt_comes_again_for_its_last_token(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    engine, prompt, greedy = Engine(model), list(range(num_tokens)), SamplingParams(max_tokens=9, temperature=0.0)
    (first,) = run(engine, [Sequence(prompt, greedy)])
    computed = count_tokens(model, monkeypatch)
    (again,) = run(engine, [Sequence(prompt, greedy)])
    assert computed() == 1 + 8
    assert again.num_cached_tokens == num_tokens - 1
    assert is_same(first, again)


def test_a_common_beginning_is_computed_once(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = count_tokens(model, monkeypatch)
    one_token = SamplingParams(max_tokens=1)
    prompts = [[*SYSTEM, *SYSTEM, *SYSTEM, i, i] for i in range(5)]
    sequences = run(Engine(model), [Sequence(prompt, one_token) for prompt in prompts])
    assert computed() == 41 + 4 * (41 - 32)
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 32, 32, 32, 32]


def test_a_conversation_goes_on_from_its_answer(model: Decoder) -> None:
    engine, greedy = Engine(model, block_size=4), SamplingParams(max_tokens=11, temperature=0.0)
    (turn,) = run(engine, [Sequence([1, 2, 3, 4, 5], greedy)])
    (following,) = run(engine, [Sequence([*turn.prompt_ids, *turn.output_ids, 6], greedy)])
    assert following.num_cached_tokens == 12  # of 16: the last token of an answer has not been computed
    assert is_same(following, run(Engine(model), [Sequence(following.prompt_ids, greedy)])[0])


@pytest.mark.parametrize("other", [{"owner": "bob"}, {"owner": "ann", "adapter": "poet"}])
def test_no_prefix_is_shared_across_owners_and_adapters(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    engine, one_token = Engine(model), SamplingParams(max_tokens=1)
    run(engine, [Sequence([7] * 40, one_token, owner="ann")])
    monkeypatch.setattr(engine.adapters, "version", lambda *_: 1)
    monkeypatch.setattr(engine.adapters, "slot", lambda *_: NO_ADAPTER)
    (theirs,) = run(engine, [Sequence([7] * 40, one_token, **other)])
    (own,) = run(engine, [Sequence([7] * 40, one_token, owner="ann")])
    assert (theirs.num_cached_tokens, own.num_cached_tokens) == (0, 39)


def test_what_was_idle_for_longest_is_forgotten_first(model: Decoder) -> None:
    engine, one_token = Engine(model, num_blocks=9, block_size=16), SamplingParams(max_tokens=1)
    first, second, third = ([token] * 48 for token in (1, 2, 3))
    for prompt in (first, second, first, third, [4] * 33):  # the last one drives out three of nine blocks
        run(engine, [Sequence(prompt, one_token)])
    cached = [run(engine, [Sequence(prompt, one_token)])[0].num_cached_tokens for prompt in (first, third)]
    assert cached == [47, 47]
    assert run(engine, [Sequence(second, one_token)])[0].num_cached_tokens < 47


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning(model: Decoder) -> None:
    engine, one_token = Engine(model, num_blocks=4, block_size=4), SamplingParams(max_tokens=1)
    for prompt in ([1] * 15, [2] * 3):
        run(engine, [Sequence(prompt, one_token)])
    assert run(engine, [Sequence([1] * 15, one_token)])[0].num_cached_tokens == 12


@pytest.mark.parametrize("max_step_tokens", [1, 5, 16, 512])
@pytest.mark.parametrize("num_alternatives", [0, 4])
def test_logprobs_of_a_prompt_are_those_of_one_forward_pass(
    model: Decoder, max_step_tokens: int, num_alternatives: int
) -> None:
    prompt = [*SYSTEM, 60, 11, 12, 13, 14, 15]
    engine = Engine(model, max_running=1, max_step_tokens=max_step_tokens, block_size=4)
    run(engine, [Sequence(prompt, SamplingParams(max_tokens=3))])  # what is in the cache spares nothing
    params = SamplingParams(max_tokens=3, num_prompt_logprobs=num_alternatives)
    (sequence,) = run(engine, [Sequence(prompt, params)])
    with torch.inference_mode():
        logprobs = model.logits(model(Batch(torch.tensor([prompt]))))[0].log_softmax(-1)
    expected = [float(logprobs[at, token]) for at, token in enumerate(prompt[1:])]
    assert sequence.prompt_logprobs[0] is None
    assert sequence.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    assert sequence.prompt_top_logprobs[0] == ()
    for at, top in enumerate(sequence.prompt_top_logprobs[1:]):
        best = logprobs[at].topk(num_alternatives)
        assert [token for token, _ in top] == best.indices.tolist()
        assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_of_a_prompt_survive_a_preemption(model: Decoder) -> None:
    asks = SamplingParams(max_tokens=30, num_prompt_logprobs=0, seed=1)
    engine = Engine(model, num_blocks=17, block_size=4, max_step_tokens=6)
    sequences = [Sequence([i, *SYSTEM], asks) for i in range(3)]
    run(engine, sequences)
    assert engine.stats.total_preempted > 0
    for sequence in sequences:
        assert is_same(sequence, run(Engine(model), [Sequence(sequence.prompt_ids, asks)])[0])


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=7),
    owners=st.lists(st.sampled_from(["ann", "bob"]), min_size=7, max_size=7),
    are_live=st.lists(st.booleans(), min_size=7, max_size=7),
    max_tokens=st.integers(1, 30),
    block_size=st.sampled_from([1, 2, 5, 16]),
    max_running=st.integers(1, 7),
    max_step_tokens=st.integers(1, 40),
    spare=st.integers(0, 20),
    aborted=st.dictionaries(st.integers(0, 6), st.integers(0, 25)),
    late=st.dictionaries(st.integers(0, 6), st.integers(0, 25)),
)
def test_any_order_of_coming_and_leaving_gives_the_same_and_leaks_no_block(
    model: Decoder,
    prompts: list[list[int]],
    owners: list[str],
    are_live: list[bool],
    max_tokens: int,
    block_size: int,
    max_running: int,
    max_step_tokens: int,
    spare: int,
    aborted: dict[int, int],
    late: dict[int, int],
) -> None:
    num_blocks = -(-(max(map(len, prompts)) + max_tokens) // block_size) + spare
    engine = Engine(
        model,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        block_size=block_size,
        num_blocks=num_blocks,
    )

    def sequence(index: int) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=index)
        return Sequence(prompts[index], params, owners[index], is_live=are_live[index])

    sequences = [sequence(index) for index in range(len(prompts))]
    for number in range(2000):
        for index, one in enumerate(sequences):
            if late.get(index, 0) == number:
                engine.add(one)
            if aborted.get(index) == number:
                engine.abort(one) if late.get(index, 0) <= number else aborted.update({index: number + 1})
        if number > 60 and not engine.has_work:
            break
        engine.step()
    assert all(one.status is Status.FINISHED for one in sequences)
    assert engine.stats.num_blocks_used == 0
    for index, one in enumerate(sequences):
        (expected,) = run(Engine(model), [sequence(index)])
        num_written = len(one.output_ids)
        assert one.output_ids == expected.output_ids[:num_written]
        assert one.logprobs == pytest.approx(expected.logprobs[:num_written], abs=1e-5)
        assert num_written == max_tokens or one.finish_reason == "aborted"


@pytest.fixture(scope="module")
def peft_model(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    adapters = {"poet": {"r": 4, "lora_alpha": 16}, "clerk": {"r": 3, "lora_alpha": 9}}
    return PeftModel("llama", tmp_path_factory.mktemp("adapters"), adapters)


@pytest.mark.parametrize("engine", ENGINES[:4])
def test_each_sequence_is_written_with_its_own_adapter(peft_model: PeftModel, engine: dict[str, Any]) -> None:
    serving = Engine(read_model(peft_model.folder), **engine)
    for name in peft_model.names:
        serving.adapters.add(name, peft_model.folder_of(name))
    wanted = [None, "poet", "clerk", "poet", None, "clerk", "poet", None]
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
    sequences = run(
        serving, [Sequence(prompt, params, adapter=name) for prompt, name in zip(PROMPTS, wanted, strict=True)]
    )
    for sequence in sequences:
        logits = peft_model.logits(torch.tensor([sequence.prompt_ids + sequence.output_ids]), sequence.adapter)[0]
        logprobs = logits.log_softmax(-1)[len(sequence.prompt_ids) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(logprobs, sequence.output_ids, strict=True)]
        assert sequence.logprobs == pytest.approx(expected, abs=2e-5)


def test_an_adapter_that_was_replaced_leaves_no_prefix(peft_model: PeftModel) -> None:
    engine, one_token = Engine(read_model(peft_model.folder)), SamplingParams(max_tokens=1, temperature=0.0)
    prompt = [7] * 40
    engine.adapters.add("newest", peft_model.folder_of("poet"))
    run(engine, [Sequence(prompt, one_token, adapter="newest")])
    engine.adapters.remove("newest")
    with pytest.raises(UnknownAdapter):
        engine.add(Sequence(prompt, one_token, adapter="newest"))
    engine.adapters.add("newest", peft_model.folder_of("clerk"))
    (sequence,) = run(engine, [Sequence(prompt, one_token, adapter="newest")])
    assert sequence.num_cached_tokens == 0
    expected = peft_model.logits(torch.tensor([prompt]), "clerk")[0, -1].log_softmax(-1)
    assert sequence.logprobs == pytest.approx([float(expected.max())], abs=1e-5)
