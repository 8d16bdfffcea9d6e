"""`python -m cli`, the same as `offload`."""

import sys

from cli import main

if __name__ == "__main__":
    sys.exit(main())
