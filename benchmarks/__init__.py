"""Side by side with the tools that people would otherwise use, on one GPU. Never part of the test run."""

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the commands set it (`minipersona.cli`)
