"""vidgpt-export: a folder that transformers loads without this package."""

from typing import Any

from vidgpt.options import ExportOptions
from vidtok.cli import entry
from vidtok.schema import build_options


@entry("vidgpt_export", "vidgpt-export checkpoint=runs/gpt output=runs/exported", ExportOptions)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.exporting import export_checkpoint

    export_checkpoint(build_options(ExportOptions, config))


if __name__ == "__main__":
    main()
