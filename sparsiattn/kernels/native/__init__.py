"""Attention over key lists in C, compiled by the system's compiler when `warmup` asks for it."""
