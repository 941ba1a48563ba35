"""What the paper does not speak of. Imported before any of its files, so that Windows is told here what is missing."""
import sys

try:
    import fcntl  # noqa: F401
    import resource  # noqa: F401
except ImportError:
    sys.exit("This program needs Linux or macOS. On Windows, install WSL (wsl --install) and start it there")
