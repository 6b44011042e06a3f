"""vidgpt-train: train a transformer on a token dataset."""

from typing import Any

from vidgpt.options import TrainGPTOptions
from vidgpt.schema import register_schemas
from vidtok.cli import entry
from vidtok.schema import build_options


@entry(
    "vidgpt_train",
    "vidgpt-train tokens=runs/tokens model=tiny run_dir=runs/gpt max_minutes=60",
    TrainGPTOptions,
    register_schemas,
    decided_by={"model": "init_from"},
)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.training import train_gpt

    train_gpt(build_options(TrainGPTOptions, config), config["model"], config)


if __name__ == "__main__":
    main()
