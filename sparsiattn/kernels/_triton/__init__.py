"""Attention over key lists in Triton. Importing this package does not import triton."""
