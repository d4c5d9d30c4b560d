"""``python -m sparsiattn``."""

from sparsiattn.cli import app

if __name__ == "__main__":
    app()
