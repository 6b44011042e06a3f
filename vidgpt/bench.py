"""vidgpt-bench: how fast the decoding plans are on this machine, beside transformers' generate, and what they change."""

from typing import Any

from vidgpt.options import BenchOptions
from vidgpt.schema import register_schemas
from vidtok.cli import entry
from vidtok.schema import build_options


@entry("vidgpt_bench", "vidgpt-bench checkpoint=runs/gpt tokens=runs/tokens output=runs/bench", BenchOptions, register_schemas)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.speed.benchmark import bench_gpt

    bench_gpt(build_options(BenchOptions, config))


if __name__ == "__main__":
    main()
