"""The running account of many units, and the ceiling on what is bad. Used by `data_prep.run` and `data_prep.merge`."""

from collections import Counter
from dataclasses import dataclass, field

from data_prep.pack import UnitReport
from data_prep.plan import check_share_of_bad


@dataclass
class Tally:
    """Sums over the units that were added."""

    listed: int = 0
    """Samples."""
    packed: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Reason to count."""
    _lonely: int = 0  # images that no caption names: bad, but no samples

    def add(self, unit: UnitReport) -> None:
        """Counts one more unit."""
        self.listed += unit.samples_listed
        self.packed += unit.samples_present
        self.bad.update(unit.bad())
        self._lonely += sum(left.count - left.samples for left in unit.left_out if left.kind == "bad")

    def check(self, max_bad: float) -> None:
        """Raises InputError with the table of reasons where more than `max_bad` of the samples are bad."""
        check_share_of_bad(self.bad, self.listed + self._lonely, max_bad)
