"""Attention inside a batch: causal, within segments, within a window, and the same however it is computed."""

import pytest
import torch

from smelt.configs import DecoderConfig
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.layers import attend_within, written_out_attention

SHAPE = DecoderConfig(vocab_size=17, block_size=32, n_layer=2, n_head=4, n_embd=32)
GROUPED = SHAPE.replace(
    architecture="llama", position="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=2, bias=False, qkv_bias=False
)


def make_model(config: DecoderConfig) -> Decoder:
    model = Decoder(config)
    model.initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)  # no block is the identity
    return model.eval()


def tokens(num_rows: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(17, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("segmented", [False, True])
def test_written_out_attention_equals_the_fused_one(num_kv_heads: int, segmented: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 24, 8, generator=generator)
    k, v = (torch.randn(3, num_kv_heads, 24, 8, generator=generator) for _ in range(2))
    segment_ids = (torch.arange(24) // 10).expand(3, 24) if segmented else None
    batch = Batch(tokens(3, 24), segment_ids=segment_ids)
    config = GROUPED.replace(n_kv_head=num_kv_heads)
    fused = attend_within(batch, config, 0.0)(0, *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & torch.ones(24, 24).tril().bool()
    torch.testing.assert_close(written_out_attention(q, k, v, mask, 0.0), fused)


@pytest.mark.parametrize("config", [SHAPE, GROUPED], ids=["gpt2", "llama"])
def test_later_tokens_do_not_change_earlier_ones(config: DecoderConfig) -> None:
    model = make_model(config)
    rows = tokens(1, 20)
    changed = rows.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 17
    first, second = model(Batch(rows)), model(Batch(changed))
    assert torch.equal(first[:, :12], second[:, :12])
    assert not torch.allclose(first[:, 12:], second[:, 12:])


@pytest.mark.parametrize("config", [SHAPE, GROUPED], ids=["gpt2", "llama"])
def test_packed_segments_are_as_good_as_rows_of_their_own(config: DecoderConfig) -> None:
    model = make_model(config)
    row = tokens(1, 20)
    segment_ids = torch.tensor([[0] * 7 + [1] * 13])
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None]
    packed = model(Batch(row, positions=positions, segment_ids=segment_ids))
    alone = [model(Batch(row[:, :7])), model(Batch(row[:, 7:]))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_a_window_hides_what_lies_further_back() -> None:
    model = make_model(GROUPED.replace(architecture="mistral", n_layer=1, sliding_window=4))
    row = tokens(1, 16)
    changed = row.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 17
    first, second = model(Batch(row)), model(Batch(changed))
    assert not torch.allclose(first[:, 6], second[:, 6])
    assert torch.equal(first[:, 7:], second[:, 7:])


def test_initial_weights_depend_on_the_seed_alone() -> None:
    one, same, other = Decoder(SHAPE), Decoder(SHAPE), Decoder(SHAPE)
    one.initialize(3)
    same.initialize(3)
    other.initialize(4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert one.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.5 / 32**0.5, rel=0.05)
    assert not one.blocks[0].mlp.down.weight.any(), "a block begins as the identity"


def test_rotary_frequencies_are_not_rounded_with_the_weights() -> None:
    """Rounded to bf16 they would turn far positions by whole radians."""
    exact = make_model(GROUPED)
    rounded = make_model(GROUPED).to(torch.bfloat16)
    far = Batch(tokens(1, 8), positions=torch.arange(2000, 2008)[None])
    for ours, reference in zip(
        rounded._rotary_tables(far, torch.float32), exact._rotary_tables(far, torch.float32), strict=True
    ):
        assert torch.equal(ours, reference)
