"""Scripts that measure, each printing a table and writing JSON."""
