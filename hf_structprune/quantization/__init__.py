"""Quantising a model with the libraries of the field: `quantize` and `QuantizationConfig`."""
