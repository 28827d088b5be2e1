"""The contenders of `serving.py`, each in a process of its own: several prompts in, the times of their tokens out.

Reads lines of JSON, {"prompts": [[token, ...], ...], "new": N}, and answers each with {"first": seconds until every
prompt had its first token, "rest": seconds for the N - 1 after it}. Greedy; ends of text are ignored. Imports nothing
of smelt where smelt is not the contender: llama.cpp and vLLM live in environments of their own.

    python serving_contenders.py NAME MODEL_FOLDER THREADS
"""

import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Prompts = list[list[int]]
Run = Callable[[Prompts, int], tuple[float, float]]  # (seconds to the first tokens, seconds for the rest)

NUM_SEQUENCES = 32
CONTEXT = 512


def smelt(quantize: str) -> Callable[[Path, int], Run]:
    """Our engine, without the server around it."""

    def prepare(folder: Path, num_threads: int) -> Run:
        import torch

        from smelt.inference.engine import Engine
        from smelt.inference.sequence import Sequence
        from smelt.models import quantization
        from smelt.models.kernels import start_build
        from smelt.models.weights import read_model
        from smelt.settings import load_settings
        from smelt.types import SamplingParams

        torch.set_num_threads(num_threads)
        start_build(load_settings().kernels)
        engine = Engine(quantization.quantize(read_model(folder, torch.bfloat16), quantize))

        def run(prompts: Prompts, num_new: int) -> tuple[float, float]:
            params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
            sequences = [Sequence(prompt, params) for prompt in prompts]
            start = time.perf_counter()
            for sequence in sequences:
                engine.add(sequence)
            while not all(sequence.output_ids for sequence in sequences):
                engine.step()
            first = time.perf_counter()
            num_early = sum(len(sequence.output_ids) - 1 for sequence in sequences)
            while engine.has_work:
                engine.step()
            # Those whose prompts came early have tokens beyond the first: the rest is timed as if they had not.
            num_rest = len(prompts) * (num_new - 1)
            rest = (time.perf_counter() - first) * num_rest / max(1, num_rest - num_early)
            return first - start, rest

        return run

    return prepare


def transformers(folder: Path, num_threads: int) -> Run:
    """`generate`, as its documentation has it."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    class Clock(StoppingCriteria):  # asked after every token
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run(prompts: Prompts, num_new: int) -> tuple[float, float]:
        tokens, clock = torch.tensor(prompts), Clock()
        start = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock.times[0] - start, clock.times[-1] - clock.times[0]

    return run


def vllm(folder: Path, num_threads: int) -> Run:
    """vLLM's own batching. It tells no times of single tokens, so the first ones are timed by a run of their own."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}"}
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=CONTEXT,
        max_num_seqs=NUM_SEQUENCES,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def seconds(prompts: Prompts, num_new: int) -> float:
        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return time.perf_counter() - start

    def run(prompts: Prompts, num_new: int) -> tuple[float, float]:
        first = seconds(prompts, 1)
        return first, seconds(prompts, num_new) - first

    return run


def llama_cpp(kind: str) -> Callable[[Path, int], Run]:
    """Its C interface with all sequences in one batch, and NumPy's argmax."""

    def prepare(folder: Path, num_threads: int) -> Run:
        import llama_cpp as llama

        file = folder / f"{kind}.gguf"
        write_gguf(folder, file, kind)
        model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = NUM_SEQUENCES * CONTEXT, NUM_SEQUENCES
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = num_threads
        context = llama.llama_init_from_model(model, params)
        batch = llama.llama_batch_init(512, 0, 1)
        vocab_size = read_config(folder)["vocab_size"]

        def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
            """(token, position, sequence, wanted) of each; the likeliest next tokens of those that are wanted."""
            for at, (token, position, sequence, wanted) in enumerate(entries):
                batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.n_tokens = len(entries)
            if llama.llama_decode(context, batch):
                raise SystemExit("llama_decode failed")
            rows = [at for at, entry in enumerate(entries) if entry[3]]
            logits = (llama.llama_get_logits_ith(context, at) for at in rows)
            return [int(np.ctypeslib.as_array(row, (vocab_size,)).argmax()) for row in logits]

        def run(prompts: Prompts, num_new: int) -> tuple[float, float]:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            length = len(prompts[0])
            entries = [
                (token, at, sequence, at == length - 1)
                for sequence, prompt in enumerate(prompts)
                for at, token in enumerate(prompt)
            ]
            start = time.perf_counter()
            newest = [token for at in range(0, len(entries), 512) for token in decode(entries[at : at + 512])]
            first = time.perf_counter()
            for position in range(length, length + num_new - 1):
                newest = decode([(token, position, row, True) for row, token in enumerate(newest)])
            return first - start, time.perf_counter() - first

        return run

    return prepare


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """The same weights as llama.cpp wants them: bf16, or int8 in blocks of 32 with a scale each."""
    import gguf

    config = read_config(folder)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, words in read_bf16(folder):
        target = names.get_name(name, try_suffixes=(".weight",))
        if "q_proj" in name or "k_proj" in name:
            words = interleaved(words, config["head_dim"])
        exact = (words.astype(np.uint32) << 16).view(np.float32)
        if words.ndim == 1:
            writer.add_tensor(target, exact)
        elif kind == "bf16":
            writer.add_tensor(target, words.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            rounded = gguf.quants.quantize(exact, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, rounded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(words: np.ndarray, head_dim: int) -> np.ndarray:
    """The rows of a projection, as llama.cpp pairs the numbers that it rotates."""
    halves = words.reshape(-1, 2, head_dim // 2, words.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(words.shape)


def read_bf16(folder: Path) -> list[tuple[str, np.ndarray]]:
    """Tensors of a safetensors file, as the 16 bits of each number: NumPy has no bf16."""
    raw = np.memmap(folder / "model.safetensors", mode="r")
    (size,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        found.append((name, np.array(raw[start:end]).view(np.uint16).reshape(entry["shape"])))
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


CONTENDERS: dict[str, Callable[[Path, int], Run]] = {
    "smelt bf16": smelt("none"),
    "smelt int8": smelt("int8"),
    "transformers bf16": transformers,
    "llama.cpp bf16": llama_cpp("bf16"),
    "llama.cpp q8_0": llama_cpp("q8_0"),
    "vLLM bf16": vllm,
}


def main() -> None:
    """Answer until the input ends. What libraries and their processes print goes to the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, folder, num_threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    run = CONTENDERS[name](folder, num_threads)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        first, rest = run(asked["prompts"], asked["new"])
        answers.write(json.dumps({"first": first, "rest": rest}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
