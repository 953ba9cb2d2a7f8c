"""What every folder may use: files, a model's state, progress bars, timing, versions, numbers and tables."""
