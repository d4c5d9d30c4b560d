"""What a patch keeps of real weights on photos, and what it brings in time: `__main__` says how."""
