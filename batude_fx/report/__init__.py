"""Reports of compressed networks: what is recorded in `report.json`, the pictures, and the page for the browser."""
