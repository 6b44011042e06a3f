"""vidgpt-evaluate: evaluation of a trained transformer in tokens and, with pixels=true, in frames."""

from typing import Any

from vidgpt.options import EvaluateOptions
from vidtok.cli import entry
from vidtok.schema import build_options, register_schemas


@entry(
    "vidgpt_evaluate",
    "vidgpt-evaluate checkpoint=runs/gpt tokens=runs/tokens output=runs/evaluation",
    EvaluateOptions,
    register_schemas,
)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.checkpoint_evaluation import evaluate_checkpoint

    evaluate_checkpoint(build_options(EvaluateOptions, config))


if __name__ == "__main__":
    main()
