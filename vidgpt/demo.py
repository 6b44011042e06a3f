"""vidgpt-demo: the main job on one page, from game video to predicted frames and a report."""

from typing import Any

from vidgpt.options import DemoOptions
from vidgpt.schema import register_schemas as register_model_schemas
from vidtok.cli import entry
from vidtok.schema import build_options, register_schemas


def _register() -> None:
    register_schemas()
    register_model_schemas()


@entry("vidgpt_demo", "vidgpt-demo run_dir=runs/demo", DemoOptions, _register)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.showcase import run_demo

    run_demo(build_options(DemoOptions, config), config)


if __name__ == "__main__":
    main()
