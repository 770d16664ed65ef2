"""Kill a training at random moments and continue it (minutes, so not part of the tests).

    python tests/check_resume.py [KILLS]        default 20

Trains a small network on the example data once without interruption. Then the same again, with a kill -9 at random
moments, each followed by --resume, until so many kills have struck. Exit status 1 unless every --resume went on and the
final weights are the same, bit for bit.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_resume import TINY, assert_equal, results

WORDS = [sys.executable, "train.py", *TINY, "--steps=30", "--valid_every=3"]


def train(folder, *words, seconds=None):
    """Run it, for so many seconds at most; True if it came to its end."""
    process = subprocess.Popen(
        [*WORDS, f"--model_dir={folder}", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        sys.exit(f"BROKEN  exit status {process.returncode}\n{errors.decode()[-2000:]}")
    return True


def main():
    kills, rng, struck, runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20, random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        train(Path(folder, "whole"))
        whole = time.time() - start
        while struck < kills:
            runs += 1
            model = Path(folder, f"killed{runs}")
            while not train(model, "--resume", seconds=rng.uniform(0.2, 1.2) * whole if struck < kills else None):
                struck += 1
                history = model / "history.csv"
                steps = len(history.read_text().splitlines()) * 3 - 3 if history.exists() else 0
                print(f"kill {struck}: after step {steps} of 30", flush=True)
            assert_equal(results(model), results(Path(folder, "whole")))
    print(f"kept    {struck} kills in {runs} trainings: each continued, all weights as without a kill")


if __name__ == "__main__":
    main()
