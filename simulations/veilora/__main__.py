import sys

from simulations.veilora import main

sys.exit(main())
