"""The schema of the group `model`."""

from vidtok.schema import model_schema, store_schema


def register_schemas() -> None:
    """Register `model/schema`; what the tokens' card or the training decides cannot be set."""
    from vidgpt.config import FIELDS_FROM_CARD, FIELDS_FROM_TRAINING, VidGPTConfig

    store_schema("model", "schema", model_schema(VidGPTConfig, frozenset((*FIELDS_FROM_CARD, *FIELDS_FROM_TRAINING))))
