"""Laws of decoding, checked on a trained model: vidgpt-verify."""
