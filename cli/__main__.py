"""`python -m cli`, the same as `offload`."""

import sys

from cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
