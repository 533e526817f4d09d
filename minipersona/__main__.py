"""`python -m minipersona` is the command `minipersona`."""

import sys

from minipersona.cli import main

sys.exit(main())
