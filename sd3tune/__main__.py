"""``python -m sd3tune``."""

import sys

from sd3tune.cli import main

sys.exit(main())
