"""vidtok-evaluate: the health report of a tokenizer on one's own data."""

from typing import Any

from vidtok.cli import entry
from vidtok.options import EvaluateTokenizerOptions
from vidtok.schema import build_options, register_schemas


@entry(
    "vidtok_evaluate",
    "vidtok-evaluate checkpoint=runs/tok data=files data.root=my_videos output=runs/health",
    EvaluateTokenizerOptions,
    register_schemas,
    {"tokenizer": "pretrained"},
)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidtok.health.evaluation import evaluate_checkpoint

    evaluate_checkpoint(build_options(EvaluateTokenizerOptions, config), config["data"])


if __name__ == "__main__":
    main()
