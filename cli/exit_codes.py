"""The exit codes of every command. Knows: numbers. Does not know: when each is given."""

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
