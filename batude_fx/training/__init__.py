"""One-shot training: recipes, and ranks learned in one training run under the budget."""
