"""What may be spent, what each site can be, and the knapsack that spends it."""
