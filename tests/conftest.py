"""Makes the repository importable, and gives every test process one thread: the tensors are tiny, and threads that wait
for each other on a busy machine are slower than none."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
