"""Conversations: their records in JSON, and the template that makes tokens of them.

A conversation is `<|system|>text<|end|><|user|>text<|end|><|assistant|>text<|end|>`, with any
number of messages and nothing between them. The markers are special tokens, which no text contains.
Knows no files.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from data.bpe import BPETokenizer
from data.document import Document, SpecialToken, cut_into_pieces
from data.records import BadRecord, listed, type_name, well_formed
from data.tokenizer import ExtendedTokenizer, Tokenizer, with_special

MARKER_OF = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END = "<|end|>"
MARKERS = (*MARKER_OF.values(), END)
# Fields of an answer that would change what is learned from it, and their values that do not.
FIELDS_OF_ANSWERS = ("weight", "train", "training", "loss", "tool_calls", "function_call")
NO_EFFECT = (None, 1, [])
# The template as Hugging Face's tokenizer_config.json has it.
JINJA = ("{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
         "message['content'] + '<|end|>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


class Message(NamedTuple):
    """What one side of a conversation says. The `role` is one of MARKER_OF."""

    role: str
    text: str


class Markers(NamedTuple):
    """The ids of the tokens that divide conversations."""

    end_of_text: int
    end: int
    system: int
    user: int
    assistant: int


def with_markers(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with those of the markers that it lacks as new tokens, after its last id.

    A text cannot contain them then. Tokens of its own would have other meanings: GPT-2 has only
    the end of text, which divides documents.
    """
    return with_special(tokenizer, MARKERS)


def has_markers(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is one of conversations."""
    return set(MARKERS) <= set(tokenizer.special)


def markers_of(tokenizer: Tokenizer) -> Markers:
    """The markers of a tokenizer. Raises ValueError if it lacks one, or finds one in a text."""
    special = tokenizer.special
    missing = [word for word in MARKERS if word not in special]
    if tokenizer.end_of_text is None:
        missing.append("end of text")
    if missing:
        raise ValueError(f"The tokenizer has no {missing[0]}: the model was not trained on "
                         f"conversations (data=chat).")
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    if isinstance(base, BPETokenizer) and set(MARKERS) & set(base.in_text):
        raise ValueError("The tokenizer finds the markers of data=chat inside a text: make them "
                         "special tokens (special: true) in its tokenizer.json.")
    of_roles = {role: special[word] for role, word in MARKER_OF.items()}
    return Markers(tokenizer.end_of_text, special[END], **of_roles)


def message_ids(tokenizer: Tokenizer, message: Message) -> list[int]:
    """The ids of a whole message, with its markers."""
    start, end = tokenizer.special[MARKER_OF[message.role]], tokenizer.special[END]
    return [start, *tokenizer.encode(message.text), end]


def read_conversation(record: Any, place: str) -> Document | BadRecord:
    """The conversation in a JSON record: `messages` with `role` and `content`, or `prompt` and
    `completion`.
    """
    messages = read_messages(record, place)
    if isinstance(messages, BadRecord):
        return messages
    answers = [message.text for message in messages if message.role == "assistant"]
    if not answers:
        return BadRecord(f"{place} has no message of the assistant")
    if any(not answer.strip() for answer in answers):
        return BadRecord(f"{place} has an empty answer")
    # OpenAI's format excludes an answer from the loss by "weight": 0.
    for number, message in enumerate(record.get("messages", ()), 1):
        for name in FIELDS_OF_ANSWERS if message["role"] == "assistant" else ():
            if message.get(name) not in NO_EFFECT:
                value = json.dumps(message[name])
                return BadRecord(
                    f"{place}, message {number} has {name} {value:.40}, which is not supported: "
                    f"data=chat learns the text of each answer",
                    f"remove {name} to learn this one, too")

    def pieces() -> Iterator[str]:
        for message in messages:
            yield SpecialToken(MARKER_OF[message.role])
            yield from cut_into_pieces([message.text])
            yield SpecialToken(END)

    return Document(pieces)


def read_messages(record: Any, place: str) -> list[Message] | BadRecord:
    if not isinstance(record, dict):
        return BadRecord(f"{place} is not a record with fields (it is {type_name(record)})")
    # Both formats as a list of messages.
    is_pair = "prompt" in record and "completion" in record
    if "messages" in record and is_pair:
        return BadRecord(f"{place} has both messages and prompt with completion",
                         "leave one of them out")
    if "messages" in record:
        found = record["messages"]
        if not isinstance(found, list):
            return BadRecord(f"{place}: messages is not a list (it is {type_name(found)})")
    elif is_pair:
        found = [{"role": "user", "content": record["prompt"]},
                 {"role": "assistant", "content": record["completion"]}]
    else:
        return BadRecord(f"{place} has neither messages nor prompt and completion (its fields: "
                         f"{listed(record) or 'none'})")

    # The first invalid message makes the record invalid.
    messages = []
    for number, message in enumerate(found, 1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict):
            return BadRecord(f"{where} has no role and content (it is {type_name(message)})")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in MARKER_OF:
            roles = ", ".join(MARKER_OF)
            return BadRecord(f"{where} has the role {role!r:.40}, which is none of {roles}")
        if not isinstance(content, str):
            return BadRecord(f"{where} has no text in its content (it is {type_name(content)})")
        messages.append(Message(role, well_formed(content)))
    return messages
