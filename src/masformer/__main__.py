"""`python -m masformer`."""

import sys

from masformer.cli import main

sys.exit(main())
