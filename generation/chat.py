"""A conversation with a model that was trained on conversations (data=chat).

Prints nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from conf.sampling import SamplingConfig
from data.chat import Message, markers_of, message_ids
from generation.decoder import Decoder
from generation.engine import Engine


class Conversation:
    """Questions and answers, of which the last ones that fit are the context of the next answer.

    `system` is an instruction that precedes them. Raises ValueError if the model was not trained on
    conversations.
    """

    def __init__(self, engine: Engine, rules: SamplingConfig, decoder: Decoder | None = None,
                 system: str = "") -> None:
        markers_of(engine.tokenizer)
        self.engine, self.rules, self.decoder = engine, rules, decoder
        self.messages = [Message("system", system)] if system else []
        self.was_cut = False

    def answer(self, question: str) -> Iterator[str]:
        """The answer to a question, piece by piece. Then `was_cut` says whether it has no end.

        Raises ValueError for a question that is too long, or that the tokenizer cannot encode.
        """
        asked = [*self.messages, Message("user", question)]
        prompt, rules, number = next_answer(self.engine, asked, self.rules)
        completion = yield from self.engine.stream(prompt, rules, self.decoder, number)
        self.was_cut = completion.reason == "length"
        self.messages = [*asked, Message("assistant", completion.text)]


def next_answer(engine: Engine, messages: Sequence[Message], rules: SamplingConfig,
                has_begun: bool = False) -> tuple[list[int], SamplingConfig, int]:
    """The prompt of the answer to the last of `messages`, its rules, and the number of its sample.

    The answer gets up to half of the context, and the last turns that fit precede the question.
    `has_begun`: the last message is the beginning of the answer, which is continued. Raises
    ValueError for another order, and for a question that is too long or that the tokenizer cannot
    encode.
    """
    tokenizer, block_size = engine.tokenizer, engine.model.config.block_size
    markers, messages = markers_of(tokenizer), list(messages)

    # Take off the beginning of the answer, and the system message.
    start, begun = [markers.end_of_text], []
    if has_begun and messages and messages[-1].role == "assistant":
        begun = engine.encode(messages.pop().text)
    if messages and messages[0].role == "system":
        start += message_ids(tokenizer, messages.pop(0))
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(f"The roles of the messages are {', '.join(roles) or 'missing'}: after a "
                         "system message, if there is one, user and assistant take turns, and the "
                         "last one is of the user.")
    *earlier, asked = [message_ids(tokenizer, message) for message in messages]

    # The same turns precede the rest of an answer that has begun.
    n_answer = max(min(rules.max_new_tokens, block_size // 2), len(begun) + 1)
    n_free = block_size - n_answer - len(start) - len(asked) - 1
    if n_free < 0:
        # Without its two markers.
        n_asked = len(asked) - 2
        raise ValueError(f"The question has {n_asked:,} tokens, and the context of {block_size:,} "
                         f"has room for {max(0, n_asked + n_free):,}: shorten it, or lower "
                         "max_new_tokens.")
    history: list[int] = []
    while earlier and len(history) + len(earlier[-2]) + len(earlier[-1]) <= n_free:
        answer, question = earlier.pop(), earlier.pop()
        history = [*question, *answer, *history]

    prompt = [*start, *history, *asked, markers.assistant, *begun]
    most = min(rules.max_new_tokens, block_size - len(prompt))
    return prompt, replace(rules, max_new_tokens=most), len(messages) // 2
