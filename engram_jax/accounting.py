"""`python -m engram_jax.accounting`: parameters, FLOPs and bytes of state of configurations."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports, Ctrl-C gives no traceback

from engram_jax.costs.accounting import main
from engram_jax.errors import one_sentence

if __name__ == "__main__":
    with one_sentence():
        main()
