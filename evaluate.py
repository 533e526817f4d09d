"""Judge a run by the registered metrics:  python evaluate.py --run runs/phase1   (see --help)"""

import sys

from minipersona.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
