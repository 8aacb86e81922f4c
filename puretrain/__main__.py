"""``python -m puretrain`` is the same as ``puretrain``."""

import sys

from puretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
