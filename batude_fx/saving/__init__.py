"""Save compressed networks to folders, and load them without executing anything that a folder holds."""
