"""The file format of measurements: JSON lines, a header and then one row a figure.

Owns what may stand in such a file. A row is written as soon as it is known, so that a run which
ends early keeps what it has. Every value is checked when a row is made and again when it is read:
a file of another schema, a damaged line, an unknown key or a figure of a GPU under a header
without one is refused with its line.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ovfast.errors import OptionError
from ovfast.storage import STORAGES

__all__ = [
    "HARDWARE",
    "LOWER_IS_BETTER",
    "SCHEMA",
    "SUITES",
    "UNITS",
    "Header",
    "Key",
    "Record",
    "Row",
    "append_row",
    "read",
    "write_header",
]

SCHEMA = 1
SUITES = ("latency", "kernels", "throughput", "startup", "memory", "accuracy")
# Unit → whether less of it is better.
LOWER_IS_BETTER = {"ms": True, "bytes": True, "tokens/s": False, "%": False}
UNITS = tuple(LOWER_IS_BETTER)
HARDWARE = (
    "cpu",
    "isa",
    "num_cpus",
    "affinity",
    "governor",
    "clock_mhz",
    "memory_bytes",
    "gpu",
    "driver",
)
DEVICES = ("cpu", "cuda")

# What makes two rows measurements of the same thing: everything but the figures.
Key = tuple[str, str, str, str, str, tuple[tuple[str, int | float | str], ...]]


@dataclass(frozen=True, slots=True)
class Header:
    """What was run, where, and how quiet it was there.

    Attributes:
        command: that makes the file again, without paths of this machine.
        date: ISO 8601, UTC.
        commit, dirty: of the checkout; None outside of one.
        hardware: one entry for each of HARDWARE, None where it cannot be read.
        versions: package → version, None where it is absent.
        threads: of every side.
        machine: the calibration, `Calibration.as_dict`.
        quiet: load before the run and the verdict on it.
        schema: of the file.
    """

    command: str
    date: str
    commit: str | None
    dirty: bool | None
    hardware: Mapping[str, Any]
    versions: Mapping[str, str | None]
    threads: int
    machine: Mapping[str, Any]
    quiet: Mapping[str, Any]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _need(self.schema == SCHEMA, "schema", self.schema, f"{SCHEMA}, which this ovfast writes")
        for name in ("command", "date"):
            _need(_is_text(getattr(self, name)), name, getattr(self, name), "text")
        _need(self.commit is None or _is_text(self.commit), "commit", self.commit, "text or null")
        _need(self.dirty in (True, False, None), "dirty", self.dirty, "true, false or null")
        for name in ("hardware", "versions", "machine", "quiet"):
            value = getattr(self, name)
            _need(isinstance(value, Mapping), name, value, "an object")
        given = sorted(self.hardware)
        _need(given == sorted(HARDWARE), "hardware", given, f"exactly {', '.join(HARDWARE)}")
        _need(type(self.threads) is int and self.threads > 0, "threads", self.threads, "1 or more")
        claims = self.gpu is None and self.machine.get("device", "cpu") != "cpu"
        _need(not claims, "machine.device", self.machine.get("device"), "cpu where gpu is null")

    @property
    def gpu(self) -> str | None:
        """The name of the GPU, None without one."""
        name: str | None = self.hardware["gpu"]
        return name


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one side.

    Attributes:
        suite: one of SUITES.
        workload: its name.
        side: "ovfast" or the name of a peer.
        storage: of the weights.
        metric: such as "ttft_ms".
        unit: one of UNITS.
        samples: all of them in the order of the rounds, so that those of two sides with the same
            index are a pair; empty only beside an error.
        parameters: what else was fixed; "device" is one of them, "cpu" or "cuda".
        floor: the physical limit in the same unit.
        predicted: what `Estimate` says.
        flops, num_bytes: of the work that a sample timed, as the roofline counts them.
        prompt_tokens: of the request, as the side counted them.
        comparable: false where a peer's prompt has other tokens than ours.
        error: why a side has no samples.
    """

    suite: str
    workload: str
    side: str
    storage: str
    metric: str
    unit: str
    samples: tuple[float, ...]
    parameters: Mapping[str, int | float | str]
    floor: float | None = None
    predicted: float | None = None
    flops: float | None = None
    num_bytes: float | None = None
    prompt_tokens: int | None = None
    comparable: bool = True
    error: str | None = None

    def __post_init__(self) -> None:
        _need(self.suite in SUITES, "suite", self.suite, f"one of {', '.join(SUITES)}")
        _need(self.storage in STORAGES, "storage", self.storage, f"one of {', '.join(STORAGES)}")
        _need(self.unit in UNITS, "unit", self.unit, f"one of {', '.join(UNITS)}")
        for name in ("workload", "side", "metric"):
            _need(_is_text(getattr(self, name)), name, getattr(self, name), "text")
        self._check_figures()
        self._check_parameters()

    def _check_figures(self) -> None:
        _need(isinstance(self.samples, tuple), "samples", self.samples, "a tuple of numbers")
        bad = [value for value in self.samples if not _is_number(value)]
        _need(not bad, "samples", bad[:1], "finite numbers of at least 0")
        has_error = _is_text(self.error)
        _need(self.error is None or has_error, "error", self.error, "text or null")
        _need(bool(self.samples) != has_error, "samples", self.samples, "samples or an error")
        for name in ("floor", "predicted", "flops", "num_bytes"):
            value = getattr(self, name)
            _need(value is None or _is_number(value), name, value, "a finite number or null")
        count = self.prompt_tokens
        _need(count is None or type(count) is int, "prompt_tokens", count, "an integer or null")
        _need(type(self.comparable) is bool, "comparable", self.comparable, "true or false")

    def _check_parameters(self) -> None:
        _need(isinstance(self.parameters, Mapping), "parameters", self.parameters, "an object")
        for name, value in self.parameters.items():
            is_value = isinstance(value, str) or _is_number(value)
            _need(is_value, f"parameters.{name}", value, "a number or text")
        device = self.parameters.get("device")
        _need(device in DEVICES, "parameters.device", device, f"one of {', '.join(DEVICES)}")

    @property
    def key(self) -> Key:
        """Equal for two measurements of the same thing."""
        parameters = tuple(sorted(self.parameters.items()))
        return self.suite, self.workload, self.side, self.storage, self.metric, parameters


@dataclass(frozen=True, slots=True)
class Record:
    """A file of measurements."""

    header: Header
    rows: tuple[Row, ...]

    def by_key(self) -> dict[Key, Row]:
        """Rows by what they measure.

        Raises:
            OptionError: two rows measure the same.
        """
        rows: dict[Key, Row] = {}
        for row in self.rows:
            if row.key in rows:
                raise OptionError(
                    f"two rows measure {' '.join(row.key[:5])}; expected one. Delete one of them."
                )
            rows[row.key] = row
        return rows


def write_header(path: Path, header: Header) -> None:
    """Starts a file; one that is there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_line(header), encoding="utf-8")


def append_row(path: Path, row: Row) -> None:
    """Adds a row to a started file and flushes it.

    Raises:
        OptionError: the file has no header, or the row claims a GPU that the header has not.
    """
    with path.open(encoding="utf-8") as stream:
        header = _header(path, stream.readline())
    _refuse_gpu_claim(f"{path}, a new row", header, row)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(_line(row))


def read(path: Path) -> Record:
    """The measurements of a file.

    Raises:
        OptionError: it cannot be read, or one of its lines is not what this module writes.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read ({error}); expected a file of results.") from None
    header = _header(path, lines[0] if lines else "")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}, line {number}"
        row = _row(where, line)
        _refuse_gpu_claim(where, header, row)
        rows.append(row)
    return Record(header, tuple(rows))


def _header(path: Path, line: str) -> Header:
    where = f"{path}, line 1"
    values = _object(where, line)
    if values.get("schema") != SCHEMA:  # before its keys, which another schema may name otherwise
        raise OptionError(
            f"{where}: schema is {values.get('schema')!r}; this ovfast reads {SCHEMA}. Read the"
            " file with the ovfast that wrote it, or measure again."
        )
    return Header(**_checked(where, values, Header))


def _row(where: str, line: str) -> Row:
    values = _checked(where, _object(where, line), Row)
    samples = values["samples"]
    if isinstance(samples, list):
        values["samples"] = tuple(samples)
    try:
        return Row(**values)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"{where} is not JSON ({error}); expected one object. Delete a line that was cut off,"
            " or measure again."
        ) from None
    if not isinstance(values, dict):
        raise OptionError(f"{where} is a {type(values).__name__}; expected an object.")
    return values


def _checked(where: str, values: dict[str, Any], kind: type[Header] | type[Row]) -> dict[str, Any]:
    expected = {field.name for field in fields(kind)}
    for problem, names in (
        ("unknown", values.keys() - expected),
        ("missing", expected - values.keys()),
    ):
        if names:
            raise OptionError(
                f"{where}: {problem} keys {', '.join(sorted(names))}; expected exactly"
                f" {', '.join(sorted(expected))}."
            )
    return values


def _refuse_gpu_claim(where: str, header: Header, row: Row) -> None:
    if header.gpu is None and row.parameters["device"] != "cpu":
        raise OptionError(
            f"{where}: device is {row.parameters['device']!r}, but the header names no GPU; a"
            " machine without one has no such figures. Measure on a machine that has one."
        )


def _line(value: Header | Row) -> str:
    return json.dumps(asdict(value), ensure_ascii=False, allow_nan=False) + "\n"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _need(ok: bool, name: str, given: Any, allowed: str) -> None:
    if not ok:
        raise OptionError(f"{name} is {given!r}; expected {allowed}.")
