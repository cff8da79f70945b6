"""`python -m engram_jax.ahead_of_time`: what a configuration costs on a TPU slice."""

from engram_jax.beginning import begin

if __name__ == "__main__":
    begin(caches=False)

from engram_jax.costs.ahead_of_time import main
from engram_jax.errors import one_sentence

if __name__ == "__main__":
    with one_sentence():
        main()
