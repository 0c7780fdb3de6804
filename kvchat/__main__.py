"""python -m kvchat"""

import sys

from kvchat.cli.app import main

sys.exit(main())
