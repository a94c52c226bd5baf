"""Replicas: the processes that measure shares of one run together, each with an engine of its own.

They talk seldom and little, and wait without working: MPI's blocking calls spin, and would take a
core from the engines that are still measuring. So every wait here polls, with pauses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from speedbench.launch import Launch
from speedbench.types import UserError

T = TypeVar("T")

PAUSE_S = 0.02


class AgreedError(UserError):
    """A UserError that every replica raises, so that they can end together."""


class Replicas:
    """This process (`rank`) among `size`. All must call the same methods in the same order."""

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm  # an mpi4py communicator; None for one process alone
        self.rank: int = 0 if comm is None else comm.Get_rank()
        self.size: int = 1 if comm is None else comm.Get_size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """What every replica gave, by rank. Returns when all have given theirs."""
        if self.size == 1:
            return [value]
        if self.is_first:
            values = [value, *(self._receive(rank) for rank in range(1, self.size))]
            for rank in range(1, self.size):
                self._send(values, rank)
            return values
        self._send(value, 0)
        received: list[T] = self._receive(0)
        return received

    def agree(self, do: Callable[[], T]) -> T:
        """Do something that may fail on some replicas; if it does on one, all raise AgreedError."""
        if self.size == 1:
            return do()
        result: list[T] = []
        fault: str | None = None
        try:
            result.append(do())
        except UserError as error:
            fault = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait
            fault = f"{type(error).__name__}: {error}"
        faults = self.exchange(fault)
        for rank, sentence in enumerate(faults):
            if sentence is not None:
                raise AgreedError(
                    sentence if len(set(faults)) == 1 else f"replica {rank}: {sentence}"
                )
        return result[0]

    def from_first(self, make: Callable[[], T]) -> T:
        """What replica 0 makes, on all of them."""
        value = self.agree(lambda: make() if self.is_first else None)
        return cast(T, self.exchange(value)[0])

    def meet(self) -> None:
        """Wait until all are here, and leave as nearly at one moment as can be.

        The pauses of `exchange` are up to PAUSE_S apart; once all are near, MPI's own barrier,
        which spins, is short and exact.
        """
        if self.size > 1:
            self.exchange(None)
            self._comm.Barrier()

    def _send(self, value: object, rank: int) -> None:
        request = self._comm.isend(value, dest=rank)
        while not request.test()[0]:
            time.sleep(PAUSE_S)

    def _receive(self, rank: int) -> Any:
        while (message := self._comm.improbe(source=rank)) is None:
            time.sleep(PAUSE_S)
        return message.recv()

    def leave(self) -> None:
        """The orderly end of all. Whoever goes without makes the launcher end the others."""
        if self.size > 1:
            from mpi4py import MPI

            self.exchange(None)
            MPI.Finalize()


ALONE = Replicas()


def join(launch: Launch) -> Replicas:
    """Find the other replicas of this launch. Starts MPI only if there are any: engines bring
    their own. Raises UserError if they cannot be found."""
    if launch.n_replicas == 1:
        return ALONE
    try:
        import mpi4py

        # Ended by `leave` only: a replica that dies on its way must not wait for the others in
        # MPI's own end, while they wait for it.
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{launch.launcher} started {launch.size} processes, which need mpi4py and an MPI "
            f"library to gather their records ({error}): install both (pip install mpi4py), or "
            "start one process"
        ) from None
    if MPI.COMM_WORLD.Get_size() != launch.size:
        raise UserError(
            f"{launch.launcher} started {launch.size} processes, MPI sees "
            f"{MPI.COMM_WORLD.Get_size()}: use the launcher of the installed MPI (with srun: "
            "--mpi=pmix), or start one process"
        )
    return Replicas(MPI.COMM_WORLD)
