"""`python -m engram_jax.ahead_of_time`: what a configuration costs on a TPU slice."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports, Ctrl-C gives no traceback

from engram_jax.costs.ahead_of_time import main
from engram_jax.errors import one_sentence

if __name__ == "__main__":
    with one_sentence():
        main()
