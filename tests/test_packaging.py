from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from vidtok.cli import Entry

ROOT = Path(__file__).parents[1]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
INPUTS = {"checkpoint", "tokens", "input", "data.root"}


def entry_of(script: str) -> Entry:
    """The function that a script of pyproject.toml calls: what it must show is taken from there, so that none is forgotten."""
    module, _, name = SCRIPTS[script].partition(":")
    entry = getattr(importlib.import_module(module), name)
    assert isinstance(entry, Entry)
    return entry


def check_composed(entry: Entry, printed: str) -> None:
    """Assert that what --cfg job printed has every key of the command, and every value of its example."""
    assert entry.options is not None
    values = yaml.safe_load(printed)
    assert set(values) == {option.name for option in dataclasses.fields(entry.options)}
    for word in entry.example.split()[1:]:
        key, _, value = word.partition("=")
        found = values
        for part in key.split("."):
            found = found[part]
        # A preset has become its keys.
        assert isinstance(found, dict) if key in entry._presets() else found == yaml.safe_load(value), word


def run(*command: str | Path, cwd: Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel alone; its dependencies are lent by the one that runs the tests."""
    environment = tmp_path_factory.mktemp("environment with a space")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    lender = next(path for path in sys.path if path.endswith("site-packages"))
    run(
        *(
            sys.executable,
            "-m",
            "pip",
            "--python",
            environment / "bin" / "python",
            "install",
            "--no-deps",
            "--no-index",
            "--quiet",
            wheel,
        ),
        cwd=environment,
    )
    # A .pth that names a folder does not run the .pth files inside it, so an editable install of this checkout stays out.
    (packages / "lender.pth").write_text(lender + "\n")
    return environment / "bin"


@pytest.mark.slow
def test_the_wheel_holds_code_presets_and_digits_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {f"vidtok/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    code = {str(path.relative_to(ROOT)) for package in ("vidtok", "vidgpt") for path in (ROOT / package).rglob("*.py")}
    assert presets
    assert presets | code | {"vidtok/data/mnist_digits.npz"} <= names
    assert {name.partition("/")[0] for name in names} == {"vidtok", "vidgpt", "vidtok_vidgpt-0.1.0.dist-info"}
    assert "vidtok_vidgpt-0.1.0.dist-info/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_installed_package_reads_its_own_presets(scripts: Path, tmp_path: Path) -> None:
    code = "import json, vidtok.schema as schema; print(json.dumps([schema.__file__, schema.config_dir()]))"
    module, conf = json.loads(run(scripts / "python", "-c", code, cwd=tmp_path).stdout)
    assert Path(module).is_relative_to(scripts.parent)
    assert Path(conf) == Path(module).parent / "conf"


@pytest.mark.slow
def test_every_module_of_the_installed_package_imports(scripts: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, vidtok, vidgpt\n"
        "for package in (vidtok, vidgpt):\n"
        "    for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):\n"
        "        print(importlib.import_module(module.name).__file__)\n"
    )
    imported = [Path(line) for line in run(scripts / "python", "-c", code, cwd=tmp_path).stdout.splitlines()]
    written = [path for package in ("vidtok", "vidgpt") for path in (ROOT / package).rglob("*.py")]
    assert len(imported) == len(written) - 2  # walk_packages leaves out the packages that it walks
    assert all(path.is_relative_to(scripts.parent) for path in imported)


def test_every_command_has_a_script_and_a_configuration() -> None:
    modules = {path for package in ("vidtok", "vidgpt") for path in (ROOT / package).rglob("*.py")}
    commands = {path for path in modules if re.search(r"^@(\w+\.)?entry\(", path.read_text(), re.MULTILINE)}
    assert commands == {ROOT / f"{target.partition(':')[0].replace('.', '/')}.py" for target in SCRIPTS.values()}
    assert {path.stem.replace("_", "-") for path in (ROOT / "conf").glob("*.yaml")} == set(SCRIPTS)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_the_example_of_a_command_is_complete_and_composes(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    entry = entry_of(script)
    command, *words = entry.example.split()
    assert entry.command == command == script
    entry([*words, "--cfg", "job"])
    printed = capsys.readouterr().out
    check_composed(entry, printed)
    assert "???" not in printed
    with pytest.raises(AssertionError):
        check_composed(entry, printed.replace(words[-1].partition("=")[2], "another"))


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_works_from_an_empty_folder(script: str, scripts: Path, tmp_path: Path) -> None:
    entry = entry_of(script)
    assert entry.options is not None
    words = entry.example.split()[1:]
    shown = run(scripts / script, "--help", cwd=tmp_path).stdout
    assert shown.startswith(f"Example: {entry.example}\n")
    assert {option.name for option in dataclasses.fields(entry.options)} <= set(re.findall(r"^(\w+):", shown, re.MULTILINE))
    check_composed(entry, run(scripts / script, *words, "--cfg", "job", cwd=tmp_path).stdout)
    refused = run(scripts / script, *words, "no_such_key=1", cwd=tmp_path, status=2)
    assert refused.stderr.startswith(f"{script}: no_such_key: unknown key")
    if INPUTS & {word.partition("=")[0] for word in words}:
        # The work itself begins, and finds nothing to work on.
        refused = run(scripts / script, *words, cwd=tmp_path, status=2)
        assert refused.stderr.splitlines()[-1].startswith(f"{script}: ") and "Traceback" not in refused.stderr
        assert re.search("does not exist", refused.stderr), refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_decoy_conf_in_the_working_folder_changes_nothing(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "tokenizer").mkdir(parents=True)
    (tmp_path / "conf" / "__init__.py").write_text("")
    (tmp_path / "conf" / "tokenizer" / "tiny.yaml").write_text("decoy: true\n")
    shown = run(scripts / "vidtok-train", "data=files", "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(tmp_path)).stdout
    assert "stride_t" in shown
    assert "decoy" not in shown
