"""Attention within documents, where several documents are packed into one row.

Shapes: B batch, T time, H heads, G key-value heads, D head width, M the most documents in a batch.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import AttentionContext, attend, causal_mask, repeat_kv
from model.config import GPTConfig


class DocumentAttention(AttentionContext):
    """The attention context of rows with several documents: each is a sequence of its own.

    `document_ids` `[B, T]` has the same number for all tokens of a document, and increases along a
    row. By default a mask hides the other documents. With `varlen`, variable-length flash
    attention computes each document on its own, which avoids the masked products. There are at
    most `max_documents` in the batch, by default as many as tokens.
    """

    def __init__(self, document_ids: Tensor, varlen: bool = False, max_documents: int = 0) -> None:
        T, device = document_ids.size(1), document_ids.device
        is_start = F.pad(document_ids.diff() != 0, (1, 0), value=True)  # [B, T]
        index = torch.arange(T, device=device)
        # The index in the row, less that of the document's first token.
        self.positions = index - (index * is_start).cummax(dim=1).values  # [B, T]
        self.mask: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        if varlen:
            # The documents of the batch are numbered from 1; this is the number of each token's.
            number = is_start.flatten().cumsum(0)  # [B * T]
            M = max_documents or len(number)
            # The offset of each document in the flattened batch, and the end of the last. Numbers
            # that no document has get the end, so that the length does not depend on the content:
            # the host would have to wait for it.
            numbers = torch.arange(1, M + 2, device=device)
            self.cu_seqlens = torch.searchsorted(number, numbers, out_int32=True)  # [M + 1]
        else:
            same_document = document_ids[:, None, :, None] == document_ids[:, None, None, :]
            self.mask = causal_mask(T, T, device) & same_document  # [B, 1, T, T]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Attention `[B, H, T, D]` of queries `[B, H, T, D]` to keys and values `[B, G, T, D]`."""
        if self.cu_seqlens is None:
            return attend(q, k, v, self.mask, dropout)
        # Importing it takes a second.
        from torch.nn.attention.varlen import varlen_attn

        # Heads that share keys and values need copies of them in older versions of torch.
        B, H, T, _ = q.shape
        options = {}
        if k.size(1) != H and takes_shared_heads(varlen_attn):
            options["enable_gqa"] = True
        else:
            k, v = repeat_kv(k, H), repeat_kv(v, H)
        # All rows end to end: [B * T, H, D].
        q, k, v = (x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        y = varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, T, T, window_size=(-1, 0),
                        **options)
        return y.unflatten(0, (B, T)).transpose(1, 2)  # [B, H, T, D]


def takes_shared_heads(varlen_attn: Callable[..., Tensor]) -> bool:
    """Whether heads of queries can share keys and values without copies: since torch 2.12."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def supports_varlen(config: GPTConfig, device: torch.device, training: bool) -> bool:
    """Whether variable-length flash attention is supported: bfloat16 on a GPU, no dropout."""
    if device.type != "cuda" or (training and config.dropout > 0):
        return False
    if not torch.is_autocast_enabled("cuda"):
        return False
    is_bf16 = torch.get_autocast_dtype("cuda") == torch.bfloat16
    return is_bf16 and config.head_width % 8 == 0 and config.head_width <= 256
