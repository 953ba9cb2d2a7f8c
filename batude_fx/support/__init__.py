"""Tools for all other folders, without knowledge of compression: files, hooks, model state, timing, tables, others."""
