"""The processes that torchrun has started to train one run, and their communication.

Every process has all weights. A step's micro-steps are divided among the processes, their gradients
are added in a fixed order, and each process updates a part of the parameters, of which it alone has
the optimizer state and the sum of the gradients (as ZeRO stage 2, arXiv:1910.02054). With one
process, nothing here communicates. Knows no model and no files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar
from warnings import catch_warnings

import torch
import torch.distributed as dist
from torch import Tensor

# A process waits this long for the others, for example while rank 0 prepares the data.
TIMEOUT = timedelta(days=7)
# It waits this long for the others to start and to connect.
CONNECT_TIMEOUT = timedelta(minutes=10)
# For torchrun's own store, which was there before the process, unless torchrun was killed.
STORE_TIMEOUT = timedelta(seconds=30)
# For the first process of its node to find the same mistake.
REPORT_TIMEOUT = timedelta(seconds=2)
T = TypeVar("T")


class World:
    """The processes of a run: `size` of them, of which this one is `rank`; rank 0 is the first.

    Only the first process touches the run's folder, prints, and samples.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.by_torchrun = "TORCHELASTIC_RUN_ID" in environment
        self.size = int(environment["WORLD_SIZE"]) if self.by_torchrun else 1
        self.rank = int(environment["RANK"]) if self.by_torchrun else 0
        self.local_rank = int(environment["LOCAL_RANK"]) if self.by_torchrun else 0
        self.local_size = int(environment["LOCAL_WORLD_SIZE"]) if self.by_torchrun else 1
        self.restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store_timeout = STORE_TIMEOUT if has_store else CONNECT_TIMEOUT
        self.is_first = self.rank == 0

    @contextmanager
    def joined(self, use_gpus: bool = True) -> Iterator[None]:
        """Connect the processes while the context lasts. Each has a GPU, where there are any.

        A process that ends, or fails, ends the others: the first with one sentence, unless the
        failure was its own, the others without any.
        """
        if self.size == 1:
            yield
            return
        backend = "gloo"
        if use_gpus and torch.cuda.is_available():
            self.choose_gpu()
            backend = "cpu:gloo,cuda:nccl"
        try:
            # Connect to the other processes.
            store, _, _ = next(dist.rendezvous("env://", timeout=self.store_timeout))
            if self.size == self.local_size:
                # torchrun keeps the store when it restarts the processes. In a new namespace, none
                # finds the address of a process that has ended.
                store = dist.PrefixStore(f"restart {self.restarts}", store)
            # The group itself would wait for a process that has failed as long as in training.
            store.set(f"started {self.rank}", "")
            store.wait([f"started {rank}" for rank in range(self.size)], CONNECT_TIMEOUT)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size,
                                    timeout=TIMEOUT)
            # Only the first process prints. Libraries give all the same warnings.
            try:
                if self.is_first:
                    yield
                else:
                    with (open(os.devnull, "w") as nowhere, redirect_stdout(nowhere),
                          catch_warnings(action="ignore")):
                        yield
            except ValueError as error:
                self.report_once(store, error)
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            # The process that has failed reports its own error.
            if not self.is_first:
                sys.exit(1)
            raise OSError("Another process of this run has ended or cannot be reached. The run is "
                          "saved up to its last checkpoint: the same command resumes there."
                          ) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def report_once(self, store: dist.Store, error: ValueError) -> NoReturn:
        """Raise a mistake in the first process of each node; exit from those that found it, too.

        If only another process has found it, for example because its GPU has too little memory,
        that one raises OSError, which all processes print.
        """
        reported = f"reported by {self.rank - self.local_rank}"
        if self.local_rank == 0:
            # The store may have ended with torchrun.
            with suppress(RuntimeError):
                store.set(reported, "")
            raise error
        try:
            store.wait([reported], REPORT_TIMEOUT)
        except dist.DistStoreError:
            raise OSError(str(error)) from error
        sys.exit(1)

    def choose_gpu(self) -> None:
        """Use the GPU with the number of this process. Raises ValueError if there are too few."""
        gpus = torch.cuda.device_count()
        if self.local_size > gpus:
            raise ValueError(f"torchrun started {self.local_size} processes for {gpus} GPUs: use "
                             f"--nproc-per-node={gpus}, or training.device=cpu.")
        torch.cuda.set_device(self.local_rank)

    def first(self, call: Callable[[], T]) -> T:
        """Call a function in the first process, and return its result in all of them.

        If it raises, the first process raises and the others exit. A ValueError, a mistake of the
        user's, is raised in all of them: each node reports it and ends its torchrun.
        """
        if self.size == 1:
            return call()
        result, error = None, None
        if self.is_first:
            try:
                result = call()
            except BaseException as raised:
                error = raised
        # The others wait here. They also have to learn of an error, or they would wait forever.
        mistake = str(error) if isinstance(error, ValueError) else ""
        told = [(result, error is not None, mistake)]
        dist.broadcast_object_list(told, src=0)
        if error:
            raise error
        result, failed, mistake = told[0]
        if mistake:
            raise ValueError(mistake)
        if failed:
            sys.exit(1)
        return result

    def fail(self, error: Exception) -> NoReturn:
        """Raise an error that all processes have found, as `first` does."""
        if self.is_first or isinstance(error, ValueError):
            raise error
        sys.exit(1)

    def only_first(self, make: Callable[[], T]) -> T | Silent:
        """The result of `make` in the first process; in the others an object that does nothing."""
        return make() if self.is_first else Silent()

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate tensors `[N]` of all processes in the order of their ranks: `[size * N]`."""
        if self.size == 1:
            return values
        everyone = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(everyone, values)
        return torch.cat(everyone)

    def agree(self, seconds: float, interrupted: bool) -> tuple[float, bool]:
        """The first process's clock, and whether any process was interrupted."""
        if self.size == 1:
            return seconds, interrupted
        values = self.gather(torch.tensor([seconds, interrupted], dtype=torch.float64))
        return values[0].item(), values[1::2].any().item()

    def exchange(self, sent: Tensor, sizes: list[int]) -> tuple[Tensor, dist.Work]:
        """Start to send the first `sizes[0]` numbers to rank 0, the next `sizes[1]` to rank 1, ...

        All processes have the same sizes. Once the returned work is waited for, the returned tensor
        has what each rank has sent to this one: `[size * sizes[rank]]`.
        """
        own = sizes[self.rank]
        received = sent.new_empty(self.size * own)
        work = dist.all_to_all_single(received, sent, [own] * self.size, sizes, async_op=True)
        return received, work

    @torch.no_grad()
    def share(self, parts: list[list[Tensor]]) -> None:
        """Copy tensors from the process that owns them to all others, in place.

        `parts[rank]` are the tensors of a rank; all have the same format and are contiguous.
        """
        if self.size == 1:
            return
        # An all-gather needs tensors of one length: pad the own ones, flat, to the longest.
        longest = max(sum(tensor.numel() for tensor in part) for part in parts)
        sent = next(tensor for part in parts for tensor in part).new_zeros(longest)
        own = parts[self.rank]
        if own:
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            sent[: flat.numel()] = flat
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)

        # Copy the values of the other ranks into their tensors.
        for rank, part in enumerate(parts):
            if rank == self.rank:
                continue
            sizes = [tensor.numel() for tensor in part]
            for tensor, values in zip(part, received[rank][: sum(sizes)].split(sizes), strict=True):
                tensor.copy_(values.view_as(tensor))


class Silent:
    """Takes the place of an object of the first process: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *failure: object) -> None:
        pass


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process ended, or the network to it."""
    text = str(error).lower()
    words = ("connection closed by peer", "connection reset by peer", "broken pipe",
             "nccl communicator was aborted", "remote process exited", "socket timeout",
             "failed to recv", "connection refused", "connectfullmesh failed",
             "client socket has timed out", "wait timeout after", "gloo/transport/tcp/pair")
    return any(word in text for word in words)
