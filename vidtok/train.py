"""vidtok-train: train a tokenizer on video."""

from typing import Any

from vidtok.cli import entry
from vidtok.options import TrainTokenizerOptions
from vidtok.schema import build_options, register_schemas


@entry(
    "vidtok_train",
    "vidtok-train data=files data.root=my_videos run_dir=runs/tok max_minutes=30",
    TrainTokenizerOptions,
    register_schemas,
    decided_by={"tokenizer": "init_from"},
)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidtok.training import train_tokenizer

    train_tokenizer(build_options(TrainTokenizerOptions, config), config["data"], config["tokenizer"], config)


if __name__ == "__main__":
    main()
