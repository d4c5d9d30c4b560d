"""Analysis of models and patches: timing, MACs, inspection, search of budgets, visualization.

It may import `sparsiattn.training` and the packages below it; testing and the command line may
import it. Each part is a separate package, so that a command imports only the part it needs.
"""
