"""Budgets, the rank options of sites with their costs and times, and the knapsack that chooses among them."""
