"""``python -m evovlm.launch``: the ``evovlm`` command, as every rank is started."""

import sys

from evovlm.launch.cli import main

sys.exit(main())
