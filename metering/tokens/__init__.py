"""How many tokens a text is.

Input is billed by cl100k_base, for every model alike, so that a bill can be checked with nothing but the text. For a
model with another tokenizer (o200k_base for gpt-4o and later; Claude's and Gemini's are not published) that number is
an estimate of what its provider counts. Bytes are merged across words, so the counts of chunks do not add up to the
count of the whole.

Counts are those of tiktoken (https://github.com/openai/tiktoken) on every text for which it has an answer, and on the
others what its pattern and its merges define. Text that looks like a special token is ordinary text, and a lone
surrogate counts as U+FFFD, as with tiktoken. No text raises; the empty one is 0. Time follows the length of the text;
within one unbroken run of letters or signs, the length times its logarithm.

Needs the extra `tokens`. Nothing is ever downloaded: cl100k and o200k come in a wheel, the older encodings are read
from `TIKTOKEN_CACHE_DIR`. An encoding is loaded at its first use, once in a process (some 0.3 s). All functions may be
called from any thread. They take an `encoding` or a `model`, not both; without either it is cl100k_base. They raise
`UnknownEncoding` for a model tiktoken has no encoding for, an encoding it does not know, and a table that is not on
this machine; `InvalidFile` for a table that is not the one OpenAI published; `InvalidSetting` for other arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from metering.errors import InvalidSetting, UnknownEncoding
from metering.tokens.encodings import Coder, coder_of, encoding_of_model

__all__ = [
    "BILLING_ENCODING",
    "TokenCount",
    "count_chat_tokens",
    "count_input_tokens",
    "count_tokens",
    "estimate_tokens",
    "exceeds",
]

BILLING_ENCODING = "cl100k_base"
"""What input is billed by. Changing it changes every bill."""

TOKENS_PER_MESSAGE = 3
TOKENS_PER_NAME = 1
TOKENS_TO_PRIME_THE_ANSWER = 3
"""https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken, "Counting tokens for chat completions"."""

_MAX_BYTES_PER_CHARACTER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """A count that says whether it may be taken for the provider's."""

    tokens: int
    encoding: str
    """What it was counted with."""
    estimated: bool
    """Not counted with the encoding that was named, or is the model's. For `UsageEvent.estimated`."""


def count_input_tokens(text: str) -> int:
    """Tokens of `text` in cl100k_base, by which input is billed."""
    return count_tokens(text)


def count_tokens(text: str, *, encoding: str | None = None, model: str | None = None) -> int:
    """Tokens of `text` in an encoding, or in that of a model by tiktoken's own table of models."""
    coder = _coder(encoding, model)
    return _count(coder, _checked(text))


def estimate_tokens(text: str, *, encoding: str | None = None, model: str | None = None) -> TokenCount:
    """The same count where there is one, else that of cl100k_base, marked as an estimate.

    Without an encoding or a model it is an estimate too: nothing says whose tokens are meant.
    """
    estimated = encoding is None and model is None
    try:
        coder = _coder(encoding, model)
    except UnknownEncoding:
        coder = coder_of(BILLING_ENCODING)
        estimated = True
    return TokenCount(tokens=_count(coder, _checked(text)), encoding=coder.name, estimated=estimated)


def exceeds(text: str, limit: int, *, encoding: str | None = None, model: str | None = None) -> bool:
    """Whether `text` is more than `limit` tokens, at a cost that follows the limit and not the text.

    At most `limit` times the longest token is ever encoded, which is 128 bytes in cl100k and o200k; of a text with
    blanks or punctuation no more than the limit and some 4,000 characters.
    """
    coder = _coder(encoding, model)
    if len(_checked(text)) > limit * coder.longest_token_bytes:
        return True
    if len(text) * _MAX_BYTES_PER_CHARACTER <= limit:  # no token is less than a byte
        return False
    tokens = 0
    for more in coder.encode(text):
        tokens += len(more)
        if tokens > limit:
            return True
    return False


def count_chat_tokens(
    messages: Iterable[Mapping[str, object]], *, encoding: str | None = None, model: str | None = None
) -> int:
    """Tokens of a chat prompt: 3 a message, 1 a name, 3 to prime the answer, and the texts.

    A message has `role`, perhaps `name`, and `content`: a text, None, or a list of parts, of which those of type
    `text`, `input_text` and `output_text` count, each by itself. For images, files, audio, tools and tool calls no
    count is published: raises `InvalidSetting`, naming the place. The framing is that of OpenAI's chat models.
    """
    coder = _coder(encoding, model)
    if isinstance(messages, str | Mapping):
        raise InvalidSetting("messages", type(messages), "a list of messages")
    tokens = TOKENS_TO_PRIME_THE_ANSWER
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidSetting(f"messages[{at}]", type(message), "a mapping with role and content")
        named = message.get("name") is not None
        tokens += TOKENS_PER_MESSAGE + named * TOKENS_PER_NAME
        tokens += sum(_count_field(coder, f"messages[{at}].{key}", key, value) for key, value in message.items())
    return tokens


def _count_field(coder: Coder, place: str, key: str, value: object) -> int:
    if value is None or (key not in _TEXTS and not value):
        return 0
    if key == "content" and isinstance(value, list | tuple):
        return sum(_count_part(coder, f"{place}[{at}]", part) for at, part in enumerate(value))
    if key not in _TEXTS:
        raise InvalidSetting(place, type(value), "only role, name and content, which have a published count")
    return _count(coder, _checked(value, place))


def _count_part(coder: Coder, place: str, part: object) -> int:
    kind = part.get("type") if isinstance(part, Mapping) else type(part)
    if not isinstance(part, Mapping) or kind not in _TEXT_PARTS:
        raise InvalidSetting(place, kind, f"a part of type {', '.join(_TEXT_PARTS)}; no other has a published count")
    return _count(coder, _checked(part.get("text"), f"{place}.text"))


_TEXTS = ("role", "name", "content")
_TEXT_PARTS = ("text", "input_text", "output_text")


def _coder(encoding: str | None, model: str | None) -> Coder:
    if encoding is not None and model is not None:
        raise InvalidSetting("model", model, f"an encoding or a model, not both (encoding is {encoding!r})")
    if model is not None:
        encoding = encoding_of_model(model)
    return coder_of(BILLING_ENCODING if encoding is None else encoding)


def _count(coder: Coder, text: str) -> int:
    return sum(map(len, coder.encode(text)))


def _checked(text: object, place: str = "text") -> str:
    # Never the value itself: it may be what a customer wrote.
    if not isinstance(text, str):
        raise InvalidSetting(place, type(text), "a str")
    return text
