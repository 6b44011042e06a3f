"""The health report of a tokenizer: what is measured, how it is judged, the page."""
