"""`python -m engram_jax.accounting`: parameters, FLOPs and bytes of state of configurations."""

from engram_jax.beginning import begin

if __name__ == "__main__":
    begin(caches=False)

from engram_jax.costs.accounting import main
from engram_jax.errors import one_sentence

if __name__ == "__main__":
    with one_sentence():
        main()
