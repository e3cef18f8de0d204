"""`python -m paged_ref` is `paged-ref`."""

import sys

from .cli import main

sys.exit(main())
