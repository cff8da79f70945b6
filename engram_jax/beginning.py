"""What a program does before its other imports."""

import os
import signal
import sys


def begin(*, caches: bool = True) -> None:
    """Imports JAX. Ctrl-C, or a setting that JAX refuses, gives no traceback.

    `one_sentence` handles Ctrl-C after the imports.

    Args:
        caches: keep compiled programs in `.cache/xla`, unless the environment names another folder.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if caches:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/xla")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    try:
        import jax  # noqa: F401
    except (ValueError, TypeError) as error:
        settings = " ".join(name for name in sorted(os.environ) if name.startswith("JAX_"))
        if not settings:
            raise
        print(
            f"error: JAX cannot be imported ({error}); correct what is set for it: {settings}.",
            file=sys.stderr,
        )
        sys.exit(2)
