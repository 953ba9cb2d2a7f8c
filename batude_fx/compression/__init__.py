"""The two verbs, `plan` and `compress`, and how ranks are found under a budget."""
