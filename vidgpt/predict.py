"""vidgpt-predict: the next frames of a video."""

from typing import Any

from vidgpt.options import PredictOptions
from vidtok.cli import entry
from vidtok.schema import build_options


@entry("vidgpt_predict", "vidgpt-predict checkpoint=runs/gpt input=clip.mp4 context=8 future=16 output=out", PredictOptions)
def main(config: dict[str, Any]) -> None:
    """Run the command."""
    from vidgpt.prediction import predict_file

    predict_file(build_options(PredictOptions, config))


if __name__ == "__main__":
    main()
