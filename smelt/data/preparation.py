"""Datasets made: from a source, from another dataset with another tokenizer, or found where made before.

Streams from the source to the shards: memory does not grow with the data. Knows no settings and no terminal.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path

import numpy as np

from smelt import __version__
from smelt.data.datasets import (
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    TOKENS_AT_ONCE,
    Dataset,
    Manifest,
    dataset_folder,
    file_sha256,
    open_dataset,
    write_manifest,
)
from smelt.data.documents import Documents, OnError, Piece, Reading, Source
from smelt.data.packing import mix
from smelt.data.shards import Shard, SplitWriter, TokenSplit, token_dtype
from smelt.data.sources import Origin, Progress, identity, origin_of
from smelt.data.staging import staged
from smelt.data.tokenizers import Tokenizer, fingerprint, is_learned, make_tokenizer
from smelt.errors import AlreadyExists, DataError, InvalidInput, NotEnoughData
from smelt.types import LOCAL_OWNER

SHARD_TOKENS = 100_000_000
BATCH_CHARS, BATCH_PIECES = 4 << 20, 8192  # handed to the tokenizer at once
MIN_SHARD_TOKENS = 1024
MAX_STEM = 40  # characters of a source's name in the name of a dataset made of it


def _silent(stage: str, num_done: int, num_total: int | None) -> None:
    """The progress of somebody who does not look."""


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """How a dataset is made of its source. `block_size` is what both splits must hold, and one token more."""

    val_fraction: float = 0.1
    shard_tokens: int = SHARD_TOKENS
    errors: OnError = "strict"
    column: str = "text"
    block_size: int = 128

    def __post_init__(self) -> None:
        """InvalidInput where a value makes no sense."""
        if not 0 < self.val_fraction < 1:
            raise InvalidInput(f"val_fraction {self.val_fraction} must lie between 0 and 1, such as 0.1")
        if self.shard_tokens < MIN_SHARD_TOKENS:
            raise InvalidInput(
                f"shard_tokens {self.shard_tokens} is too few: shards hold {MIN_SHARD_TOKENS:,} at least"
            )
        if self.block_size < 1:
            raise InvalidInput(f"block_size {self.block_size} must be at least 1")


DEFAULTS = PrepareOptions()


@dataclass(frozen=True, slots=True)
class Maker:
    """Who has a dataset made, and by which request to a server, if any."""

    owner: str = LOCAL_OWNER
    job: str | None = None


THIS_MACHINE = Maker()


def prepare(
    source: str | Origin,
    datasets_folder: Path,
    name: str,
    *,
    tokenizer: str | Tokenizer = "bpe:4096",
    options: PrepareOptions = DEFAULTS,
    progress: Progress = _silent,
    maker: Maker = THIS_MACHINE,
) -> Dataset:
    """Tokenize a source into a new dataset; it appears under its name when it is complete, or not at all.

    Raises InvalidInput for a bad name, AlreadyExists, NotFound and DataError for the source, TokenizerError,
    NotEnoughData when a split would be shorter than a block, MissingDependency and OutOfSpace.
    """
    folder = dataset_folder(datasets_folder, name)
    origin = origin_of(source) if isinstance(source, str) else source
    with staged(folder) as staging:
        opened = origin.open(staging / "download", progress)
        if isinstance(tokenizer, str):
            tokenizer = _make_tokenizer(tokenizer, opened, options, progress)
        reading = Reading(options.errors, options.column)
        with closing(Splits(staging, tokenizer, options)) as splits:
            documents = _observed(opened, reading, "tokenizing", progress)
            num_documents = splits.write(documents, _assignments(options.val_fraction))
            if num_documents == 0:
                raise DataError(f"{origin.name} holds no text{_skipped(reading)}")
            splits.balance(origin.name)
            shutil.rmtree(staging / "download", ignore_errors=True)
            splits.finish(origin.name, reading, maker)
    return open_dataset(folder)


def _skipped(reading: Reading) -> str:
    if not reading.num_skipped:
        return ""
    return f": all {reading.num_skipped:,} records were skipped, the first because {reading.first_skipped}"


def _make_tokenizer(spec: str, source: Source, options: PrepareOptions, progress: Progress) -> Tokenizer:
    def texts() -> Iterator[str]:
        reading = Reading(options.errors, options.column)
        return (piece.text for piece in _observed(source, reading, "learning the tokenizer", progress))

    return make_tokenizer(spec, texts, source.num_text_bytes)


def _observed(source: Source, reading: Reading, stage: str, progress: Progress) -> Documents:
    num_reported = -1
    for piece in source.read(reading):
        if reading.num_bytes != num_reported:
            num_reported = reading.num_bytes
            progress(stage, num_reported, source.num_bytes)
        yield piece
    progress(stage, reading.num_bytes, source.num_bytes)


def _assignments(val_fraction: float) -> Iterator[bool]:
    """For each document, whether it is for validation: one in each stretch of 1 / val_fraction, chosen by a hash.

    So the fraction holds for few documents too. The first is for training: it may be the only one.
    """
    rarer = min(val_fraction, 1 - val_fraction)  # what is chosen: the documents of the smaller split
    for first in range(0, 2**62, 4096):
        numbers = np.arange(first, first + 4096)
        chosen = np.zeros(4096, bool)
        for stretch in (np.floor(numbers * rarer), np.floor((numbers + 1) * rarer)):
            offset = mix(stretch.astype(np.uint64)).astype(np.float64) / 2.0**64
            chosen |= np.floor((stretch + offset) / rarer) == numbers
        is_val = chosen if rarer == val_fraction else ~chosen
        yield from (is_val & (numbers > 0)).tolist()


# --- Writing both splits ---------------------------------------------------------------------------------


class Splits:
    """The two splits of a dataset while they are written."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, options: PrepareOptions) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.options = options
        dtype = token_dtype(tokenizer.vocab_size)
        self.train = SplitWriter(folder, "train", dtype, options.shard_tokens)
        self.val = SplitWriter(folder, "val", dtype, options.shard_tokens)

    def write(self, documents: Documents, assignments: Iterator[bool]) -> int:
        """Append documents to the splits that `assignments` says, and return how many there were."""
        num_documents, is_first_piece = 0, True
        end = np.array([] if self.tokenizer.eot_id is None else [self.tokenizer.eot_id], np.uint32)
        writer = self.train
        for batch in batches(documents):
            encoded = self.tokenizer.encode_batch([piece.text for piece in batch])
            for piece, tokens in zip(batch, encoded, strict=True):
                if is_first_piece:
                    writer = self.val if next(assignments) else self.train
                    num_documents += 1
                writer.write(tokens, starts_document=is_first_piece)
                if piece.is_last:
                    writer.write(end, starts_document=False)
                is_first_piece = piece.is_last
        return num_documents

    def close(self) -> None:
        """Close the files, whether or not everything was written."""
        self.train.close()
        self.val.close()

    def balance(self, source: str) -> None:
        """Move the tail of one split to the other where that is shorter than a block and its target.

        A single document is cut, so that its last tokens are for validation. NotEnoughData where both splits
        together hold less than two blocks.
        """
        needed = self.options.block_size + 1
        total = self.train.num_tokens + self.val.num_tokens
        if total < 2 * needed:
            raise NotEnoughData(
                f"{source} gives {total:,} tokens, but training and validation need {2 * needed:,}: one block of "
                f"{self.options.block_size:,} and a target behind it in each; add text, or lower --block-size"
            )
        # The end of the last document is not counted, so that a single text is cut where nanoGPT cuts it.
        val_target = total - int((total - 1) * (1 - self.options.val_fraction))
        if self.val.num_tokens < needed:
            _move_tail(self.train, self.val, val_target, needed, self.tokenizer)
        elif self.train.num_tokens < needed:
            _move_tail(self.val, self.train, total - val_target, needed, self.tokenizer)

    def finish(self, source: str, reading: Reading, maker: Maker) -> None:
        """Write the tokenizer and the manifest."""
        self.tokenizer.save(self.folder / TOKENIZER_FOLDER)
        dtype = self.train.dtype
        manifest = Manifest(
            source=source,
            tokenizer=self.tokenizer.name,
            tokenizer_sha256=fingerprint(self.tokenizer),
            vocab_size=self.tokenizer.vocab_size,
            dtype="uint16" if dtype.itemsize == 2 else "uint32",
            shard_tokens=self.options.shard_tokens,
            val_fraction=self.options.val_fraction,
            num_source_bytes=reading.num_bytes,
            num_skipped=reading.num_skipped,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            smelt_version=__version__,
            owner=maker.owner,
            job=maker.job,
            train=_hashed(self.train.tokens()),
            val=_hashed(self.val.tokens()),
        )
        write_manifest(manifest, self.folder)


def batches(documents: Documents) -> Iterator[list[Piece]]:
    """Pieces in lists large enough to keep a tokenizer's threads busy."""
    batch: list[Piece] = []
    num_chars = 0
    for piece in documents:
        batch.append(piece)
        num_chars += len(piece.text)
        if num_chars >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _move_tail(giver: SplitWriter, taker: SplitWriter, target: int, needed: int, tokenizer: Tokenizer) -> None:
    """Move tokens from the end of one split to the end of the other, until that holds `target`.

    Whole documents where that does not move over twice as much; `needed` tokens stay in any case.
    """
    given = giver.tokens()
    num_wanted = min(max(target, needed) - taker.num_tokens, given.num_tokens - needed)
    cut = start = _tail_start(given, num_wanted, needed, tokenizer)
    for document in range(given.document_at(cut), given.num_documents):
        end = given.document_start(document + 1)
        for first in range(start, end, TOKENS_AT_ONCE):
            taker.write(given.read(first, min(first + TOKENS_AT_ONCE, end)), starts_document=first == start)
        start = end
    giver.truncate(cut)


def _tail_start(split: TokenSplit, num_wanted: int, needed: int, tokenizer: Tokenizer) -> int:
    """Where to cut a tail of about `num_wanted` tokens: before a document, else before a character inside one."""
    cut = split.num_tokens - num_wanted
    start = split.document_start(split.document_at(cut))
    if start >= needed and split.num_tokens - start <= 2 * num_wanted:
        return start
    while cut > needed and _is_inside_character(tokenizer.decode_bytes(split.read(cut, cut + 1).tolist())):
        cut -= 1
    return cut


def _is_inside_character(token: bytes) -> bool:
    return 0x80 <= token[0] < 0xC0 if token else False


def _hashed(split: TokenSplit) -> tuple[Shard, ...]:
    return tuple(
        shard.replace(
            sha256=file_sha256(split.folder / f"{shard.name}.bin"),
            index_sha256=file_sha256(split.folder / f"{shard.name}.idx"),
        )
        for shard in split.shards
    )


# --- Datasets that are made when they are needed ---------------------------------------------------------


def dataset_for(
    source: str,
    datasets_folder: Path,
    *,
    tokenizer: str | Tokenizer = "bpe:4096",
    options: PrepareOptions = DEFAULTS,
    progress: Progress = _silent,
) -> Dataset:
    """The dataset of a source with this tokenizer: made at the first call, and found again while nothing changed.

    Raises what `prepare` raises.
    """
    key = [identity(source), _tokenizer_key(tokenizer), options.val_fraction, options.errors, options.column]
    name = f"{_stem(source)}-{_digest(key)}"
    made = _open_if_there(datasets_folder / name)
    if made and min(made.split("train").num_tokens, made.split("val").num_tokens) <= options.block_size:
        name = f"{_stem(source)}-{_digest([*key, options.block_size])}"  # its splits are too short: cut it otherwise
        made = _open_if_there(datasets_folder / name)
    return made or _made_once(
        datasets_folder / name,
        lambda: prepare(source, datasets_folder, name, tokenizer=tokenizer, options=options, progress=progress),
    )


def retokenize(
    dataset: Dataset, tokenizer: str | Tokenizer, datasets_folder: Path, progress: Progress = _silent
) -> Dataset:
    """The same documents in the same splits, in the ids of another tokenizer; the dataset itself if it is the same.

    Made at the first call and found again later. Raises TokenizerError, NotEnoughData and OutOfSpace.
    """
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, lambda: (piece.text for piece in dataset.texts("train")))
    sha256 = fingerprint(tokenizer)
    if sha256 == dataset.manifest.tokenizer_sha256:
        return dataset
    folder = datasets_folder / f"{dataset.name[:MAX_STEM]}-{_digest([dataset.sha256, sha256])}"
    chosen = tokenizer
    return _open_if_there(folder) or _made_once(folder, lambda: _retokenized(dataset, chosen, folder, progress))


def _retokenized(dataset: Dataset, tokenizer: Tokenizer, folder: Path, progress: Progress) -> Dataset:
    old = dataset.manifest
    num_total = sum(shard.num_tokens for shard in (*old.train, *old.val))
    reading = Reading(num_bytes=old.num_source_bytes, num_skipped=old.num_skipped)
    with staged(folder) as staging:
        options = PrepareOptions(old.val_fraction, old.shard_tokens, block_size=1)
        with closing(Splits(staging, tokenizer, options)) as splits:
            for split in SPLITS:
                splits.write(dataset.texts(split), repeat(split == "val"))
                num_done = num_total if split == "val" else dataset.split(split).num_tokens
                progress("tokenizing again", num_done, num_total)
            splits.finish(old.source, reading, Maker(old.owner))
    return open_dataset(folder)


def _made_once(folder: Path, make: Callable[[], Dataset]) -> Dataset:
    try:
        return make()
    except AlreadyExists:  # another process was faster
        return open_dataset(folder)


def _open_if_there(folder: Path) -> Dataset | None:
    return open_dataset(folder) if (folder / MANIFEST_FILE).is_file() else None


def _tokenizer_key(tokenizer: str | Tokenizer) -> str:
    """The spec where it says everything; else what the tokenizer is."""
    if isinstance(tokenizer, str) and (is_learned(tokenizer) or not Path(tokenizer).expanduser().exists()):
        return tokenizer
    made = make_tokenizer(tokenizer, lambda: iter(())) if isinstance(tokenizer, str) else tokenizer
    return fingerprint(made)


def _stem(source: str) -> str:
    """The part of a source that people know it by, fit for a dataset's name."""
    last = re.split(r"[/:]", source.rstrip("/"))[-1] if not source.startswith("hf:") else source[3:]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", last.partition(".")[0]).strip("-_")
    return stem[:MAX_STEM] or "data"


def _digest(key: Iterable[object]) -> str:
    return hashlib.sha256(repr(list(key)).encode("utf-8")).hexdigest()[:8]
