"""What a verification found: one row a case and stage, and the report that holds them."""

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["STAGES", "VerifyReport", "VerifyRow"]

# In the order of the data: the first that fails is the one to look at.
STAGES = ("prompt", "views", "run", "tower", "rows", "logits", "tokens")


@dataclass(frozen=True, slots=True)
class VerifyRow:
    """One stage of one case.

    Attributes:
        case: name of the case.
        stage: one of STAGES.
        error: what was measured; its unit depends on the stage and is the bound's.
        bound: the largest error that passes.
        note: what the number does not say; may be empty.
    """

    case: str
    stage: str
    error: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """All rows of a verification.

    Attributes:
        model: name of the checkpoint.
        reference: what it was compared with.
        device, dtype, backend: where and how ovfast computed.
        rows: one a case and stage, stages of a case in the order of the data.
        notes: what was left out, and why.
    """

    model: str
    reference: str
    device: str
    dtype: str
    backend: str
    rows: tuple[VerifyRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def first_failure(self) -> VerifyRow | None:
        """The failing row of the earliest stage: later stages fail because of it."""
        failing = [row for row in self.rows if not row.ok]
        return min(failing, key=lambda row: STAGES.index(row.stage), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; errors that are no finite number become None."""
        rows = [
            asdict(row) | {"ok": row.ok, "error": row.error if math.isfinite(row.error) else None}
            for row in self.rows
        ]
        first = self.first_failure
        summary = {"ok": self.ok, "first_failure": first and f"{first.case}: {first.stage}"}
        return summary | asdict(self) | {"rows": rows}
