"""The `ovfast` command as a shell user meets it: output, exit codes, messages."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ovfast import cli, ops_native
from ovfast.cpu_threads import available_threads
from tests.support.checkpoints import CheckpointSpec


@pytest.fixture
def checkpoint(random_checkpoint):
    return str(random_checkpoint(CheckpointSpec()))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cat.png"
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (90, 130, 3), dtype=np.uint8)).save(path)
    return str(path)


def run(*args: str) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(args))
    return int(exit_info.value.code or 0)


def test_generate_streams_what_json_reports(checkpoint, picture, capsys):
    args = ("generate", "What?", "-i", picture, "-m", checkpoint, "--max-new-tokens", "6")
    assert run(*args) == 0
    streamed = capsys.readouterr()
    assert "prompt tokens" in streamed.err
    assert run(*args, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert streamed.out == output["text"] + "\n"
    assert output["usage"]["completion_tokens"] == len(output["token_ids"]) <= 6
    assert output["usage"]["views"] > 1


def test_options_reach_the_engine(checkpoint, picture, capsys):
    args = ("generate", "What?", "-i", picture, "-m", checkpoint, "--json", "--max-new-tokens", "4")
    assert run(*args, "--max-views", "1", "--temperature", "0.9", "--seed", "5") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["usage"]["views"] == 1
    assert output["seed"] == 5


def test_explain_writes_a_picture_and_the_plan(checkpoint, picture, tmp_path, capsys):
    out = tmp_path / "views.png"
    assert run("explain", "-i", picture, "-m", checkpoint, "--out", str(out), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["size_hw"] == [90, 130]
    with Image.open(out) as page:
        assert page.size[0] > 500


def test_doctor_names_every_operation(capsys):
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["self-test"]["passed"]
    assert set(report["operations"].values()) <= {"native", "triton", "reference"}
    native = report["native back end"]
    if native.get("built"):
        assert "compiler" in native["built"]
        return
    module = ops_native.native_module()
    assert report["operations"]["linear"] == "native"
    assert report["operations"]["decode step"] == "native"
    assert native["instruction set"].startswith(module.isa())
    assert all(isa in native["instruction set"] for isa in module.isas())
    assert native["threads"] == available_threads()
    assert 0.1 < float(native["memory read"].split(" GB/s")[0]) < 10_000


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", "What?", "-i", "missing.png"), ("MediaError", "missing.png")),
        (("generate", "What?", "-m", "no/such/model"), ("CheckpointError", "no/such/model")),
        (("generate", "", "-m", "demo"), ("PromptError",)),
        (("generate", "What?", "--temperature", "-1"), ("OptionError", "temperature")),
        (("generate", "What?", "--backend", "fast"), ("OptionError", "reference")),
    ],
)
def test_errors_are_one_line_and_exit_code_2(args, words, capsys):
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    for word in words:
        assert word in captured.err


def test_a_folder_that_is_not_there(checkpoint, picture, tmp_path, capsys):
    out = str(tmp_path / "no" / "views.png")
    assert run("explain", "-i", picture, "-m", checkpoint, "--out", out) == 2
    assert "no/views.png" in capsys.readouterr().err


def test_demo_answers_and_draws(tmp_path, capsys):
    assert run("demo", "--out", str(tmp_path / "demo")) == 0
    assert "in the second image" in capsys.readouterr().out
    assert (tmp_path / "demo" / "explain.png").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_characters(picture, tmp_path, encoding):
    """Sizes are printed with a multiplication sign, which ASCII has not."""
    command = [sys.executable, "-m", "ovfast", "explain", "-i", picture, "--out", "plan.png"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    child = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    assert b"Traceback" not in child.stderr
