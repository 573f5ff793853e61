"""``python -m ttt4rec``: the command line where its script is not on the path."""

import sys

from ttt4rec.cli import main

if __name__ == "__main__":
    sys.exit(main())
