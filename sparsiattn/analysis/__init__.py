"""What a patch is worth: times, costs, findings, searched budgets, pictures.

May import `sparsiattn.training` and what stands below it; testing and the command line may import
it. Each part is a package of its own, so that a command imports only the one it needs.
"""
