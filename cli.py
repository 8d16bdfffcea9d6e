"""`offload` from a checkout: `python cli.py chat demo`."""

import sys

from offload.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
