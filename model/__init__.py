"""What is learned: the Transformer and how it generates. Knows tensors, nothing else."""

from model.attention import CausalSelfAttention, KVCache
from model.config import GPTConfig
from model.decode import Decoder
from model.generate import generate, steps
from model.gpt import GPT
from model.undrawn import Undrawn

__all__ = ["GPT", "CausalSelfAttention", "Decoder", "GPTConfig", "KVCache", "Undrawn", "generate", "steps"]
