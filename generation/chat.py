"""A conversation with a model that was trained on conversations (data=chat).

Prints nothing.
"""

from __future__ import annotations

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
        markers = markers_of(engine.tokenizer)
        self.engine, self.rules, self.decoder = engine, rules, decoder
        self.answer_start = markers.assistant
        self.end = markers.end
        self.start = [markers.end_of_text]
        if system:
            self.start += message_ids(engine.tokenizer, Message("system", system))
        # The tokens of each question with its answer.
        self.turns: list[list[int]] = []
        self.n_questions = 0
        self.was_cut = False

    def answer(self, question: str) -> Iterator[str]:
        """The answer to a question, piece by piece. Then `was_cut` says whether it has no end.

        Raises ValueError for a question that is too long, or that the tokenizer cannot encode.
        """
        asked = message_ids(self.engine.tokenizer, Message("user", question))
        prompt = self.prompt(asked)
        n_free = self.engine.model.config.block_size - len(prompt)
        rules = replace(self.rules, max_new_tokens=min(self.rules.max_new_tokens, n_free))
        completion = yield from self.engine.stream(prompt, rules, self.decoder, self.n_questions)
        self.was_cut = completion.reason == "length"

        # The next answer reads this one with its end, as answers in the training data have.
        answered = completion.tokens
        if completion.reason == "end_of_text":
            answered = answered[:-1]
        self.turns.append([*asked, self.answer_start, *answered, self.end])
        self.n_questions += 1

    def continued(self, messages: Sequence[Message], has_begun: bool = False) -> list[int]:
        """The tokens before the answer to the last of `messages`, a question of the user.

        `has_begun`: the last message is the beginning of that answer, which is continued. Raises
        ValueError for another order, and as `answer` does.
        """
        messages = list(messages)
        begun: list[int] = []
        if has_begun and messages and messages[-1].role == "assistant":
            begun = self.engine.encode(messages.pop().text)
        if messages and messages[0].role == "system":
            self.start += message_ids(self.engine.tokenizer, messages.pop(0))

        roles = [message.role for message in messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ValueError(f"The roles of the messages are {', '.join(roles) or 'missing'}: "
                             "after a system message, if there is one, user and assistant take "
                             "turns, and the last one is of the user.")

        ids = [message_ids(self.engine.tokenizer, message) for message in messages]
        for question, answer in zip(ids[:-1:2], ids[1::2], strict=True):
            self.turns.append(question + answer)
        self.n_questions = len(self.turns)
        return self.prompt(ids[-1], begun)

    def prompt(self, asked: list[int], begun: Sequence[int] = ()) -> list[int]:
        """The tokens before an answer: the last turns that leave room for it, and the question.

        Drops the turns before them. `begun` are the first tokens of the answer.
        """
        block_size = self.engine.model.config.block_size
        # The answer gets up to half of the context. The same turns precede the rest of one.
        n_answer = max(min(self.rules.max_new_tokens, block_size // 2), len(begun) + 1)
        n_free = block_size - n_answer - len(self.start) - len(asked) - 1
        if n_free < 0:
            # Without its two markers.
            n_asked = len(asked) - 2
            raise ValueError(f"The question has {n_asked:,} tokens, and the context of "
                             f"{block_size:,} has room for {max(0, n_asked + n_free):,}: "
                             "shorten it, or lower max_new_tokens.")
        n_history = sum(map(len, self.turns))
        while n_history > n_free:
            n_history -= len(self.turns.pop(0))
        history = [token for turn in self.turns for token in turn]
        return [*self.start, *history, *asked, self.answer_start, *begun]
