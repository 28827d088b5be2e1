"""Sessions: adapters of one frozen model that are trained by request, many of them in one pass; knows no requests' log.

    forward_backward        adds to a session's gradient, and gives the log-probabilities of its targets
    optim_step              one step of AdamW with that gradient, which is then cleared

What a session computes is the same bits whoever else is in the pass, on a CPU with the number of threads unchanged:
see `fixed_tiles`, `packed_data` and `adapter_pass`. One that trains all weights has a copy of the model to itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smelt.errors import InvalidInput, NonFiniteLoss, UnsupportedModel
from smelt.models.adapter_folders import UNEMBEDDING, matrices_of, part_of
from smelt.models.decoder import Decoder
from smelt.models.devices import single_thread
from smelt.models.fixed_tiles import fixed_tiles
from smelt.models.kernels import product_kernels
from smelt.models.linear import Linear
from smelt.training.adapter_pass import AdapterPass, Member
from smelt.training.losses import LOSSES, NEEDED, OPTIONAL, REFERRING, SETTINGS
from smelt.training.packed_data import PackedData, Place, pack
from smelt.training.target_logprobs import HeadAdapter, Wanted, target_logprobs
from smelt.training.trained_adapter import TrainedAdapter
from smelt.training.trained_model import TrainedModel
from smelt.training.trained_weights import OptimSettings, TrainedWeights
from smelt.types import Datum

MAX_PASS_TOKENS = 4096
SMALL = 1 << 21  # weights; the products of such a model are over before a second thread is awake


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Datums to go through one session's model."""

    trained: TrainedAdapter | TrainedModel
    data: Sequence[Datum]
    loss_name: str
    loss_settings: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False
    first_number: int = 0  # of its data, where these are a part of a request


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Of each datum log p of its targets, (N,) or (N, K), and figures under the names of Tinker's clients."""

    logprobs: list[NDArray[np.float32]]
    metrics: dict[str, float]


@dataclass(slots=True, eq=False)
class _Loaded:
    """A datum of a work, with its inputs as tensors; later its log-probabilities and its loss."""

    work: Work
    datum: Datum
    targets: Tensor  # (N, K)
    inputs: dict[str, Tensor | float]
    logprobs: NDArray[np.float32] | None = None
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def adapter(self) -> TrainedAdapter:
        """Its session's, of one that trains an adapter."""
        assert isinstance(self.work.trained, TrainedAdapter), "others do not share a pass"
        return self.work.trained


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    """A datum, or a part of one that sees no other part: what goes through the model as one text."""

    datum: _Loaded
    tokens: NDArray[np.int32]
    targets: Tensor  # (N, K)


class SessionTrainer:
    """All sessions on one model. Belongs to one thread; the model's weights are never changed.

    UnsupportedModel where they are quantized.
    """

    def __init__(self, model: Decoder, *, max_pass_tokens: int = MAX_PASS_TOKENS) -> None:
        self.model = model.requires_grad_(False)
        self.max_pass_tokens = max_pass_tokens
        self._matrices = matrices_of(model.config)
        self._device = model.embedding.weight.device
        head = model.embedding if model.head is None else model.head
        if not isinstance(head, nn.Embedding | Linear):
            raise UnsupportedModel("sessions cannot train on quantized weights; serve the model without --quantize")
        self._head = head.weight
        is_small = sum(weight.numel() for weight in model.parameters()) < SMALL
        self._threads = single_thread if is_small else nullcontext

    def create(
        self, *, rank: int, seed: int, train_attn: bool = True, train_mlp: bool = True, train_unembed: bool = True
    ) -> TrainedAdapter:
        """A new session's adapter, which changes nothing yet. InvalidInput for a rank that cannot be."""
        parts = {"attention": train_attn, "mlp": train_mlp, UNEMBEDDING: train_unembed}
        matrices = {name: matrix for name, matrix in self._matrices.items() if parts[part_of(name)]}
        return TrainedAdapter(self.model.config, matrices, rank, seed, self._device)

    def create_whole(self) -> TrainedModel:
        """A new session's own copy of the model. InvalidInput where there is no memory for it."""
        return TrainedModel(self.model)

    def forward_backward(self, works: Sequence[Work]) -> list[Outcome | Exception]:
        """What came of each work, in order. One that fails takes no other with it, and fails its session's window."""
        loaded: list[list[_Loaded] | Exception] = [self._load(work) for work in works]
        sharing = [each for each in loaded if isinstance(each, list) and each and not _is_whole(each[0].work)]
        with self._threads():
            failure = self._try([datum for each in sharing for datum in each])
            outcomes = [self._finish(work, each, failure) for work, each in zip(works, loaded, strict=True)]
        for work, outcome in zip(works, outcomes, strict=True):
            if isinstance(outcome, Exception) and not work.forward_only:
                work.trained.fail_window()
        return outcomes

    def optim_step(self, trained: TrainedWeights, settings: OptimSettings) -> dict[str, float]:
        """Step with the gradient since the last step; figures. TrainingError where a part of it has failed."""
        with self._threads():
            return trained.step(settings)

    def _finish(self, work: Work, loaded: list[_Loaded] | Exception, failure: Exception | None) -> Outcome | Exception:
        """What came of a work, once those that share passes were tried together."""
        if isinstance(loaded, Exception):
            return loaded
        if _is_whole(work):
            failure = self._try_whole(loaded)
        elif failure is not None:
            failure = self._try(loaded)
        return failure or self._outcome(work, loaded)

    def _try_whole(self, datums: list[_Loaded]) -> Exception | None:
        """Compute one after the other; what went wrong, and then the gradient is void."""
        try:
            for datum in datums:
                model, backward = datum.work.trained, not datum.work.forward_only
                assert isinstance(model, TrainedModel), "that is what is whole"
                self._refer(_referring([datum]))
                with torch.set_grad_enabled(backward):
                    logprobs = [model.logprobs(each.tokens, each.targets) for each in _sequences(datum)]
                    loss = _loss(datum, torch.cat(logprobs))
                    if backward:
                        loss.backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - whatever it was, it is this work's
            return error
        return None

    def _try(self, datums: list[_Loaded]) -> Exception | None:
        """Compute all of them; what went wrong, and then no session's gradient has changed."""
        adapters = {datum.adapter for datum in datums if not datum.work.forward_only}
        before = {adapter: adapter.gradients.clone() for adapter in adapters}
        try:
            for backward in (True, False):
                own = [datum for datum in datums if datum.work.forward_only is not backward]
                for part in self._parts(own):
                    self._compute(part, backward)
        except Exception as error:  # noqa: BLE001 - whatever it was, each work is tried alone next
            for adapter, gradients in before.items():
                adapter.gradients.copy_(gradients)
            return error
        return None

    def _parts(self, datums: list[_Loaded]) -> Iterator[list[_Loaded]]:
        """As many datums at once as there is room for, in order; one at least."""
        part: list[_Loaded] = []
        num_tokens = 0
        for datum in datums:
            if part and num_tokens + len(datum.datum.tokens) > self.max_pass_tokens:
                yield part
                part, num_tokens = [], 0
            part.append(datum)
            num_tokens += len(datum.datum.tokens)
        if part:
            yield part

    def _compute(self, datums: list[_Loaded], backward: bool) -> None:
        """One pass over datums of many sessions."""
        self._refer(_referring(datums))
        sequences = [sequence for datum in datums for sequence in _sequences(datum)]
        packed = self._packed(sequences)
        members = _members(sequences, packed.places)
        adapters = AdapterPass(members, self.model)
        # Within this is backward too: with gradient checkpointing the blocks are computed once more in it.
        with torch.set_grad_enabled(backward), fixed_tiles(adapters.product):
            hidden_NC = self.model(packed.batch(self._device), packed.attend(self.model.config))[0]
            wanted = self._wanted(sequences, packed.places)
            logprobs = target_logprobs(hidden_NC, self._head, wanted, adapters.anchor)
            losses = [_loss(datum, own) for datum, own in zip(datums, _joined(datums, logprobs), strict=True)]
            if backward:
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    def _refer(self, datums: list[_Loaded]) -> None:
        """Give them as `logprobs` what their targets have without an adapter."""
        if not datums:
            return
        sequences = [sequence for datum in datums for sequence in _sequences(datum)]
        packed = self._packed(sequences)
        with torch.no_grad(), fixed_tiles():
            hidden_NC = self.model(packed.batch(self._device), packed.attend(self.model.config))[0]
            wanted = [Wanted(place, s.targets) for s, place in zip(sequences, packed.places, strict=True)]
            logprobs = _joined(datums, target_logprobs(hidden_NC, self._head, wanted))
        for datum, logprobs_NK in zip(datums, logprobs, strict=True):
            datum.inputs["logprobs"] = logprobs_NK.reshape(datum.datum.inputs["target_tokens"].shape)

    def _packed(self, sequences: list[_Sequence]) -> PackedData:
        return pack([sequence.tokens for sequence in sequences], filled_up=product_kernels(self._head) is None)

    def _wanted(self, sequences: list[_Sequence], places: tuple[Place, ...]) -> list[Wanted]:
        heads = {adapter: _head_adapter(adapter, self._head.dtype) for adapter in {s.datum.adapter for s in sequences}}
        return [Wanted(p, s.targets, heads[s.datum.adapter]) for s, p in zip(sequences, places, strict=True)]

    def _load(self, work: Work) -> list[_Loaded] | Exception:
        try:
            numbered = enumerate(work.data, work.first_number)
            return [self._loaded(work, datum, f"datum {number}") for number, datum in numbered]
        except InvalidInput as error:
            return error

    def _loaded(self, work: Work, datum: Datum, place: str) -> _Loaded:
        if work.loss_name not in LOSSES:
            raise InvalidInput(f"unknown loss {work.loss_name!r}; known: {', '.join(LOSSES)}", "loss_fn")
        config = self.model.config
        if max(datum.lengths) > config.block_size:
            raise InvalidInput(
                f"{place} has {max(datum.lengths)} tokens, and the model's context is {config.block_size}"
            )
        _check_ids(datum.tokens, config.vocab_size, f"{place}: the model input")
        needed = NEEDED.get(work.loss_name, ())
        for name in ("target_tokens", *needed):
            if name not in datum.inputs:
                raise InvalidInput(f"{place}: {work.loss_name} needs {name}", name)
        targets = datum.inputs["target_tokens"]
        _check_ids(targets, config.vocab_size, f"{place}: target_tokens")
        inputs: dict[str, Tensor | float] = {
            name: float(value)
            for name, value in work.loss_settings.items()
            if name in SETTINGS and not isinstance(value, str)
        }
        referring = ("logprobs",) if work.loss_name in REFERRING else ()
        for name in (*needed, *referring, *OPTIONAL):
            if name in datum.inputs:
                inputs[name] = self._input(datum, name, place)
        targets_NK = torch.from_numpy(targets.astype(np.int64).reshape(len(datum.tokens), -1)).to(self._device)
        return _Loaded(work, datum, targets_NK, inputs)

    def _input(self, datum: Datum, name: str, place: str) -> Tensor:
        values, targets = datum.inputs[name], datum.inputs["target_tokens"]
        if values.shape != targets.shape:
            raise InvalidInput(
                f"{place}: {name} has the shape {list(values.shape)}, and target_tokens has {list(targets.shape)}", name
            )
        return torch.from_numpy(values.astype(np.float32)).to(self._device)

    def _outcome(self, work: Work, datums: list[_Loaded]) -> Outcome:
        metrics = {"loss:sum": math.fsum(datum.loss for datum in datums)}
        for name in datums[0].metrics if datums else ():
            metrics[f"{name}:mean"] = math.fsum(datum.metrics[name] for datum in datums) / len(datums)
        return Outcome([datum.logprobs for datum in datums if datum.logprobs is not None], metrics)


def _is_whole(work: Work) -> bool:
    return isinstance(work.trained, TrainedModel)


def _loss(datum: _Loaded, logprobs_NK: Tensor) -> Tensor:
    """A datum's loss; what came of it is noted in the datum."""
    logprobs = logprobs_NK if datum.datum.inputs["target_tokens"].ndim == 2 else logprobs_NK[:, 0]
    loss, metrics = LOSSES[datum.work.loss_name](logprobs, datum.inputs)
    if not bool(torch.isfinite(loss)) and not datum.work.forward_only:
        raise NonFiniteLoss(f"the loss of {datum.work.loss_name} is {float(loss)}; look at its inputs")
    datum.logprobs = logprobs.detach().cpu().numpy()
    datum.loss, datum.metrics = float(loss.detach()), {name: float(value) for name, value in metrics.items()}
    return loss


def _head_adapter(adapter: TrainedAdapter, dtype: torch.dtype) -> HeadAdapter | None:
    if UNEMBEDDING not in adapter.factors:
        return None
    [(a, b)], [(a_gradient, b_gradient)] = adapter.factors[UNEMBEDDING], adapter.gradient_factors[UNEMBEDDING]
    return HeadAdapter(a.to(dtype), b.to(dtype), adapter.scale, a_gradient, b_gradient)


def _referring(datums: list[_Loaded]) -> list[_Loaded]:
    """Those that compare with the model as it was, and were not told what it gave."""
    return [datum for datum in datums if datum.work.loss_name in REFERRING and "logprobs" not in datum.inputs]


def _sequences(datum: _Loaded) -> list[_Sequence]:
    """A datum's sequences, which attend to themselves alone."""
    ends = list(accumulate(datum.datum.lengths))
    return [
        _Sequence(datum, datum.datum.tokens[start:end], datum.targets[start:end])
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def _joined(datums: list[_Loaded], logprobs: Sequence[Tensor]) -> list[Tensor]:
    """What each sequence gave, of one datum after the other."""
    parts = iter(logprobs)
    return [torch.cat([next(parts) for _ in datum.datum.lengths]) for datum in datums]


def _members(sequences: list[_Sequence], places: tuple[Place, ...]) -> list[Member]:
    """Each session of the pass, with its sequences in order."""
    own: dict[TrainedAdapter, list[Place]] = {}
    for sequence, place in zip(sequences, places, strict=True):
        own.setdefault(sequence.datum.adapter, []).append(place)
    return [
        Member(adapter.matrices, adapter.rank, adapter.masters, adapter.gradient_factors, adapter.scale, tuple(mine))
        for adapter, mine in own.items()
    ]


def _check_ids(ids: NDArray[np.int32] | NDArray[np.int64] | NDArray[np.float32], vocab_size: int, place: str) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise InvalidInput(f"{place} has token ids outside of 0..{vocab_size - 1}")
