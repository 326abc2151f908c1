"""The documents in a batch, so that attention does not cross them.

A document starts at each token whose id is the `boundary`. Knows ids only, no model.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The documents of a batch are usually longer on average, in tokens.
LEAST_USUAL_DOCUMENT = 64


def document_options(inputs: Tensor, boundary: int | None, device: torch.device) -> dict[str, Any]:
    """The arguments of `GPT.features` for attention within documents; none without a boundary.

    `inputs` `[B, T]` are in the CPU's memory, where counting documents waits for no other device.
    """
    if boundary is None:
        return {}
    # For each token, the number of its document within the row: [B, T].
    documents = (inputs.to(device, non_blocking=True) == boundary).cumsum(dim=1)
    return {"document_ids": documents, "max_documents": most_documents(inputs, boundary)}


def most_documents(inputs: Tensor, boundary: int) -> int:
    """A bound on the number of documents in `inputs` `[B, T]`.

    It is the same for most batches, since a compiled model is compiled again for another one.
    """
    # Each sequence begins with the rest of a document.
    number = len(inputs) + np.count_nonzero(inputs.numpy() == boundary)
    usual = inputs.numel() // LEAST_USUAL_DOCUMENT
    return max(usual, 2 ** math.ceil(math.log2(number)))
