"""Attention over key lists in Triton. Importing this package imports no triton."""
