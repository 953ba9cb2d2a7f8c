"""`make fuzz`: thousands of damaged and hostile files, each of which must be read or refused in one line."""
