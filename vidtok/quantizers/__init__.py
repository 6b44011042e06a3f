"""One file a quantization method; vidtok.quantizer is the door."""
