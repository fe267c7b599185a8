"""`python -m hf_lora`: the command line of this Python's hf_lora."""

import sys

from hf_lora.cli import main

sys.exit(main())
