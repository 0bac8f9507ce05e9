"""The native half of the package."""

from typing import Any

__version__: str

class Error(RuntimeError):
    """What Phalanx says is wrong, in the words of the command line."""

def answer(arguments: list[str], toml: str | None = None, table: str | None = None) -> str:
    """What ``phalanx ARGUMENTS --json`` prints; the job's contents may be given as TOML or in JSON."""

class Listener:
    """Where rank 0 will be found."""

    def __init__(self, host: str) -> None: ...
    @property
    def address(self) -> str: ...
    @property
    def secret(self) -> str: ...

class Communicator:
    """A process's way to the others of its job."""

    def __init__(
        self, rank: int, ranks: int, address: str, secret: str, timeout_s: float, identity: str, listener: Listener | None = None
    ) -> None: ...
    def post(self, operations: list[Any]) -> Batch:
        """Starts operations; the tensors that they name must stay until the batch is finished."""
    def flight(self) -> str | None:
        """What this rank did last and what it knows of the others, in JSON."""
    def close(self) -> None:
        """Completes what was posted and takes leave of the peers."""

class Batch:
    """Operations under way together."""

    def is_done(self) -> bool: ...
    def wait(self, limit_s: float) -> bool:
        """Waits until all are done, or for some seconds; whether they are."""
    def expire(self) -> None:
        """Has those that are not done fail, naming the peers that they wait for."""
    def finish(self) -> None:
        """Copies the results into the tensors; raises what went wrong."""
    def announce(self, completions: Completions, number: int) -> None:
        """Tells the queue a number once all are done."""

class Completions:
    """A queue of batches that are done."""

    def __init__(self) -> None: ...
    def next(self, limit_s: float) -> int | None:
        """The number of the next one; none if there is none for so long."""
