"""How many answers differ from those that the same requests get alone: in fp32 none should, in bf16 some do.

    python benchmarks/company.py [--preset nano-llama] [--dtype bfloat16] [--requests 48] [--tokens 64]

A matrix product rounds differently with the number of rows beside it, and a bf16 rounding is large enough to turn a
close decision. The models are random, which makes close decisions more frequent than trained ones do.
"""

import argparse
from pathlib import Path

import torch

from smelt.configs import PRESETS, DecoderConfig
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence
from smelt.models.decoder import Decoder
from smelt.models.devices import DTYPES
from smelt.models.kernels import kernels, start_build
from smelt.settings import Settings
from smelt.types import SamplingParams

VOCAB_SIZE = 4096
SHARPNESS = 4.0  # of the logits: 2.0 nats of surprise per sampled token. The rate of differing answers hangs on it


def main() -> None:
    """Print a line for each way of sampling."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="nano-llama", choices=PRESETS)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    start_build(Path(Settings().kernels))
    print(f"{args.preset}, {args.dtype}, compiled kernels: {'yes' if kernels() else 'no'}")
    model = random_model(args.preset).to(DTYPES[args.dtype])
    for name, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
        alone = [answers(model, [request])[0] for request in requests(args.requests, args.tokens, temperature)]
        together = answers(model, requests(args.requests, args.tokens, temperature))
        report(name, alone, together)


def random_model(preset: str) -> Decoder:
    """One that is about as sure of its next token as a trained model of text."""
    shape = {"block_size": 512} | PRESETS[preset] | {"vocab_size": VOCAB_SIZE}
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**shape))
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.08)
        model.norm.weight.mul_(SHARPNESS)
    return model


def requests(num: int, max_tokens: int, temperature: float) -> list[Sequence]:
    """Prompts of 8 to 200 tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB_SIZE, (8 + 4 * (index % 49),), generator=generator).tolist() for index in range(num)]
    return [
        Sequence(prompt, SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=index))
        for index, prompt in enumerate(prompts)
    ]


def answers(model: Decoder, sequences: list[Sequence]) -> list[Sequence]:
    """The same, finished."""
    engine = Engine(model)
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    return sequences


def report(name: str, alone: list[Sequence], together: list[Sequence]) -> None:
    """How many differ, and how far log-probabilities are from each other while the tokens are the same."""
    pairs = list(zip(alone, together, strict=True))
    num_different = sum(one.output_ids != other.output_ids for one, other in pairs)
    num_tokens, furthest = 0, 0.0
    for one, other in pairs:
        same = [a == b for a, b in zip(one.output_ids, other.output_ids, strict=True)]
        num_same = same.index(False) if False in same else len(same)
        num_tokens += num_same
        gaps = [abs(a - b) for a, b in zip(one.logprobs[:num_same], other.logprobs[:num_same], strict=True)]
        furthest = max([furthest, *gaps])
    surprise = -sum(sum(one.logprobs) for one in alone) / sum(len(one.logprobs) for one in alone)
    per_token = num_different / max(1, num_tokens + num_different)
    print(f"{name}, {surprise:.1f} nats per token: {num_different} of {len(pairs)} answers differ, ", end="")
    print(f"{per_token:.2%} of tokens; log-probabilities until then by {furthest:.1e} at most")


if __name__ == "__main__":
    main()
