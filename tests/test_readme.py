import ast
import re
from pathlib import Path

import pytest

from vidgpt.bench import main as bench_gpt
from vidgpt.compare import main as compare
from vidgpt.demo import main as demo
from vidgpt.evaluate import main as evaluate
from vidgpt.export import main as export
from vidgpt.predict import main as predict
from vidgpt.train import main as train_gpt
from vidgpt.verify import main as verify
from vidgpt.world import main as world
from vidtok.bench import main as bench_tokenizer
from vidtok.encode import main as encode
from vidtok.evaluate import main as evaluate_tokenizer
from vidtok.reconstruct import main as reconstruct
from vidtok.train import main as train_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ENTRIES = {
    entry.command: entry
    for entry in (
        train_tokenizer,
        bench_tokenizer,
        encode,
        evaluate_tokenizer,
        reconstruct,
        train_gpt,
        predict,
        evaluate,
        export,
        verify,
        bench_gpt,
        demo,
        compare,
        world,
    )
}
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if re.match(r"(vidtok|vidgpt)-", line)
]


def test_the_readme_is_short_and_names_every_file() -> None:
    assert len(README.splitlines()) <= 190
    assert len(COMMANDS) >= 5
    for package in ("vidtok", "vidgpt"):
        for path in (ROOT / package).glob("*.py"):
            stem = path.stem
            assert stem == "__init__" or re.search(rf"\b{stem}\b", README), f"{path.name} is not in the tree of README.md"


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split()[0])
def test_every_command_of_the_readme_composes(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *arguments = line.split()
    ENTRIES[command]([*arguments, "--cfg", "job"])
    printed = capsys.readouterr().out
    assert all(
        argument.split("=", 1)[1].split("/")[-1].rstrip("]") in printed
        for argument in arguments
        if not argument.startswith(("data=", "model="))
    )


def test_every_picture_of_the_readme_is_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / path).is_file() for path in pictures)


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"`?make ([a-z-]+)", README))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= known


def test_the_python_of_the_readme_names_what_exists() -> None:
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert blocks
    for node in ast.walk(ast.parse("\n".join(blocks))):
        if isinstance(node, ast.ImportFrom):
            module = __import__(str(node.module), fromlist=["_"])
            assert all(hasattr(module, alias.name) for alias in node.names)
