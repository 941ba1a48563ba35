"""Does memory stay flat over an epoch of a Parquet file larger than memory?

    python experiments/parquet_memory.py [--gb 2] [--limit-gb 1.2] [--folder FOLDER]

Writes a file of that size in the authors' format (0.84 MB of noise a row, as their pictures have; row groups of 100),
then reads one epoch in file order and a quarter of one shuffled, in a process that may not have more than --limit-gb of
data (RLIMIT_DATA), and prints its resident memory on the way.

On 2 CPU cores: 2.02 GB, 2,400 rows; opened for the first time, which copies it to the cache of `datasets`, in 8.4 s, at
most 0.91 GB resident; then 3 ms a row, in order and shuffled, and 0.5 GB resident, 0.41 GB of them the libraries.
"""
import argparse
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import load  # noqa: E402
from support.sources import take  # noqa: E402


def write(path: Path, gigabytes: float) -> int:
    generator, rows, number = np.random.default_rng(0), [], 0
    solution = json.dumps([{"bbox_2d": [10, 20, 30, 40], "point_2d": [20, 30]}])
    row = {"id": "", "problem": "the cup", "solution": solution, "image": {"bytes": b"", "path": None}}
    schema = pa.Table.from_pylist([row]).schema
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        while path.stat().st_size < gigabytes * 1e9:
            rows = []
            for _ in range(100):
                data = io.BytesIO()
                noise = Image.fromarray(generator.integers(0, 256, (530, 530, 3), np.uint8))
                noise.save(data, "PNG", compress_level=0)
                rows.append({**row, "id": str(number), "image": {"bytes": data.getvalue(), "path": None}})
                number += 1
            writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=100)
    return number


def resident_gb(name: str = "VmRSS") -> float:
    """VmRSS: now; VmHWM: at most so far. (getrusage's maximum would begin with that of the writing process.)"""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024 / 1e9


def read(path: Path, limit_gb: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 1e9),) * 2)
    began = time.time()
    source = load(str(path), task="grounding")
    print(f"opened {len(source)} rows in {time.time() - began:.1f} s: {resident_gb():.2f} GB resident", flush=True)
    for title, numbers in (("in file order", range(len(source))), ("shuffled", None)):
        began = time.time()
        for i in range(len(source) if numbers else len(source) // 4):
            example = source[i] if numbers else take(source, range(i, i + 1), 42)[0]
            assert example.images[0].size == (530, 530)
            if i % 100 == 99:
                print(f"{title}: {i + 1} rows, {(time.time() - began) / (i + 1) * 1000:.0f} ms a row, "
                      f"{resident_gb():.2f} GB resident", flush=True)
    print(f"peak {resident_gb('VmHWM'):.2f} GB resident, limit {limit_gb} GB of data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--limit-gb", type=float, default=1.2)
    parser.add_argument("--folder", default="", help="where the file is written (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        path = Path(folder) / "train.parquet"
        count = write(path, args.gb)
        print(f"wrote {path.stat().st_size / 1e9:.2f} GB, {count} rows", flush=True)
        reader = multiprocessing.get_context("spawn").Process(target=read, args=(path, args.limit_gb))
        reader.start()
        reader.join()
        sys.exit(reader.exitcode)


if __name__ == "__main__":
    main()
