"""Run the whole search:  python study.py --config configs/study.toml   (see --help)"""

import sys

from minipersona.cli import main

if __name__ == "__main__":  # a worker process of the study imports this file
    sys.exit(main(["study", *sys.argv[1:]]))
