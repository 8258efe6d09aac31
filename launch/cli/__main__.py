"""``python -m planaria.launch.cli``, the same as ``planaria``."""

import sys

from planaria.launch.cli import main

sys.exit(main())
