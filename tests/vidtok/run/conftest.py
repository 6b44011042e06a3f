"""A stand-in for W&B."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What W&B's package does here, line by line into a file; no network, no account.
FAKE_WANDB = """
import json, os

class Error(Exception):
    pass

class Image:
    def __init__(self, data):
        self.shape = list(data.shape)

class Config:
    def update(self, values, allow_val_change=False):
        assert allow_val_change
        if os.environ.get("FAKE_WANDB_REFUSES") == "config":
            raise Error("config is not serializable")
        write("config", {"values": values})

config = Config()

def write(what, values):
    with open(os.environ["FAKE_WANDB"], "a") as file:
        file.write(json.dumps({"what": what, "pid": os.getpid(), **values}, default=lambda image: image.shape) + "\\n")

class Run:
    def __init__(self):
        lines = [json.loads(line) for line in open(os.environ["FAKE_WANDB"])] if os.environ.get("FAKE_WANDB_ONLINE") else []
        rows = [line["row"] for line in lines if line["what"] == "row"]
        self.row, self.resumed, self.summary = {}, bool(rows), rows[-1] if rows else {}
    def define_metric(self, name, step_metric=None):
        write("define", {"name": name, "step_metric": step_metric})
    def log(self, values, step=None, commit=None):
        assert step is None, "W&B drops what comes at a lower step of its own"
        self.row |= values
        if commit is not False:
            write("row", {"row": self.row})
            self.row = {}
    def finish(self, exit_code=None):
        write("finish", {"exit_code": exit_code})

def init(**given):
    if os.environ.get("FAKE_WANDB_REFUSES") == "init":
        os.makedirs(os.path.join(given["dir"], "wandb"))
        raise Error("api_key not configured (no-tty)\\nsecond line")
    run = Run()
    write("init", {"given": given})
    return run
"""


@pytest.fixture
def wandb_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a stand-in for wandb first on the path, here and in child processes; gives the file that it writes."""
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    (tmp_path / "fake" / "wandb" / "__init__.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("FAKE_WANDB", str(tmp_path / "wandb.jsonl"))
    (tmp_path / "wandb.jsonl").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), str(Path(__file__).parents[3])]))
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "wandb.jsonl"
    sys.modules.pop("wandb", None)
