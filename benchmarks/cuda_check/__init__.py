"""Everything about a GPU machine in one command, see `__main__`."""
