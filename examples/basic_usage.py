"""The Python interface in one page: data, a small model trained on it, and text from that model.

Run it with `python examples/basic_usage.py`. It downloads nothing, takes about 20 seconds on two CPU cores, and
leaves everything in ./out-basic-usage. So short a training gives words and shapes of sentences, not sense.
"""

import shutil

import smelt

OUT_DIR = "out-basic-usage"

# 1. Data: Python's own documentation, in tokens of its own. Made once; the next call finds it again.
dataset = smelt.prepare_data("builtin:pydoc", tokenizer="bpe:1024")
print(f"dataset {dataset.name}: {dataset.split('train').num_tokens:,} tokens to train on")

# 2. Train. Every field of TrainConfig may be given; `smelt train --help` lists them.
shutil.rmtree(OUT_DIR, ignore_errors=True)
summary = smelt.train(
    data_path="builtin:pydoc",
    tokenizer="bpe:1024",
    out_dir=OUT_DIR,
    n_layer=3,
    n_head=4,
    n_embd=128,
    block_size=64,
    batch_size=16,
    max_iters=250,
    max_time=15,  # seconds, whichever comes first
    learning_rate=3e-3,
)
print(f"{summary.step} steps, {summary.tokens_per_second:,.0f} tokens/s")

# 3. Load it (or a name from `smelt models ls`, a Hugging Face folder, "gpt2", "hf:ORG/NAME"), and write.
model = smelt.load(OUT_DIR)
print(f"\nthe model has {model.config.num_parameters:,} parameters\n")
print("generate:", model.generate("The function returns", max_tokens=40, temperature=0.7, top_k=50, seed=1))

# 4. Several samples are computed together.
for number, text in enumerate(model.generate("If the", num_samples=3, max_tokens=20, temperature=0.7, seed=2), start=1):
    print(f"sample {number}:{text!r}")

# 5. Or take the text as it is written, up to a stop string.
print("stream:   ", end="")
for piece in model.stream("class", max_tokens=60, temperature=0.7, seed=3, stop="\n\n"):
    print(piece, end="", flush=True)
print()
