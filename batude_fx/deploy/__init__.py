"""Networks for deployment: batch-norms folded, files of other formats, eight bits."""
