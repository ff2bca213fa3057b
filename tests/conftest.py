"""What every test may rely on."""

from __future__ import annotations

import os
import signal

# What a bundle's artefacts take on the machine of the tests decides nothing, and nothing is left in the cache; tests of that very thing ask for it.
os.environ.setdefault("MOBILECLIP_MEASURE", "0")

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that interrupt a child would wait for ever.
if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
    signal.signal(signal.SIGINT, signal.default_int_handler)
