"""Tokenizers of other projects behind the protocol of vidtok.tokenizer: one file a family."""
