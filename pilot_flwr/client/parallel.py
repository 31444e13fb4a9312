"""Data parallelism within a client: one process per GPU, or several on a CPU.

A session runs in the process of its client, rank 0, and calls `in_parallel` for training and for
evaluation: the other ranks then run a function on their share of the batches. `Ranks` has the
collectives that make the result equal to that of one process, up to rounding. Only rank 0 reads and
writes the private state, adds noise and uploads.

The first call starts the other ranks, without torchrun. They keep their base model until the
process of rank 0 ends or is killed. If one of them dies or raises an error, all of them are killed,
rank 0 raises the error, and the next call starts new ones. They connect to each other on this
machine alone. Rank 0 calls each of them through a socket pair of the two; collectives carry tensors
and JSON.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore

from pilot_flwr.errors import PilotError, TrainingError
from pilot_flwr.protocol import State

START_SECONDS = 300.0
"""Limit for the imports of the other ranks, slow from a slow disk, and for connecting all ranks."""

GRACE_SECONDS = 5.0
"""How long rank 0 waits for another rank's report when a collective has failed."""

_COMMAND = [sys.executable, "-P", "-m", "pilot_flwr.client.parallel"]
_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # NCCL would end the process of rank 0 when another rank dies; `_RankProcesses` reports it.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
_FOREVER = timedelta(days=365)  # a rank that waits for another one is not an error
_TICK_MILLISECONDS = 1000

P = ParamSpec("P")
T = TypeVar("T")


class Ranks:
    """The rank of this process among the `number` processes of a client, and their collectives.

    By default there is one process, and no method communicates. All ranks must call the same
    methods in the same order.
    """

    def __init__(self, rank: int = 0, number: int = 1) -> None:
        self.rank, self.number = rank, number

    def own(self, parts: Sequence[T]) -> list[T]:
        """Return this rank's share of `parts`: every `number`-th from `rank` on."""
        return list(parts[self.rank :: self.number])

    def shard(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Return every rank's share of the parameters, about equal in elements, in their order."""
        sizes, owners = [0] * self.number, {}
        for parameter in sorted(parameters, key=lambda p: p.numel(), reverse=True):
            owners[parameter] = least = sizes.index(min(sizes))
            sizes[least] += parameter.numel()
        return [[p for p in parameters if owners[p] == rank] for rank in range(self.number)]

    def totals(self, *counts: int) -> list[int]:
        """Return the sum of each count over the ranks."""
        if self.number == 1:
            return list(counts)
        summed = torch.tensor(counts)
        dist.all_reduce(summed)
        return summed.tolist()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.number > 1:
            pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in pending:
                work.wait()

    def add_up_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the ranks; None if no rank has one."""
        if self.number == 1:
            return
        present = self.totals(*(int(p.grad is not None) for p in parameters))
        found = [p for p, count in zip(parameters, present, strict=True) if count]
        for parameter in found:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add_up([p.grad for p in found if p.grad is not None])

    def spread(self, tensors: Sequence[Tensor], *, source: int = 0) -> None:
        """Replace each tensor by that of rank `source`."""
        if self.number > 1:
            pending = [dist.broadcast(t.detach(), source, async_op=True) for t in tensors]
            for work in pending:
                work.wait()

    def spread_state(self, state: State) -> State:
        """Return rank 0's state, on the CPU."""
        layout = self.collect(_layout(state))[0]
        if self.rank > 0:
            state = {name: _empty(row) for name, row in layout.items()}
        self.spread(list(state.values()))
        return state

    def collect(self, value: T) -> list[T]:
        """Return the values of all ranks; JSON must be able to represent them."""
        if self.number == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.number)]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        longest = int(max(sizes))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))))
        return [
            json.loads(bytes(text[: int(size)].tolist()))
            for text, size in zip(texts, sizes, strict=True)
        ]

    def gather(self, state: State, device: torch.device) -> list[State]:
        """Return the states of all ranks on `device` in rank 0, and the own state in any other."""
        layouts = self.collect(_layout(state))
        if self.rank > 0:
            for tensor in state.values():
                dist.send(tensor.to(device).contiguous(), 0)
            return [state]
        states = [state]
        for rank, layout in enumerate(layouts[1:], start=1):
            states.append({name: _empty(row, device) for name, row in layout.items()})
            for tensor in states[-1].values():
                dist.recv(tensor, rank)
        return states


def _layout(state: State) -> dict[str, list[Any]]:
    return {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in state.items()}


def _empty(row: Sequence[Any], device: torch.device | None = None) -> Tensor:
    return torch.empty(row[0], dtype=getattr(torch, row[1]), device=device)


@contextlib.contextmanager
def in_parallel(
    number: int,
    device: torch.device,
    function: Callable[Concatenate[Ranks, P], object],
    *args: P.args,
    **kwargs: P.kwargs,
) -> Iterator[Ranks]:
    """Run `function` in the other ranks of this client while the block runs in rank 0.

    `device` is that of rank 0; on GPUs, rank r uses the r-th that this process sees. Raises
    `TrainingError` if another rank dies or `function` fails there; a `PilotError` is kept.
    """
    global _processes
    if number == 1:
        yield Ranks()
        return
    if _processes is None or not _processes.serves(number, device):
        end_ranks()
        _processes = _RankProcesses(number, device)
    try:
        with _processes.running((function, args, kwargs)) as ranks:
            yield ranks
    except BaseException:  # some ranks may still be in a collective
        end_ranks()
        raise


def end_ranks() -> None:
    """End the other ranks, which frees their models and features."""
    global _processes
    if _processes is not None:
        _processes.close()
        _processes = None


class _Start(NamedTuple):
    """The first message to a rank."""

    rank: int
    number: int
    device: str
    port: int
    """Of the store by which the ranks find each other."""
    threads: int
    """For torch on the CPU."""
    parent: int


class _Child:
    """One of the other ranks, and the connection to it."""

    def __init__(self, start: _Start) -> None:
        self.rank, self.number = start.rank, start.number
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(  # nosec B603  # no shell, this package
                [*_COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.connection.send(start)

    def hear(self) -> BaseException | None:
        """Wait for its next report: an error, or None for success."""
        try:
            report: BaseException | None = self.connection.recv()
            return report
        except (EOFError, OSError):
            code = self.process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            return TrainingError(
                f"Process {self.rank + 1} of the {self.number} of this client {how} (often out of "
                "memory). Its other processes were ended; the private state is unchanged."
            )

    def kill(self) -> None:
        """Kill the process and its children."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class _RankProcesses:
    """The other ranks of this process, and their process group."""

    def __init__(self, number: int, device: torch.device) -> None:
        self._number, self._device = number, device
        self._threads = max(1, torch.get_num_threads() // number)
        listener = socket.create_server(("127.0.0.1", 0))  # TCPStore itself would listen everywhere
        port = listener.getsockname()[1]
        start = _Start(0, number, device.type, port, self._threads, os.getpid())
        self._children: list[_Child] = []
        self._failure: BaseException | None = None
        try:
            for rank in range(1, number):
                self._children.append(_Child(start._replace(rank=rank)))
            self._connect(start, listener.detach())
        except BaseException:
            self.close()
            raise

    def serves(self, number: int, device: torch.device) -> bool:
        """Return whether these are the ranks of `number` processes on `device`, and all alive."""
        alive = all(child.process.poll() is None for child in self._children)
        return alive and (self._number, self._device) == (number, device)

    @contextlib.contextmanager
    def running(self, task: tuple[Any, ...]) -> Iterator[Ranks]:
        """Let the other ranks run `task` in the block; raise the error of the first that fails."""
        for child in self._children:
            with contextlib.suppress(OSError):  # it has died: `_watch` reports it
                child.connection.send(task)
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield Ranks(0, self._number)
            watcher.join()
        except BaseException as error:
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                watcher.join(GRACE_SECONDS)  # a failed collective: a rank reports the cause
            failure = self._failure
            self._kill()
            watcher.join()
            if failure is not None and isinstance(error, Exception):
                raise failure from error
            raise
        finally:
            torch.set_num_threads(threads)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Kill the other ranks and leave the process group."""
        self._kill()
        for child in self._children:
            child.connection.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _kill(self) -> None:
        for child in self._children:
            child.kill()

    def _connect(self, start: _Start, listener: int) -> None:
        store = _store(start, listener)
        deadline = time.monotonic() + START_SECONDS
        for child in self._children:
            if not child.connection.poll(max(0.0, deadline - time.monotonic())):
                raise TrainingError(
                    f"Process {child.rank + 1} of the {start.number} of this client did not start "
                    f"within {START_SECONDS:.0f} s."
                )
            if (failure := child.hear()) is not None:
                raise failure
        for child in self._children:
            child.connection.send(None)
        _join(start, store)

    def _watch(self) -> None:
        """Wait for the report of every rank; on a failure, kill all and abort rank 0's wait."""
        pending = {child.connection: child for child in self._children}
        while pending:
            for connection in wait(list(pending)):
                assert isinstance(connection, Connection)
                failure = pending.pop(connection).hear()
                if failure is not None:
                    self._failure = failure
                    self._kill()
                    if self._device.type == "cuda":  # gloo notices by itself, NCCL does not
                        group = dist.distributed_c10d._get_default_group()
                        group._get_backend(self._device).abort()
                    return


_processes: _RankProcesses | None = None
atexit.register(end_ranks)


def _store(start: _Start, listener: int | None = None) -> TCPStore:
    return TCPStore(
        "127.0.0.1",
        start.port,
        is_master=listener is not None,
        timeout=timedelta(seconds=START_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _join(start: _Start, store: TCPStore) -> None:
    """Join the process group; all ranks must do so at the same time."""
    os.environ.update(_ENVIRONMENT)
    if start.device == "cuda":
        torch.cuda.set_device(start.rank)
    dist.init_process_group(
        "gloo" if start.device == "cpu" else f"cpu:gloo,{start.device}:nccl",
        store=store,
        rank=start.rank,
        world_size=start.number,
        timeout=timedelta(seconds=START_SECONDS),
    )
    dist.distributed_c10d._set_pg_timeout(_FOREVER)


def main(descriptor: int) -> None:
    """Run rank 0's calls as another rank, until rank 0 ends."""
    for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 decides when to end
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    start: _Start = connection.recv()
    watcher = threading.Thread(target=_end_with, args=(descriptor, start), daemon=True)
    watcher.start()
    try:
        _serve(connection, start)
    except EOFError:
        watcher.join()  # it ends this process


def _serve(connection: Connection, start: _Start) -> None:
    torch.set_num_threads(start.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    connection.send(None)
    connection.recv()
    _join(start, _store(start))
    ranks = Ranks(start.rank, start.number)
    while True:
        function, args, kwargs = connection.recv()
        try:
            function(ranks, *args, **kwargs)
        except Exception as error:
            if not isinstance(error, PilotError):
                traceback.print_exc()
            connection.send(_sendable(error, ranks))
        else:
            connection.send(None)


def _sendable(error: Exception, ranks: Ranks) -> Exception:
    """Return a `PilotError` itself, and a `TrainingError` for others: some cannot be pickled."""
    if isinstance(error, PilotError):
        return error
    return TrainingError(
        f"Process {ranks.rank + 1} of the {ranks.number} of this client failed: "
        f"{type(error).__name__}: {error}"
    )


def _end_with(descriptor: int, start: _Start) -> None:
    """End this process when rank 0 ends, even while the main thread computes."""
    poller = select.poll()
    poller.register(descriptor, select.POLLRDHUP)
    # The socket stays open if a child of rank 0 has inherited it.
    while not poller.poll(_TICK_MILLISECONDS) and os.getppid() == start.parent:
        pass
    os._exit(1)


if __name__ == "__main__":
    from pilot_flwr.client import parallel  # `_Start` is unpickled as this module's

    parallel.main(int(sys.argv[1]))
