"""``python -m nullbayes``."""

import sys

from nullbayes.cli import main

sys.exit(main())
