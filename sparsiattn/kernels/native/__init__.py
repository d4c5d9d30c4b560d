"""Attention over key lists in C: compiled in the wheel, or here when `warmup` asks for it."""
