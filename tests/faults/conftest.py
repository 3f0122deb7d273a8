"""The rig, one for each pytest process, and the fault suite's table at the end."""

from collections.abc import Callable, Iterator, Sequence

import pytest

from app.devstack.processes import Reaper
from tests.faults.invariants import broken
from tests.faults.ledger import Ledger
from tests.faults.report import outcome
from tests.faults.rig import Rig
from tests.stack import new_directory

Record = Callable[[str, object], None]
Hold = Callable[..., None]


@pytest.fixture(scope="session")
def _rig(reaper: Reaper) -> Iterator[Rig]:
    with new_directory() as directory, Ledger() as ledger:
        rig = Rig(directory, reaper, ledger)
        try:
            rig.start()
            yield rig
        finally:
            rig.stop()


@pytest.fixture
def rig(_rig: Rig) -> Rig:
    _rig.heal()
    return _rig


@pytest.fixture
def holds(rig: Rig, record_property: Record) -> Hold:
    """`holds(fault, moment, runs)`: everything that has to be true of these runs is, and it goes into the table."""

    def check(fault: str, moment: str, runs: Sequence[str]) -> None:
        found = broken(rig, runs)
        lost, doubled, takeovers = len(found.lost), len(found.doubled), rig.takeovers(runs)
        record_property(*outcome(fault, moment, runs=len(runs), lost=lost, doubled=doubled, takeovers=takeovers))
        assert not found.all, "\n".join(found.all)

    return check
