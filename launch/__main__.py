"""``python -m evovlm.launch``: the ``evovlm`` command, as every rank is started."""

import sys

from evovlm.launch.cli import main
from evovlm.launch.ranks import leave

code = main()
leave(code)
sys.exit(code)
