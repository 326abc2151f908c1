"""Read the fields of a request's JSON object, each with its type and its range."""

import json
from dataclasses import replace
from typing import Any

from conf.sampling import SamplingConfig

# The setting by the name of OpenAI's API, where it has another one.
NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
         "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "seed": "seed"}
# These do not change the answer.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
MAX_STOPS, MAX_STOP = 16, 200
MAX_NUMBER = 2**63
MAX_MESSAGE = 500


class Refused(Exception):
    """Why a request is not answered: a message, the field, a code for programs, an HTTP status."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None,
                 status: int = 400) -> None:
        # It can quote the request.
        super().__init__(message[:MAX_MESSAGE])
        self.status, self.param, self.code = status, param, code


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises Refused if it is not one."""
    try:
        values = json.loads(body.decode())
    except ValueError as error:
        raise Refused(f"The body is not JSON in UTF-8: {error}.") from None
    if not isinstance(values, dict):
        raise Refused("The body is not a JSON object.")
    return values


class Fields:
    """The fields of an object. Each is taken once; null is the same as a field that is missing."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any, *types: type) -> Any:
        """The value of a field, of one of the `types`; by default, that of `default`."""
        value = self.values.pop(name, default)
        types = types or (type(default),)
        # To Python, true is a number.
        if value is not default and type(value) not in types:
            wanted = " or ".join(JSON_NAMES[kind] for kind in types)
            raise Refused(f"{name}={shown(value)} must be {wanted}.", name)
        # Neither NaN nor infinity is.
        if isinstance(value, int | float) and not abs(value) < MAX_NUMBER:
            raise Refused(f"{name}={shown(value)} is not a number below {MAX_NUMBER}.", name)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.take(name, default, int)
        if value is not None and not low <= value <= high:
            raise Refused(f"{name}={value} must be from {low} to {high}.", name)
        return value

    def rules(self, defaults: SamplingConfig, may_be_empty: bool = False) -> SamplingConfig:
        """The sampling rules, with `defaults` for those that are missing.

        `may_be_empty`: max_tokens=0 is valid.
        """
        # The settings that were sent, and the names that they were sent under.
        given, sent_as = {}, {}
        for name, setting in NAMES.items():
            if name in self.values:
                is_integer = isinstance(getattr(SamplingConfig, setting), int)
                types = (int,) if is_integer else (int, float)
                given[setting], sent_as[setting] = self.take(name, None, *types), name
        # The ranges are those of sample.py, which always generates a token.
        rules = replace(defaults, **given)
        checked = rules
        if may_be_empty and rules.max_new_tokens == 0:
            checked = replace(rules, max_new_tokens=1)
        # The first problem, with the name that the client knows.
        for problem in checked.problems():
            setting, _, rest = problem.partition("=")
            name = sent_as.get(setting, setting)
            raise Refused(f"{name}={rest}", name)
        return rules

    def stops(self, default: str) -> list[str]:
        """The texts to stop at: `stop` is one text or a list."""
        stops = self.take("stop", default, str, list)
        if isinstance(stops, str):
            stops = [stops] if stops else []
        for stop in stops:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP:
                raise Refused(f"stop={shown(stop)} must be a text of 1 to {MAX_STOP} "
                              "characters.", "stop")
        if len(stops) > MAX_STOPS:
            raise Refused(f"stop has {len(stops)} texts, and the limit is {MAX_STOPS}.", "stop")
        return stops

    def check_rest(self) -> None:
        """Raise Refused for a field that nobody took, unless it changes nothing."""
        for name, value in self.values.items():
            # Such as presence_penalty=0 or tools=[].
            if name not in IGNORED and value:
                raise Refused(f"{name[:100]}={shown(value)} is not supported: leave it out.",
                              name[:100], "unsupported_parameter")


JSON_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false",
              list: "a list", dict: "an object"}


def shown(value: Any) -> str:
    """A value for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
