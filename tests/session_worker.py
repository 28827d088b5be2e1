"""A worker of sessions on a tiny model, in a process of its own: SOCKET HOME MAX_REPLAY_STEPS [FAULT].

It may be killed. With a fault, POINT:NTH, it kills itself there once.
"""

import asyncio
import sys
from pathlib import Path

import torch

from smelt.cluster import lanes
from smelt.cluster.worker import Worker
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.errors import NotFound
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder
from smelt.storage.faults import fault_from

CONFIG = DecoderConfig(vocab_size=128, block_size=64, n_layer=2, n_head=2, n_embd=16)


def load_tiny(name: str) -> TextModel:
    """The one model that there is."""
    if name != "tiny":
        raise NotFound(f"no model {name!r}")
    decoder = Decoder(CONFIG)
    decoder.initialize(0)
    return TextModel(decoder, ByteTokenizer())


async def _work(address: Path, home: Path, fault: str | None = None) -> None:
    worker = Worker(address, load_tiny, "cpu")
    worker.keep_sessions(home, fault_from(fault, home / ".fault"))
    await worker.run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    lanes.MAX_REPLAY_STEPS = int(sys.argv[3])
    asyncio.run(_work(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[4:]))
