"""`python -m posttrain`: the command line, as launchers of several processes start it."""

import sys

from posttrain.cli.main import main

sys.exit(main())
