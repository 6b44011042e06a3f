"""vidgpt-compare: evaluations of the same clips, clip by clip."""

from typing import Any

from vidgpt.evaluation_options import CompareOptions
from vidtok.cli import entry
from vidtok.schema import build_options


@entry("vidgpt_compare", "vidgpt-compare runs=[runs/a,runs/b] output=runs/comparison", CompareOptions)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.comparison import compare_runs

    compare_runs(build_options(CompareOptions, config))


if __name__ == "__main__":
    main()
