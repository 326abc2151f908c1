"""From the fields of a request to what is decoded and how it is answered.

Knows no HTTP.
"""

import asyncio
import codecs
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.sampling import SamplingConfig
from conf.serving import ServeSettings
from data.chat import has_markers, read_messages
from data.records import BadRecord
from generation.chat import next_answer
from generation.engine import Engine
from generation.inspection import Prediction, predictions
from serving.answers import Answer, ChatAnswer
from serving.decoding import Batcher, Generation, Piece, Token
from serving.fields import Fields, Refused, shown

MAX_TOP = 20


@dataclass(frozen=True)
class Model:
    """A model that is served, by its name."""

    name: str
    engine: Engine
    batcher: Batcher
    # The arguments of sample.py that open it.
    arguments: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def block_size(self) -> int:
        return self.engine.model.config.block_size


async def completion_task(fields: Fields, model: Model, settings: ServeSettings) -> Answer:
    """A task of /v1/completions. Raises Refused."""
    prompts = await asyncio.to_thread(read_prompts, fields, model, settings.batch_size)
    n = fields.integer("n", 1, 1, settings.batch_size)
    top = fields.integer("logprobs", None, 0, MAX_TOP)
    has_echo = fields.take("echo", False)
    # The texts of one prompt are those that sample.py prints for num_samples.
    jobs = [(prompt, number) for prompt in prompts for number in range(n)]
    rules = fields.rules(settings, may_be_empty=has_echo)
    generation = make_generation(fields, jobs, rules, settings, top)
    echoes: list[str] = []
    for prompt in prompts if has_echo else []:
        text, tokens = await echo_of(prompt, model, top)
        reason = "" if rules.max_new_tokens else "length"
        for _ in range(n):
            generation.received.put_nowait(Piece(len(echoes), text, tokens, 0, reason))
            echoes.append(text)
    n_prompt = sum(map(len, prompts))
    return Answer(model.name, model.engine.tokenizer, generation, n_prompt, echoes)


async def echo_of(prompt: list[int], model: Model, top: int | None) -> tuple[str, list[Token]]:
    """The text of a prompt, and its tokens with their log probabilities if `top` is a number."""
    text = model.engine.prompt_text(prompt)
    if top is None:
        return text, []
    if len(prompt) > model.block_size:
        raise Refused(f"The prompt has {len(prompt):,} tokens, and echo with logprobs reads up "
                      f"to {model.block_size:,}, the context of the model: shorten it.",
                      "prompt", "context_length_exceeded")
    predicted = await model.batcher.call(
        lambda: list(predictions(model.engine.model, prompt, top)))
    tokenizer, tokens, offset = model.engine.tokenizer, [], -len(text)
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # Nothing predicts the first token. The last prediction is of what follows the prompt.
    found = [Prediction(None, None), *predicted[:-1]]
    for token, one in zip(prompt, found, strict=True):
        tokens.append(Token(token, offset, one.logprob, one.top))
        if token != tokenizer.end_of_text:
            offset += len(utf8.decode(tokenizer.decode_bytes((token,))))
    return text, tokens


async def chat_task(fields: Fields, model: Model, settings: ServeSettings) -> Answer:
    """A task of /v1/chat/completions. Raises Refused."""
    rules = fields.rules(settings)
    messages = fields.take("messages", [])
    # As in vLLM: the last message is the beginning of the answer.
    has_begun = fields.take("continue_final_message", False)
    prompt, rules, number = await asyncio.to_thread(read_conversation, messages, model, rules,
                                                    has_begun)
    n = fields.integer("n", 1, 1, settings.batch_size)
    top = fields.integer("top_logprobs", 0, 0, MAX_TOP)
    if not fields.take("logprobs", False):
        top = None
    # The same text as the answer to the same question in sample.py.
    jobs = [(prompt, number + index) for index in range(n)]
    generation = make_generation(fields, jobs, rules, settings, top)
    return ChatAnswer(model.name, model.engine.tokenizer, generation, len(prompt))


def make_generation(fields: Fields, jobs: Sequence[tuple[list[int], int]], rules: SamplingConfig,
                    settings: ServeSettings, top: int | None) -> Generation:
    """The generation of `jobs`. Raises Refused if it is too large."""
    if len(jobs) > settings.batch_size:
        raise Refused(f"{len(jobs)} completions are asked for, and the limit is "
                      f"{settings.batch_size} (batch_size).", "n")
    n_tokens = len(jobs) * rules.max_new_tokens
    if n_tokens > settings.max_request_tokens:
        raise Refused(f"{n_tokens} tokens are asked for, and the limit is "
                      f"{settings.max_request_tokens} (max_request_tokens).", "max_tokens")
    return Generation(jobs, rules, fields.stops(settings.stop), top)


def read_prompts(fields: Fields, model: Model, most: int) -> list[list[int]]:
    """The token ids of `prompt`: a text, token ids, or a list of up to `most` of either."""
    given = fields.take("prompt", "", str, list)
    is_one = isinstance(given, str) or (given and all(type(one) is int for one in given))
    prompts = [given] if is_one else given
    if not prompts:
        raise Refused("prompt is an empty list: give at least one.", "prompt")
    if len(prompts) > most:
        raise Refused(f"prompt has {len(prompts)} prompts, and the limit is {most} "
                      "(batch_size).", "prompt")
    truncates = fields.take("truncate_prompt", False)
    return [read_prompt(prompt, model, truncates) for prompt in prompts]


def read_prompt(prompt: Any, model: Model, truncates: bool) -> list[int]:
    """The token ids of one text, or of token ids: of a long one, the model may see the end only."""
    n_vocab = model.engine.tokenizer.vocab_size
    if isinstance(prompt, list):
        for token in prompt:
            if type(token) is not int or not 0 <= token < n_vocab:
                raise Refused(f"prompt has {shown(token)} in place of a token id from 0 to "
                              f"{n_vocab - 1}.", "prompt")
    elif not isinstance(prompt, str):
        raise Refused(f"prompt has {shown(prompt)} in place of a text.", "prompt")
    ids = encoded("prompt", model, prompt or "")
    if len(ids) > model.block_size and not truncates:
        raise Refused(f"The prompt has {len(ids):,} tokens, and the context of the model "
                      f"{model.block_size:,}: shorten it, or set truncate_prompt.", "prompt",
                      "context_length_exceeded")
    return ids


def encoded(name: str, model: Model, prompt: str | list[int]) -> list[int]:
    try:
        return model.engine.prompt_ids(prompt)
    except ValueError as error:
        # A character that the tokenizer lacks.
        raise Refused(str(error), name) from None


def read_conversation(given: list[Any], model: Model, rules: SamplingConfig,
                      has_begun: bool) -> tuple[list[int], SamplingConfig, int]:
    """What `next_answer` returns for the messages of a request."""
    if not has_markers(model.engine.tokenizer):
        raise Refused(f"{model.name} was not trained on conversations (data=chat): use "
                      "/v1/completions.", "model")
    joined = [with_joined_parts(message) for message in given]
    messages = read_messages({"messages": joined}, "The request")
    if isinstance(messages, BadRecord):
        raise Refused(f"{messages.problem}.", "messages")
    try:
        return next_answer(model.engine, messages, rules, has_begun)
    except ValueError as error:
        # A question that is too long, or a character that the tokenizer lacks.
        raise Refused(str(error), "messages") from None


def with_joined_parts(message: Any) -> Any:
    """A message whose content is a text. OpenAI's API also has it as a list of parts."""
    try:
        parts = message["content"]
        if isinstance(parts, list) and all(part["type"] == "text" for part in parts):
            return message | {"content": "".join(part["text"] for part in parts)}
    except (TypeError, KeyError):
        # `read_messages` says what is wrong with it.
        pass
    return message
