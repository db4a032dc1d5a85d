"""``python -m memfit.integrations``: the command line."""

import sys

from memfit.integrations.cli import main

if __name__ == "__main__":
    sys.exit(main())
