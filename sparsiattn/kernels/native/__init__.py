"""Attention over key lists in C, compiled into the wheel, or on this machine by `warmup`."""
