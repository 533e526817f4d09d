"""Fine-tune a model by one recipe:  torchrun train.py --config configs/phase1.toml   (see --help)"""

import sys

from minipersona.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
