"""Reclaim: the budget, and what leaves when."""
