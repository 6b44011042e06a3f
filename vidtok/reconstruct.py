"""vidtok-reconstruct: what a tokenizer keeps of a video."""

from typing import Any

from vidtok.cli import entry
from vidtok.options import ReconstructOptions
from vidtok.schema import build_options, register_pretrained


@entry(
    "vidtok_reconstruct",
    "vidtok-reconstruct checkpoint=runs/tok input=clip.mp4 output=out",
    ReconstructOptions,
    register_pretrained,
    {"tokenizer": "pretrained"},
)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidtok.reconstruction import reconstruct_file

    reconstruct_file(build_options(ReconstructOptions, config))


if __name__ == "__main__":
    main()
