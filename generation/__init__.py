"""Text generation with a trained model: `from generation import open_run, open_weights`."""

from conf.sampling import SamplingConfig
from generation.engine import Engine, open_run, open_weights

__all__ = ["Engine", "SamplingConfig", "open_run", "open_weights"]
