"""vidtok-bench: how fast a tokenizer is on this machine, and how near that is to what the machine can do."""

from typing import Any

from vidtok.cli import entry
from vidtok.options import BenchTokenizerOptions
from vidtok.schema import build_options, register_schemas


@entry("vidtok_bench", "vidtok-bench tokenizer=tiny size=[64,64] output=runs/bench", BenchTokenizerOptions, register_schemas)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidtok.benchmark import bench_tokenizer

    bench_tokenizer(build_options(BenchTokenizerOptions, config))


if __name__ == "__main__":
    main()
