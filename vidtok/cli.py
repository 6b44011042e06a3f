"""Console entries: Hydra composes, a plain dictionary arrives, and an error of the user is one sentence and exit status 2.

Hydra alone would print a traceback of its own, write `outputs/`, accept unknown keys behind a `+`, and stumble over a path with a
space. The work runs after Hydra has returned, so that nothing of it stands between an error and the person who reads it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vidtok.cli_errors import explain, unknown_key
from vidtok.schema import config_dir, store_schema

PATH_KEYS = frozenset(
    {"root", "file", "input", "output", "checkpoint", "tokens", "run_dir", "init_from", "cache_dir", "actions", "pattern"}
    | {"validation_root", "validation_file"}
    | {"lpips_weights", "lpips_heads", "path", "decoder", "fvd_detector"}
)  # the last part of a key whose value is a path
PATH_LISTS = frozenset({"runs"})  # likewise, whose value is a list of paths
FLAGS = {  # of Hydra, each with whether a value follows
    **dict.fromkeys(("--help", "-h", "--resolve", "--multirun", "-m"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p"), True),
    **dict.fromkeys(("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"), True),
}
QUIET = (  # Hydra writes no folder, no file and no log
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)

Run = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A console command; calling it is `main()`."""

    config_name: str
    example: str
    run: Run
    options: type | None = None
    schemas: Callable[[], None] | None = None
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decided_by: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def command(self) -> str:
        """Name on the command line."""
        return self.config_name.replace("_", "-")

    def __call__(self, arguments: Sequence[str] | None = None) -> None:
        """Compose the configuration and run; the arguments default to those of the process.

        Raises SystemExit: 2 after an error of the user, told in one sentence on stderr, and 130 after Ctrl-C.
        """
        given = list(sys.argv[1:] if arguments is None else arguments)
        try:
            self._compose_and_run(given)
        except KeyboardInterrupt:
            self._stop("interrupted", 130)
        except _user_errors() as error:
            if any(argument.lower() == "debug=true" for argument in given):
                traceback.print_exc()
            self._stop(explain(error, self.example, {folder: key for key, folder in self.folders.items()}), 2)

    def register(self) -> None:
        """Register every schema that the YAML of this command names."""
        if self.schemas is not None:
            self.schemas()
        if self.options is not None:
            store_schema(None, f"schema_{self.config_name}", self.options)

    def _compose_and_run(self, given: list[str]) -> None:
        flags, overrides = _split(given)
        self._check_chosen(overrides)
        self.register()
        # The job name is only a label; without it Hydra takes this module's.
        overrides = [*QUIET, f"hydra.job.name={self.command}", *(self._with_folder(word) for word in overrides)]
        if not {"--help", "-h"}.isdisjoint(flags):
            overrides = [*self._example_presets(), *overrides, f"hydra.help.template={_quote(self._help())}"]
        composed: list[DictConfig] = []
        is_sweep = not {"--multirun", "-m"}.isdisjoint(flags)

        def task(config: DictConfig) -> None:
            # The jobs of a sweep belong to Hydra's launcher; a single run waits until Hydra is out of the way.
            self._work(config, given) if is_sweep else composed.append(config)

        with _hydra_sees([*overrides, *flags]):
            hydra.main(config_path=config_dir(), config_name=self.config_name, version_base="1.3")(task)()
        for config in composed:
            self._work(config, given)

    def _work(self, composed: DictConfig, given: Sequence[str]) -> None:
        _check_keys(composed)
        named = {word.lstrip("+~").partition("=")[0] for word in given}
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given, for example: {self._example_with(missing, given)}")
        config = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(config, dict)
        for group, key in self.decided_by.items():
            if config[key] is not None and group not in named:
                config[group] = {name: value for name, value in config[group].items() if f"{group}.{name}" in named}
        self.run(_with_paths({str(key): value for key, value in config.items()}))

    def _check_chosen(self, overrides: Sequence[str]) -> None:
        """Refuse a key of a group of another folder whose preset was not chosen: Hydra knows no key there."""
        named = [override.lstrip("+~").partition("=")[0] for override in overrides]
        for group, folder in self.folders.items():
            inner = [name for name in named if name.startswith(f"{group}.")]
            if inner and {group, f"{folder}@{group}"}.isdisjoint(named):
                names = ", ".join(self._presets()[group])
                raise ValueError(f"{inner[0]} is given without {group}=NAME: give {group}=NAME too, one of {names}")

    def _with_folder(self, override: str) -> str:
        """Turn tokenizer=emu3 into Hydra's pretrained@tokenizer=emu3 where that key's presets lie in conf/pretrained/."""
        key = override.partition("=")[0].lstrip("+~")
        return override.replace(key, f"{self.folders[key]}@{key}", 1) if key in self.folders else override

    def _presets(self) -> dict[str, list[str]]:
        names = [option.name for option in dataclasses.fields(self.options)] if self.options is not None else []
        folders = {name: Path(config_dir(), self.folders.get(name, name)) for name in names}
        groups = {name: sorted(path.stem for path in folder.glob("*.yaml")) for name, folder in folders.items()}
        return {name: stems for name, stems in groups.items() if stems}

    def _example_presets(self) -> list[str]:
        """Give the example's choice of presets, because help is asked for before anything is chosen."""
        groups = self._presets()
        return [word for word in self.example.split() if word.partition("=")[0] in groups]

    def _example_with(self, missing: Sequence[str], given: Sequence[str]) -> str:
        """Give the example, or where it lacks a missing key, what was typed with all of them added."""
        values = dict(word.split("=", 1) for word in self.example.split()[1:])
        if set(missing) <= set(values):
            return self.example
        added = [f"{key}={values.get(key, 'PATH' if key.rpartition('.')[2] in PATH_KEYS else 'VALUE')}" for key in missing]
        return shlex.join([self.command, *(word for word in given if word.lower() != "debug=true"), *added])

    def _help(self) -> str:
        presets = "".join(f"\n  {name}={'|'.join(stems)}" for name, stems in self._presets().items())
        return (
            f"Example: {self.example}\n"
            + (f"\nPresets, chosen with group=preset:{presets}\n" if presets else "")
            + "\nKeys and defaults, changed with key=value or group.key=value (??? must be given):\n\n$CONFIG"
            + "\ndebug=true shows the traceback of an error; --cfg job shows the configuration and runs nothing."
        )

    def _stop(self, sentence: str, status: int) -> NoReturn:
        print(f"{self.command}: {sentence}", file=sys.stderr)
        raise SystemExit(status)


def entry(
    config_name: str,
    example: str,
    options: type | None = None,
    schemas: Callable[[], None] | None = None,
    folders: Mapping[str, str] | None = None,
    decided_by: Mapping[str, str] | None = None,
) -> Callable[[Run], Entry]:
    """Make a console command of a function that takes the composed configuration as a plain dictionary.

    config_name: the primary YAML in conf/ without its suffix; its `_` become `-` in the command's name.
    example: one complete command line, shown by --help and when something is missing.
    options: dataclass of every root key, groups included (`data: Any = "???"`), registered as `schema_<config_name>`.
    schemas: registers the schemas of the groups; called only when the command runs, because importing a model takes seconds.
    folders: keys whose presets lie in a folder of conf/ with another name, as {"tokenizer": "pretrained"}.
    decided_by: groups whose default preset does not count once another key is given, as {"tokenizer": "init_from"}; of these the
    function then gets only what the command line says.
    """

    def decorate(run: Run) -> Entry:
        return Entry(config_name, example, run, options, schemas, folders or {}, decided_by or {})

    return decorate


def _user_errors() -> tuple[type[Exception], ...]:
    # Imported only once something has gone wrong: huggingface_hub is slow to import.
    from huggingface_hub.errors import StrictDataclassError

    return ValueError, OSError, HydraException, OmegaConfBaseException, YAMLError, StrictDataclassError


@contextmanager
def _hydra_sees(arguments: list[str]) -> Iterator[None]:
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    # Without it Hydra prints errors itself and exits with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Sort the command line into Hydra's flags and safe overrides: argparse refuses overrides on both sides of a flag."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            flags += _flag(argument, rest)
        elif not argument.startswith("debug="):
            overrides.append(_quoted(argument))
        elif argument.lower() not in ("debug=true", "debug=false"):
            raise ValueError(f"{argument}: expected true or false")
    return flags, overrides


def _flag(argument: str, rest: Iterator[str]) -> list[str]:
    flag, has_value, value = argument.partition("=")
    if flag not in FLAGS:
        raise ValueError(f"{flag}: unknown flag, options are written as {flag.lstrip('-').replace('-', '_')}=VALUE, see --help")
    if not FLAGS[flag]:
        return [flag]
    value = value if has_value else next(rest, "")
    if not value or (flag in ("--cfg", "-c") and value not in ("job", "hydra", "all")):
        raise ValueError(f"{flag} {value}".strip() + f": expected {flag} {'job' if flag in ('--cfg', '-c') else 'VALUE'}")
    return [flag, value]


def _quoted(argument: str) -> str:
    """Protect the value of a path key from Hydra's grammar, where `=`, a comma and brackets have a meaning."""
    key, _, value = argument.partition("=")
    name = key.lstrip("+").rpartition(".")[2]
    if name in PATH_LISTS and (listed := re.fullmatch(r"\[([^'\"\[\]]+)\]", value)):
        return f"{key}=[{','.join(_quote(path.strip()) for path in listed[1].split(','))}]"
    is_path = name in PATH_KEYS
    is_quoted = re.fullmatch(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", value, re.DOTALL)
    if not is_path or is_quoted or value.lower() in ("", "null"):
        return argument
    return f"{key}={_quote(value)}"


def _quote(text: str) -> str:
    # Inside quotes Hydra reads backslashes as escapes only where a quote follows.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _with_paths(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Expand `~` in the values of path keys. Raises ValueError for an empty path."""
    expanded = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            expanded[key] = _with_paths(value, f"{prefix}{key}.")
        elif key in PATH_KEYS and isinstance(value, str):
            if not value.strip():
                raise ValueError(f"{prefix}{key} is empty: give a path, as in {prefix}{key}=PATH")
            expanded[key] = os.path.expanduser(value)
    return expanded


def _check_keys(config: DictConfig, prefix: str = "") -> None:
    """Refuse what `+key` added and `~key` took away: Hydra lets both past the schema."""
    schema = OmegaConf.get_type(config)
    keys = [str(key) for key in config]
    if dataclasses.is_dataclass(schema):
        known = [option.name for option in dataclasses.fields(schema)]
        for key in keys:
            if key not in known:
                raise ValueError(unknown_key(prefix + key, [name for name in keys if name in known], config))
        for key in known:
            if key not in keys:
                raise ValueError(f"{prefix}{key}: cannot be taken away, give it a value instead")
    for key in keys:
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            _check_keys(config[key], f"{prefix}{key}.")
