"""vidtok-encode: a folder of videos, a game or a generator to a token dataset."""

from typing import Any

from vidtok.cli import entry
from vidtok.options import EncodeOptions
from vidtok.schema import build_options, register_schemas


@entry(
    "vidtok_encode",
    "vidtok-encode checkpoint=runs/tok data=files data.root=my_videos output=runs/tokens",
    EncodeOptions,
    register_schemas,
    {"tokenizer": "pretrained"},
)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidtok.encoding import encode_dataset

    encode_dataset(build_options(EncodeOptions, config), config["data"])


if __name__ == "__main__":
    main()
