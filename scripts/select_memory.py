"""Peak memory and time of the selection of `speedbench data select`, by the number of candidates.

    python scripts/select_memory.py                        # 10,000 and 100,000 candidates x 1,536
    python scripts/select_memory.py --candidates 2000 --dimensions 64

Each size runs in a process of its own, over clustered vectors in a .npy file that is mapped, as the
command does it. Peak memory is the operating system's (Linux), mapped pages included. Beside it
stands what an N x N table of float32 alone would take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

N_CLUSTERS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--candidates", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dimensions", type=int, default=1536)
    parser.add_argument("--select", type=int, default=80, help="rows to choose")
    parser.add_argument("--scratch", help="folder for the vectors (100,000 x 1,536: 0.6 GB)")
    parser.add_argument("--one", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(Path(given.one), given.select)))
        return 0
    print(
        f"{'candidates':>10} {'vectors GB':>10} {'N x N GB':>9} {'peak GB':>8} {'idle GB':>8} "
        f"{'seconds':>8} {'starts':>6} {'swaps':>6} {'mean':>8} {'random':>8}"
    )
    found = []
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        for n in given.candidates:
            file = Path(folder) / "vectors.npy"
            write_vectors(file, n, given.dimensions)
            command = [sys.executable, __file__, "--one", str(file), "--select", str(given.select)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            one = json.loads(done.stdout)
            found.append(one)
            print(
                f"{n:>10,} {4 * n * given.dimensions / 1e9:>10.2f} {4 * n * n / 1e9:>9.2f} "
                f"{one['peak_gb']:>8.2f} {one['idle_gb']:>8.2f} {one['elapsed_s']:>8.1f} "
                f"{one['n_starts']:>6} {one['n_swaps']:>6} {one['mean']:>8.4f} "
                f"{one['random']:>8.4f}",
                flush=True,
            )
    if len(found) > 1:
        first, last = found[0], found[-1]
        print(
            f"{given.candidates[-1] / given.candidates[0]:.1f} times the candidates: "
            f"{last['peak_gb'] / first['peak_gb']:.2f} times the memory, "
            f"{last['elapsed_s'] / first['elapsed_s']:.2f} times the seconds"
        )
    return 0


def write_vectors(file: Path, n: int, dimensions: int) -> None:
    """Unequal clusters around a common direction, as embeddings of one subject are."""
    generator = np.random.default_rng(0)
    centres = 0.5 + 0.6 * generator.standard_normal((N_CLUSTERS, dimensions), dtype=np.float32)
    shares = generator.dirichlet(np.full(N_CLUSTERS, 0.5))
    vectors = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(n, dimensions))
    for start in range(0, n, 4096):
        size = min(4096, n - start)
        noise = generator.standard_normal((size, dimensions), dtype=np.float32)
        vectors[start : start + size] = (
            centres[generator.choice(N_CLUSTERS, size, p=shares)] + noise
        )
    vectors.flush()


def measure(file: Path, n: int) -> dict[str, float]:
    from speedbench.datasets.embed import open_array
    from speedbench.datasets.selection import check_vectors, mean_similarity, random_means, search

    idle_gb = peak_gb()
    start_s = time.perf_counter()
    vectors = open_array(file)
    check_vectors(vectors, [str(row) for row in range(len(vectors))])
    found = search(vectors, n, seed=0)
    mean, random = mean_similarity(vectors, found.indices), random_means(vectors, n, 0, 20)
    mean_similarity(vectors)
    return {
        "elapsed_s": time.perf_counter() - start_s,
        "peak_gb": peak_gb(),
        "idle_gb": idle_gb,
        "n_starts": found.n_starts,
        "n_swaps": found.n_swaps,
        "mean": mean,
        "random": float(random.mean()),
    }


def peak_gb() -> float:
    """Of this process so far. Not getrusage: there a new process begins with its parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
