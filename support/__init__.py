"""What the paper does not speak of. Python runs this file before any other of the folder."""
import sys

try:
    import fcntl  # noqa: F401
    import resource  # noqa: F401
except ImportError:
    sys.exit("This needs Linux or macOS. On Windows, install WSL (wsl --install) and start it there")
