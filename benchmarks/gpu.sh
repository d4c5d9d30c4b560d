#!/bin/sh
# Everything that needs a GPU: see gpu_run.py, which takes the same arguments.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_run.py" "$@"
