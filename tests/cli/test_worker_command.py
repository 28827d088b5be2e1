"""`smelt worker` as a process: it joins, answers, dies without a word, leaves with one, and comes over TLS."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from certificates import write_certificate
from smelt.cli.worker import command
from smelt.cluster import worker
from smelt.configs import DecoderConfig
from smelt.control.models import set_alias
from smelt.control.workers import Workers
from smelt.data.characters import ByteTokenizer
from smelt.errors import ConfigError, WorkerLost
from smelt.models.decoder import Decoder
from smelt.models.weights import write_model
from smelt.storage.futures import Ledger
from smelt.transport.addresses import server_tls
from smelt.transport.keys import make_key
from smelt.transport.messages import Finish, Generate, TextChunk
from smelt.transport.streams import listen
from smelt.types import SamplingParams
from spine import letting_in, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

ENDLESS = SamplingParams(max_tokens=10_000_000, temperature=1.0)


@pytest.fixture
def model_folder(home: Path) -> Path:
    config = DecoderConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=16)  # no end of text
    decoder = Decoder(config)
    decoder.initialize(0)
    folder = home / "models" / "tiny"
    write_model(config, decoder.state_dict(), folder)
    ByteTokenizer().save(folder)
    return folder


@asynccontextmanager
async def worker_process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "smelt", "worker", *arguments)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def ask(name: str, params: SamplingParams = ENDLESS) -> Generate:
    return Generate(name, "ann", "tiny", "Hello", params=params)


@pytest.mark.slow
async def test_killed_in_the_middle_of_an_answer_it_is_missed_and_the_next_one_goes_on(
    ledger: Ledger, socket_file: Path, model_folder: Path
) -> None:
    workers = Workers(ledger, patience_s=60)
    async with letting_in(workers, ledger, socket_file):
        async with worker_process("--connect", str(socket_file), "--preload", "tiny") as victim:
            answer = workers.generate(ask("lost"))
            assert isinstance(await anext(answer), TextChunk)
            assert workers.workers[0].name.endswith(f":{victim.pid}")
            os.kill(victim.pid, signal.SIGKILL)
            with pytest.raises(WorkerLost):
                [piece async for piece in answer]
            await until(lambda: not workers.workers)
        async with worker_process("--connect", str(socket_file)) as process:
            short = ask("short", SamplingParams(max_tokens=5))
            assert [piece async for piece in workers.generate(short)][-1] == Finish("short", "length", 5, 5)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


@pytest.mark.slow
async def test_it_comes_from_elsewhere_with_tls_and_the_key(
    ledger: Ledger, model_folder: Path, home: Path, tmp_path: Path
) -> None:
    workers = Workers(ledger, patience_s=60)
    certificate, private_key = write_certificate(tmp_path / "tls", "127.0.0.1")
    tls, key = server_tls(certificate, private_key), make_key(home / "worker.key")
    listening = listen("127.0.0.1:0", workers.serve, key=key, tls=tls, next_epoch=ledger.open_epoch)
    async with listening as address, worker_process("--connect", str(address), "--tls-certificate", str(certificate)):
        short = ask("short", SamplingParams(max_tokens=5))
        assert [piece async for piece in workers.generate(short)][-1] == Finish("short", "length", 5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--connect", "nowhere"], "is no HOST:PORT"),
        (["--connect", "10.0.0.5:8001"], "give --tls-certificate FILE"),
        (["--connect", "10.0.0.5:8001", "--tls-certificate", "x.pem"], "cannot read the worker key"),
    ],
)
def test_mistakes_are_named(home: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_model_is_preloaded_by_its_alias_under_its_own_name(
    home: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_alias("short", "tiny", home / "models")
    preloaded: list[str | None] = []

    async def run_worker(_settings: object, _address: object, preload: str | None, *_door: object) -> None:
        preloaded.append(preload)

    monkeypatch.setattr(worker, "run_worker", run_worker)
    for given in ("short", "tiny", str(model_folder)):
        CliRunner().invoke(command, ["--preload", given], catch_exceptions=False)
    assert preloaded == ["tiny", "tiny", str(model_folder)]
