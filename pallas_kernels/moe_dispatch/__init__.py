"""Mixtures of experts: rows sorted by expert, the product of each with its own expert's matrix, and the way back."""
