"""What those who train by plain HTTP send: conversations, losses, steps, names of adapters; knows no route.

Tokens of an answer that was sampled may take the place of the assistant's last turn: `loss_fn_inputs` then has
`target_tokens`, and a value of each of its other lists for each of these tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import Field

from smelt.api.tinker_types import TinkerBody
from smelt.control.adapters_in_training import RANK, LossRequest, Wanted
from smelt.data.chat import parse_messages
from smelt.errors import DataError, InvalidInput, TooLarge
from smelt.models.aliases import DEFAULT
from smelt.transport.operations import OptimStep
from smelt.types import ASSISTANT, ChatExample, ChatMessage, Conversation

MAX_EXAMPLES = 4096  # of a request
ALPHA = 32  # every adapter's
MAX_TURNS = 8192  # of all examples of a request: each of the assistant's is rendered with what came before it
PADDING = -100  # fills lists of tokens up
TARGETS = "target_tokens"
TOKEN_INPUTS = ("logprobs", "advantages", "weights", "sequence_ratio_mask")
# What a loss needs of each token that was sampled.
NEEDED = dict.fromkeys(("importance_sampling", "ppo", "cispo", "dro", "gspo"), (TARGETS, "logprobs", "advantages"))
PREFERENCES = "dpo"

Name = Annotated[str, Field(min_length=1, max_length=256)]
Seed = Annotated[int | None, Field(ge=0, lt=2**63)]  # of an adapter's first weights; None: drawn
TokenLists = dict[str, list[list[float]]]


class ForwardBackwardBody(TinkerBody):
    """Learn from conversations; an adapter that is not there is made."""

    model_id: Name
    data: Annotated[list[Any], Field(min_length=1, max_length=MAX_EXAMPLES)]
    loss_fn: str = "cross_entropy"
    loss_fn_inputs: TokenLists | None = None
    loss_fn_config: dict[str, float] = {}
    base_model: str = DEFAULT
    rank: Annotated[int, Field(ge=1)] = RANK
    seed: Seed = None
    forward_only: bool = False

    def wanted(self) -> Wanted:
        """The adapter, where it is to be made."""
        return Wanted(self.base_model, self.rank, self.seed)

    def loss(self) -> LossRequest:
        """What is asked for. InvalidInput names the example that is wrong."""
        inputs = self.loss_fn_inputs or {}
        _check_inputs(self.loss_fn, inputs, len(self.data))
        examples = tuple(_numbered(number, given, inputs, self.loss_fn) for number, given in enumerate(self.data))
        _check_turns(examples)
        return LossRequest(examples, self.loss_fn, self.loss_fn_config, self.forward_only)


class AdamBody(TinkerBody):
    """AdamW's numbers."""

    learning_rate: Annotated[float, Field(ge=0)] = 5e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(ge=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0


class StepBody(TinkerBody):
    """A step of the optimizer."""

    model_id: Name
    adam_params: AdamBody = AdamBody()

    def step(self) -> OptimStep:
        """The step."""
        return OptimStep(**self.adam_params.model_dump())


class AddBody(TinkerBody):
    """Make an adapter, under a name of its own or one that is made up."""

    base_model: str = DEFAULT
    rank: Annotated[int, Field(ge=1)] = RANK
    seed: Seed = None
    alpha: float = ALPHA
    model_id: Name | None = None

    def wanted(self) -> Wanted:
        """The adapter. InvalidInput for a scale that none has."""
        if self.alpha != ALPHA:
            raise InvalidInput(f"alpha is {ALPHA} for every adapter here, not {self.alpha:g}; leave it out", "alpha")
        return Wanted(self.base_model, self.rank, self.seed)


class AdapterBody(TinkerBody):
    """An adapter."""

    model_id: Name | None = None
    adapter_id: Name | None = None

    def name(self) -> str:
        """What it is called. InvalidInput where that is not said."""
        name = self.model_id or self.adapter_id
        if name is None:
            raise InvalidInput("model_id is missing", "model_id")
        return name


class MergeBody(TinkerBody):
    """Make a model of an adapter and its base model, under a name of its own."""

    model_id: Name
    name: Name


class SaveNamedBody(TinkerBody):
    """Save an adapter's weights under a name."""

    model_id: Name
    name: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False


class LoadNamedBody(TinkerBody):
    """Go on from weights that were saved."""

    model_id: Name
    path: str
    optimizer: bool = True


def _check_inputs(loss_name: str, inputs: TokenLists, num_examples: int) -> None:
    """InvalidInput where lists are missing, unknown, or of another number of examples."""
    for name in NEEDED.get(loss_name, ()):
        if name not in inputs:
            raise InvalidInput(
                f"{loss_name} needs loss_fn_inputs.{name}: a list for each of the data", "loss_fn_inputs"
            )
    for name, lists in inputs.items():
        if name not in (TARGETS, *TOKEN_INPUTS):
            raise InvalidInput(f"unknown loss_fn_inputs.{name[:60]}; leave it out", "loss_fn_inputs")
        if len(lists) != num_examples:
            raise InvalidInput(
                f"loss_fn_inputs.{name} has {len(lists)} lists, and there are {num_examples} data", "loss_fn_inputs"
            )
    if inputs and TARGETS not in inputs:
        raise InvalidInput(f"loss_fn_inputs needs {TARGETS}: what the other lists are about", "loss_fn_inputs")


def _check_turns(examples: Iterable[ChatExample]) -> None:
    both = [part for each in examples for part in (each.conversation, each.rejected) if part is not None]
    num_turns = sum(len(conversation.messages) for conversation in both)
    if num_turns > MAX_TURNS:
        raise TooLarge(
            f"the data have {num_turns} turns, and a request may have {MAX_TURNS}; send them in parts", "data"
        )


def _numbered(number: int, given: Any, inputs: TokenLists, loss_name: str) -> ChatExample:
    try:
        return _example(given, {name: lists[number] for name, lists in inputs.items()}, loss_name)
    except (DataError, InvalidInput) as error:
        raise InvalidInput(f"data[{number}]: {error}", "data") from None


def _example(given: Any, inputs: dict[str, list[float]], loss_name: str) -> ChatExample:
    if loss_name == PREFERENCES:
        return _preference(given)
    conversation = _conversation(given)
    if TARGETS not in inputs:
        return ChatExample(conversation)
    return _sampled(conversation, inputs)


def _preference(given: Any) -> ChatExample:
    """Two conversations, or two ways to go on from `prompt`."""
    parts = [given.get(name) for name in ("prompt", "chosen", "rejected")] if isinstance(given, dict) else []
    shared, *answers = [[] if part is None else part for part in parts] or [[]]
    if not all(isinstance(part, list) for part in (shared, *answers)) or not all(answers) or not answers:
        raise InvalidInput("dpo learns from pairs: give an object with `chosen` and `rejected`, each a list of turns")
    better, worse = (_conversation({**given, "messages": shared + answer}) for answer in answers)
    return ChatExample(better, rejected=worse)


def _conversation(given: Any) -> Conversation:
    """A list of turns, or an object with `messages` and maybe `tools`; a turn may have a `weight`."""
    turns, tools = (given.get("messages"), given.get("tools") or ()) if isinstance(given, dict) else (given, ())
    messages = parse_messages(turns)
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidInput("`tools` must be a list of definitions, as in OpenAI's API")
    return Conversation(messages, tools, dict(_weights(turns or ())))


def _weights(turns: Sequence[dict[str, Any]]) -> Iterable[tuple[int, float]]:
    for number, turn in enumerate(turns):
        weight = turn.get("weight")
        if weight is None:
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InvalidInput(f"turn {number + 1} has the weight {weight!r}; a number is due")
        yield number, float(weight)


def _sampled(conversation: Conversation, inputs: dict[str, list[float]]) -> ChatExample:
    """The conversation up to the assistant's last turn, and the tokens that stand for that."""
    messages: Sequence[ChatMessage] = conversation.messages
    if messages[-1].role == ASSISTANT:
        messages = messages[:-1]
    if not messages:
        raise InvalidInput("there is nothing that the answer answers")
    padded = inputs[TARGETS]
    if any(token != int(token) for token in padded):
        raise InvalidInput(f"{TARGETS} must be whole numbers")
    tokens = [int(token) for token in padded]
    while tokens and tokens[-1] == PADDING:
        tokens.pop()
    values = {
        name: given[: len(tokens)] if len(given) == len(padded) else given
        for name, given in inputs.items()
        if name != TARGETS
    }
    return ChatExample(Conversation(messages, conversation.tools), tokens, values)
