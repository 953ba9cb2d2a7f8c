"""How a network was compressed: as a record, as pictures, and as a page for the browser."""
