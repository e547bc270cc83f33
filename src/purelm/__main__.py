"""`python -m purelm` is the `purelm` command."""

import sys

from .cli import main

sys.exit(main())
