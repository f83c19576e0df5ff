"""Where a sweep's experiments run, one at a time in each: a clone on this machine, or an actor of Ray's on a node."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path


class Job(ABC):
    """An experiment that a slot runs."""

    slot: "Slot"
    name: str
    log: Path  # what it has printed
    is_lost = False  # it ended with its machine: nobody is to blame, and elsewhere it goes on

    @abstractmethod
    def lines(self) -> Iterator[str]:
        """Yield the whole lines that were printed since the last time."""

    @property
    @abstractmethod
    def status(self) -> int | None:
        """The exit status; None as long as it runs."""

    @abstractmethod
    def ask_to_stop(self) -> None:
        """Have it save what it has and end, as Ctrl-C does."""

    @abstractmethod
    def stop(self) -> None:
        """Have it save what it has, and wait until it has ended."""


class Slot(ABC):
    """A place for one experiment at a time."""

    place: str | None  # its machine; None as long as it has none

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether an experiment can begin there."""

    @abstractmethod
    def run(self, name: str, overrides: Sequence[str], log: Path) -> Job:
        """Begin an experiment of that name with `-S overrides`."""

    @abstractmethod
    def hand_back(self, name: str) -> None:
        """Have the repository have the experiment."""

    @abstractmethod
    def close(self) -> None:
        """Remove what was made for it."""

    def leave(self, why: str) -> None:  # noqa: B027
        """Have no slot use this one's machine any more, on which failed what trains elsewhere; where there is one."""
