"""`python -m tasks.estimates`: what the steps of params.yaml will take of this machine, as a table."""

import sys

from nirvana.errors import InputError
from tasks.estimates.table import main

if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
