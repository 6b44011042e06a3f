"""vidgpt-verify: check on a checkpoint of yours that fast decoding computes what the model says."""

from typing import Any

from vidgpt.options import VerifyOptions
from vidtok.cli import entry
from vidtok.schema import build_options


@entry("vidgpt_verify", "vidgpt-verify checkpoint=runs/gpt tokens=runs/tokens", VerifyOptions)
def main(config: dict[str, Any]) -> None:
    """Run the command; exit status 1 when a law does not hold."""
    from vidgpt.laws.verification import verify_checkpoint

    if not verify_checkpoint(build_options(VerifyOptions, config)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
