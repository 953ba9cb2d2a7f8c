"""Networks as folders, and how they are built again without executing anything."""
