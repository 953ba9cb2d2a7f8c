"""One-shot training: ranks that are learned in one run under the budget."""
