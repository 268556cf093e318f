"""`python -m clawdemy_infer` is `clawdemy-infer`."""

import sys

from clawdemy_infer.cli.main import main

sys.exit(main())
