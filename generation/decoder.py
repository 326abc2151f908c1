"""Decode token by token: prefill a cache, then run one step per token, on GPUs as a CUDA graph.

Knows token ids and logits, no sampling rules. Shapes: B rows, V vocabulary.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial

import torch
from torch import Tensor

from generation import kernels
from generation.caches import PackedCache, RaggedCache, StaticCache
from generation.packed import cast, pack
from hardware import native
from model.gpt import GPT
from model.ngram import NO_TOKEN


class StopPrefill(Exception):
    """Ends a prefill when the last layer's keys and values are cached: its output is unused."""


class PrefillCache:
    """A cache for `GPT.features` that copies keys and values to one row of a `RaggedCache`."""

    attention_context = None
    previous_ids = None
    length = 0

    def __init__(self, cache: RaggedCache, row: int) -> None:
        self.cache, self.row = cache, row

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.cache.fill(layer, self.row, k[0], v[0])
        if layer == len(self.cache.keys) - 1:
            raise StopPrefill
        # Attention within the prompt uses keys and values that are not rounded to the cache's type.
        return k, v


class CapturedCall:
    """A CUDA graph of `call`. A decoding step's small kernels run faster than they are launched."""

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would return all free memory to the driver, and training would have to
        # ask for it again after each evaluation.
        side = capture_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.device(device), torch.cuda.stream(side):
                # Beside it, a thread of the training may allocate pinned memory.
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.result = call()
                finally:
                    self.graph.capture_end()
        except RuntimeError:
            # The random number generator is still in capture mode, where dropout raises an error.
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        torch.cuda.current_stream(device).wait_stream(side)

    def replay(self) -> Tensor:
        """Run the call on what the captured tensors hold now; the result is a new tensor."""
        self.graph.replay()
        return self.result.clone()


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps memory for each stream that it has seen."""
    return torch.cuda.Stream(device)


class Decoder:
    """Computes next-token logits of sequences that grow by one token per step.

    `precision` is "fp32", "bf16" (16-bit weights and cache) or "int8" (8-bit weights); by default
    that of autocast. A CPU without bf16 instructions computes in fp32, also with such weights.
    Raises ValueError for int8 where it is not supported.

    Making one packs the weights, so it is kept for several batches. `advice` is a sentence for the
    user where the kernels are missing.
    """

    def __init__(self, model: GPT, precision: str = "") -> None:
        # The cache that is fastest on the device.
        weight = model.wte.weight
        self.model, self.config, self.device = model, model.config, weight.device
        self.cache_type = choose_cache(model)
        self.has_kernels = self.cache_type is PackedCache
        self.uses_graphs = self.cache_type is StaticCache
        self.cache: RaggedCache | None = None

        # Where the kernels are missing, `kernels.library()` is the error.
        self.advice = ""
        reason: object = "it needs a CPU and a model with fp32 weights."
        if weight.is_cpu and weight.dtype == torch.float32 and not self.has_kernels:
            reason = kernels.library()
            self.advice = f"Decoding without kernels takes two to four times as long. {reason}"
        if precision == "int8" and not self.has_kernels:
            raise ValueError(f"int8=true is not supported: {reason}")

        # The type of the cache, and the products of the weights in their precision.
        self.prefill_model = model
        self.dtype = native_dtype(model)
        product = partial(cast, dtype=self.dtype)
        if self.has_kernels:
            if not precision:
                precision = "fp32" if autocast_dtype(model) == torch.float32 else "bf16"
            self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            product = partial(kernels.product, precision=precision)
            if precision != "fp32" and native("bf16"):
                # For many tokens at once, torch's products are faster than our kernels.
                self.prefill_model = pack(model, partial(cast, dtype=torch.bfloat16))
        self.step_model = pack(model, product)

    def nbytes(self, rows: int, positions: int) -> int:
        """The bytes that decoding takes: those of the cache, the logits and the probabilities."""
        # The layout of a cache decides its bytes, so one row is made and measured.
        positions = min(positions, self.config.block_size)
        one_row = self.cache_type(self.config, 1, positions, self.device, self.dtype)
        cache_bytes = sum(tensor.nbytes for tensor in (*one_row.keys, *one_row.values))
        return rows * (cache_bytes + 3 * 4 * self.config.vocab_size)

    def begin(self, rows: int, positions: int) -> None:
        """Make room for up to `rows` sequences of up to `positions` tokens, which join later."""
        positions = min(positions, self.config.block_size)
        if self.cache is None or not self.cache.fits(rows, positions):
            # First free the memory of the old cache.
            self.cache = None
            self.graphs: dict[int, CapturedCall] = {}
            self.warmed_up: set[int] = set()
            self.cache = self.cache_type(self.config, rows, positions, self.device, self.dtype)
            # What a step reads: the last tokens [rows, 1], and the n - 1 before them for n-grams.
            self.last = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
            self.previous_ids = self.last.new_zeros(rows, self.config.ngrams - 1)
        self.cache.lengths = []
        self.window_starts: list[int] = []

    def join(self) -> None:
        """Add a row after the others. The next step prefills it with its sequence."""
        self.cache.join()
        self.window_starts.append(-1)

    @torch.inference_mode()
    def next_logits(self, sequences: list[list[int]]) -> Tensor:
        """Logits `[B, V]` for the next tokens; each sequence is one token longer than last time."""
        # Cache what precedes the last token of each.
        rows = len(sequences)
        self.prefill(sequences)
        self.cache.begin_step()

        # Write the step's input into fixed tensors, which CUDA graphs read.
        n_previous = self.config.ngrams - 1
        if n_previous:
            # Tokens before the window may be among them: the model ignores those by position.
            padding = [NO_TOKEN] * n_previous
            previous = [padding + sequence[-1 - n_previous : -1] for sequence in sequences]
            self.previous_ids[:rows] = torch.tensor([ids[-n_previous:] for ids in previous])
        self.last[:rows] = torch.tensor([[sequence[-1]] for sequence in sequences])

        logits = self.graph_step() if self.uses_graphs else self.step()
        return logits[:rows]

    def prefill(self, sequences: list[list[int]]) -> None:
        """Cache all but the last token of each new sequence, and of each whose window moved."""
        filled: dict[tuple[int, ...], int] = {}
        for row, sequence in enumerate(sequences):
            start = window_start(len(sequence), self.config.block_size)
            if start == self.window_starts[row]:
                continue
            self.window_starts[row] = start
            earlier = tuple(sequence[start:-1])
            # Several samples of one prompt need one prefill.
            if earlier in filled:
                self.cache.copy_row(filled[earlier], row)
                continue
            filled[earlier] = row
            self.prefill_row(row, earlier)

    def prefill_row(self, row: int, ids: tuple[int, ...]) -> None:
        # A sequence of one token has nothing before it.
        self.cache.lengths[row] = len(ids)
        if ids:
            idx = torch.tensor([ids], device=self.device)
            is_packed = self.prefill_model is not self.model
            precision = without_autocast if is_packed else native_autocast
            with precision(self.model), suppress(StopPrefill):
                self.prefill_model.features(idx, PrefillCache(self.cache, row))

    def step(self) -> Tensor:
        """Logits `[B, V]` after the tokens `last`, which the cache then holds too."""
        rows = self.cache.step_rows
        self.cache.previous_ids = self.previous_ids[:rows] if self.config.ngrams > 1 else None
        # Packed products have their own precision.
        with without_autocast(self.model):
            features = self.step_model.features(self.last[:rows], self.cache)
            return self.step_model.head(features[:, -1])

    def graph_step(self) -> Tensor:
        """The same by a CUDA graph, from the second step that attends to `cache.end` positions."""
        # A graph has fixed shapes, so there is one for each number of positions attended to.
        end = self.cache.end
        if end not in self.warmed_up:
            # Libraries set themselves up in their first call, which cannot be captured.
            self.warmed_up.add(end)
            return self.step()
        try:
            if end not in self.graphs:
                self.graphs[end] = CapturedCall(self.step, self.device)
        except RuntimeError as error:
            # The end of a failed capture fails, too.
            cause = error.__context__ or error
            warnings.warn(f"The CUDA graph of a step could not be captured, which makes decoding "
                          f"slower: {cause}", stacklevel=1)
            self.uses_graphs = False
            # The failed step may have moved the cache on already.
            self.cache.length = max(self.cache.lengths) - 1
            return self.step()
        return self.graphs[end].replay()

    def drop(self, row: int) -> None:
        """Remove a row. The last one takes its place, as in the sequences of the next step."""
        self.cache.drop(row)
        self.window_starts[row] = self.window_starts[-1]
        self.window_starts.pop()


def choose_cache(model: GPT) -> type[RaggedCache]:
    """The fastest cache for the device and the type of the weights."""
    weight = model.wte.weight
    if weight.is_cuda:
        return StaticCache
    if weight.is_cpu and weight.dtype == torch.float32 and kernels.available():
        return PackedCache
    return RaggedCache


def window_start(length: int, block_size: int) -> int:
    """The index of the first token that is the context of a sequence of `length` tokens.

    0 while all fit. Beyond `block_size` the window moves in steps of half a block, so that the
    cache is refilled once per half block, and the same tokens have the same context without one.
    """
    half = max(block_size // 2, 1)
    return max(0, -((block_size - length) // half) * half)


def autocast_dtype(model: GPT) -> torch.dtype:
    """The type of autocast where it is on, else that of the weights."""
    weight = model.wte.weight
    is_on = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if is_on else weight.dtype


def native_dtype(model: GPT) -> torch.dtype:
    """The same, but the type of the weights if a CPU would emulate that of autocast."""
    dtype, weight = autocast_dtype(model), model.wte.weight
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    return weight.dtype if weight.is_cpu and not native(precision) else dtype


def native_autocast(model: GPT) -> AbstractContextManager[None]:
    """Autocast unchanged, or off if a CPU would emulate its type."""
    is_native = native_dtype(model) == autocast_dtype(model)
    return nullcontext() if is_native else without_autocast(model)


def without_autocast(model: GPT) -> AbstractContextManager[None]:
    return torch.autocast(model.wte.weight.device.type, enabled=False)
