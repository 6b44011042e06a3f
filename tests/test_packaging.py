from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
EXAMPLE_PRESETS = {"vidtok-train": ["data=files"], "vidtok-encode": ["data=files"]}


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
@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_works_from_an_empty_folder(script: str, scripts: Path, tmp_path: Path) -> None:
    shown = run(scripts / script, "--help", cwd=tmp_path).stdout
    assert shown.startswith(f"Example: {script}")
    assert "run_dir:" in shown or "output:" in shown
    composed = run(scripts / script, *EXAMPLE_PRESETS.get(script, []), "--cfg", "job", cwd=tmp_path).stdout
    assert "???" in composed or "run_dir" in composed
    refused = run(scripts / script, *EXAMPLE_PRESETS.get(script, []), "no_such_key=1", cwd=tmp_path, status=2)
    assert refused.stderr.startswith(f"{script}: no_such_key: unknown key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_decoy_conf_in_the_working_folder_changes_nothing(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "tokenizer").mkdir(parents=True)
    (tmp_path / "conf" / "__init__.py").write_text("")
    (tmp_path / "conf" / "tokenizer" / "tiny.yaml").write_text("decoy: true\n")
    shown = run(scripts / "vidtok-train", "data=files", "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(tmp_path)).stdout
    assert "stride_t" in shown
    assert "decoy" not in shown
