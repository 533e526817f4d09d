"""Extract persona vectors and print M1:  python extract.py --layer 20   (see --help)"""

import sys

from minipersona.cli import main

sys.exit(main(["extract", *sys.argv[1:]]))
