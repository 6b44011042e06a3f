"""vidgpt-world: tokens of a world whose law is known, to see how far a model is from a perfect one."""

from typing import Any

from vidgpt.evaluation_options import WorldOptions
from vidtok.cli import entry
from vidtok.schema import build_options


@entry("vidgpt_world", "vidgpt-world world=chains output=runs/world/tokens", WorldOptions)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.worlds import write_chosen_world

    write_chosen_world(build_options(WorldOptions, config))


if __name__ == "__main__":
    main()
