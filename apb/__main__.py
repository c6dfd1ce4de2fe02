"""Run the command line as `python -m apb`."""

import sys

from apb.cli import main

sys.exit(main())
