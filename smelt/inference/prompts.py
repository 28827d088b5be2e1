"""Prompts: what a model is given to go on from, as tokens, and which tokens end it; knows no sequences, no engine."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from functools import cached_property
from typing import Any

from smelt.configs import DecoderConfig
from smelt.data.chat_format import ChatFormat
from smelt.data.tokenizers import Tokenizer
from smelt.errors import InvalidInput, TokenizerError
from smelt.types import ChatMessage

LONG_TEXT = 20_000  # characters: above a few milliseconds of encoding


class Prompts:
    """Of one model. A text that cannot fit its context is refused before it costs anything."""

    def __init__(self, config: DecoderConfig, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._chat_format = chat_format

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, after the one that begins every text where the model expects that."""
        self._check_length(len(text))
        return self._begun(self._tokenizer.encode(text))

    def to_go_on_from(self, text: str) -> list[int]:
        """As `encode`, but of an empty text what ends the one before, or a new line, or else the first token."""
        if text or self._tokenizer.bos_id is not None:
            return self.encode(text)
        if ends := self.text_end_ids:
            return list(ends)
        try:
            return self._tokenizer.encode("\n")
        except TokenizerError:
            return [0]

    def of_chat(self, messages: Items[ChatMessage], tools: Items[Mapping[str, Any]] = ()) -> list[int]:
        """A conversation so far, and the beginning of the assistant's next turn."""
        self._check_length(sum(len(message.content) for message in messages))
        return self._chat_format.prompt_ids(messages, tools)

    @cached_property
    def text_end_ids(self) -> frozenset[int]:
        """The end-of-text token, where the model has a row for it (vocabularies made elsewhere may not)."""
        eot_id = self._tokenizer.eot_id
        return frozenset() if eot_id is None else self._known({eot_id})

    @cached_property
    def turn_end_ids(self) -> frozenset[int]:
        """More tokens that end what the model says."""
        return self._known(self._chat_format.stop_token_ids)

    def _known(self, token_ids: frozenset[int] | set[int]) -> frozenset[int]:
        return frozenset(token for token in token_ids if token < self._config.vocab_size)

    def _begun(self, token_ids: list[int]) -> list[int]:
        return token_ids if self._tokenizer.bos_id is None else [self._tokenizer.bos_id, *token_ids]

    def _check_length(self, num_chars: int) -> None:
        limit = self._config.block_size * self._longest_token if num_chars > LONG_TEXT else LONG_TEXT
        if num_chars > limit:
            raise InvalidInput(
                f"the prompt has {num_chars:,} characters, but the model's context of {self._config.block_size} tokens "
                f"holds {limit:,} at most; shorten the prompt"
            )

    @cached_property
    def _longest_token(self) -> int:
        """Bytes, and so characters at most, of the longest token."""
        decode = self._tokenizer.decode_bytes
        return max(len(decode([token])) for token in range(self._tokenizer.vocab_size))
