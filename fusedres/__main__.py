"""`python -m fusedres`, and the script `fusedres`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
