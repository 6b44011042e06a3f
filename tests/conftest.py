"""What many tests need: a small command, `toy-train`, with its own conf/; a tokenizer that hides nothing; a page taken apart."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hydra.core.config_store import ConfigStore

from vidtok import cli
from vidtok.cli import entry
from vidtok.schema import store_schema

if TYPE_CHECKING:
    from vidtok.model import VidTokModel

EXAMPLE = "toy-train data=digits run_dir=runs/toy"
CONF = {
    "toy_train.yaml": "defaults:\n- schema_toy_train\n- data: digits\n- tokenizer: tiny\n- _self_\nmax_steps: 20\n",
    "data/digits.yaml": "defaults: [schema_digits]\nepisodes: 3\n",
    "data/files.yaml": "defaults: [schema_files]\n",
    "tokenizer/tiny.yaml": "defaults: [schema]\nwidth: 8\n",
    "tokenizer/misspelt.yaml": "defaults: [schema]\nwidht: 8\n",
    "tokenizer/unfinished.yaml": "defaults: [schema]\nwidth: [8\n",
}


def randomised(model: VidTokModel) -> VidTokModel:
    """Fill what starts at zero: a fresh tokenizer's residual branches, in which a leak or a lost state would not show.

    For tests: `from tests.conftest import randomised`. Gives the same model, in eval mode.
    """
    import torch

    from vidtok.blocks import ZeroConv2d

    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, ZeroConv2d):
            torch.nn.init.normal_(module.weight, std=0.3, generator=generator)
    return model.eval()


class Page(HTMLParser):
    """Collects what a browser would load, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.headings: list[str] = []
        self.open: list[str] = []
        self.is_balanced = True
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "input", "link", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.is_balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def check_page(text: str) -> Page:
    """Assert that a page loads nothing from outside, runs no script but one of its own and is well formed; gives what is on it."""
    page = Page(text)
    bare = re.sub('base64,[^"]*', "", text)
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not {"link", "iframe"} & set(page.tags)
    assert page.tags.count("script") == text.count("<script>") == text.count("<script") <= 1
    assert not [word for word in ("http:", "https:", "url(", "@import", "import(", "fetch(", "$") if word in bare]
    assert page.is_balanced and page.open == []
    return page


@dataclasses.dataclass(frozen=True)
class RampOptions:
    steps: int = 1


@dataclasses.dataclass(frozen=True)
class LossOptions:
    l1_weight: float = 1.0
    ramp: RampOptions = RampOptions(steps=4)


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    run_dir: str
    data: Any = "???"
    tokenizer: Any = "???"
    input: str | None = None
    max_steps: int = 10
    max_minutes: float | None = None
    is_fast: bool = False
    loss: LossOptions = dataclasses.field(default_factory=lambda: LossOptions(l1_weight=2.0))


@dataclasses.dataclass(frozen=True)
class DigitsOptions:
    name: str = "digits"
    file: str | None = None
    episodes: int = 2
    size: list[int] = dataclasses.field(default_factory=lambda: [32, 48])
    crop: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class FilesOptions:
    name: str = "files"
    root: str = ""


@dataclasses.dataclass
class TokenizerOptions:
    width: int = 3


@dataclasses.dataclass
class BorrowedOptions:
    path: str
    levels: int


def register_toy_schemas() -> None:
    store_schema("data", "schema_digits", DigitsOptions)
    store_schema("data", "schema_files", FilesOptions)
    store_schema("tokenizer", "schema", TokenizerOptions)
    store_schema("tokenizer", "schema_borrowed", BorrowedOptions)


def write_conf(folder: Path) -> Path:
    for name, text in CONF.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class Toy:
    """The command under test: what it was run with, and what its work does."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.configs: list[dict[str, Any]] = []
        self.work: Callable[[dict[str, Any]], None] = self.configs.append
        self.capsys = capsys
        self.main = entry("toy_train", EXAMPLE, ToyOptions, register_toy_schemas)(lambda config: self.work(config))

    def run(self, *arguments: str) -> dict[str, Any]:
        self.main(list(arguments))
        return self.configs[-1]

    def refuse(self, *arguments: str, status: int = 2) -> str:
        with pytest.raises(SystemExit) as stop:
            self.main(list(arguments))
        assert stop.value.code == status
        assert not self.configs
        sentence = self.capsys.readouterr().err
        assert sentence.startswith("toy-train: ")
        assert sentence.count("\n") == 1
        return sentence.removeprefix("toy-train: ").strip()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Toy:
    conf = write_conf(tmp_path / "conf")
    monkeypatch.setattr(cli, "config_dir", lambda: str(conf))
    # Hydra's store is one for the process: the toy's schemas must not reach the tests of the real commands.
    for group in ("data", "tokenizer"):
        monkeypatch.setitem(ConfigStore.instance().repo, group, {})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Toy(capsys)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    conf = write_conf(tmp_path / "conf")
    path = tmp_path / "app.py"
    path.write_text(
        textwrap.dedent(f"""
        import dataclasses, json, sys, time
        from vidtok import cli
        from vidtok.schema import store_schema
        cli.config_dir = lambda: {str(conf)!r}
        @dataclasses.dataclass
        class Options:
            run_dir: str = "???"
            max_steps: int = 10
        @cli.entry("plain", "plain run_dir=a", Options)
        def main(config):
            heavy = [name for name in ("torch", "transformers") if name in sys.modules]
            print(json.dumps([config, heavy]), flush=True)
            time.sleep(config["max_steps"])
        if __name__ == "__main__":
            main()
        """)
    )
    (conf / "plain.yaml").write_text("defaults: [schema_plain, _self_]\n")
    return path
