#!/usr/bin/env bash
# Everything that needs a GPU: tests marked `gpu`, then the benchmarks. JSON goes to
# benchmarks/results/, or to $1. Run from the repository root with sparsiattn importable:
#   PYTHONPATH=.:backbones bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="${PYTHONPATH:-.:backbones}"
python3 -m pytest -m gpu -p no:cacheprovider
for kernel in gather triton flex; do
  python3 benchmarks/kernels.py --device cuda --dtype bfloat16 --batch 8 --rounds 30 --kernel "$kernel"
done
python3 benchmarks/kernels.py --device cuda --dtype bfloat16 --sweep --rounds 9
python3 benchmarks/memory.py --device cuda --dtype bfloat16
python3 benchmarks/resolution.py --device cuda --dtype bfloat16 --compile \
  --model vit_base_patch16_224 --batch 8
python3 benchmarks/proportional.py --device cuda --dtype bfloat16
python3 benchmarks/tokens.py --device cuda --dtype bfloat16 --rounds 12
if [ $# -gt 0 ]; then cp benchmarks/results/*cuda*.json "$1"; fi
