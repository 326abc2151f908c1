"""The settings of serve.py.

They are here, below `serving`, since the command line checks them before it imports torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from conf.sampling import SamplingConfig
from conf.settings import ModelChoice, checkpoint_problems
from setting import setting

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings(ModelChoice, SamplingConfig):
    """The settings of a server. Those of sampling are the defaults of a request."""

    checkpoint: str = setting("best", "best, last, or the number of a step; several: best,last")
    host: str = setting("127.0.0.1", "the address; one that others can reach needs api_key")
    port: int = setting(8000, "the port to listen on; 0: any free one", ge=0, le=65535)
    api_key: str = setting("", "a secret that requests must have; empty: none")
    batch_size: int = setting(16, "sequences decoded together, of each run", ge=1)
    max_requests: int = setting(64, "requests that decode or wait at a time, of each run", ge=1)
    max_request_tokens: int = setting(8192, "the most tokens that one request may generate", ge=1)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for checkpoint in self.checkpoint.split(","):
            yield from checkpoint_problems(checkpoint)
        if self.host not in LOOPBACK and not self.api_key:
            yield (f"host={self.host} lets other machines in: set a secret with api_key=, or "
                   "leave host out.")
        if not self.api_key.isascii() or self.api_key != self.api_key.strip():
            yield "api_key must consist of ASCII characters, without spaces around them."
