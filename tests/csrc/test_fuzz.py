"""No argument crashes a native function; see tests/support/native_fuzz.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ovfast._C", reason="the native extension is not built")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("seed", "num_calls"),
    [(0, 60), pytest.param(1, 1000, marks=pytest.mark.slow)],
)
def test_random_calls(seed: int, num_calls: int, tmp_path: Path) -> None:
    from tests.support.native_arguments import PLAUSIBLE

    report = tmp_path / "report"
    command = [sys.executable, "-m", "tests.support.native_fuzz", str(seed), str(num_calls)]
    child = subprocess.run(
        [*command, report], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, f"{report.read_text()}\n{child.stderr}"
    counts = json.loads(report.read_text())
    shares = {name: passed / max(calls, 1) for name, (calls, passed) in counts.items()}
    print({name: round(share, 2) for name, share in shares.items()})
    assert all(shares[name] > 0.2 for name in PLAUSIBLE if name in shares)
