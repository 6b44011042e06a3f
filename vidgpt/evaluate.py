"""vidgpt-evaluate: token-level evaluation of a trained transformer."""

from typing import Any

from vidgpt.options import EvaluateOptions
from vidtok.cli import entry
from vidtok.schema import build_options


@entry("vidgpt_evaluate", "vidgpt-evaluate checkpoint=runs/gpt tokens=runs/tokens output=runs/evaluation", EvaluateOptions)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.checkpoint_evaluation import evaluate_checkpoint

    evaluate_checkpoint(build_options(EvaluateOptions, config))


if __name__ == "__main__":
    main()
