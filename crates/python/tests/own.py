"""PyTorch's own tests of backends and of DDP (torch.testing), over the backend that is named.

    own.py phalanx [WORD...]    only tests with one of these words in their names

Tests that want accelerators, more ranks or another backend's peculiarities skip themselves, as they do for Gloo.
Those of a receive that does not say from whom are left out: this backend refuses it.
"""

import os
import sys
import tempfile
import unittest

BACKEND, *WORDS = sys.argv[1:]
FOLDER = tempfile.TemporaryDirectory()
open(os.path.join(FOLDER.name, "barrier"), "w").close()
os.environ.update(BACKEND=BACKEND, WORLD_SIZE="2", TEMP_DIR=FOLDER.name, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import logging

import torch.multiprocessing
from torch.testing._internal.common_distributed import DistTestCases

# A backend is tested where it is said to be able to.
for feature in ("ddp", "subgroup", "plugin"):
    DistTestCases.backend_feature[feature].add(BACKEND)

from torch.testing._internal.distributed.distributed_test import DistributedTest, TestDistBackend

logging.getLogger("torch.testing._internal.common_distributed").setLevel(logging.WARNING)


class Own(TestDistBackend, DistributedTest._DistTestBase):
    def setUp(self):
        super().setUp()
        self._start_processes(torch.multiprocessing.get_context("fork").Process)


class Told(unittest.TextTestResult):
    """Tells names alone, each on a line of its own."""

    def getDescription(self, test):
        return test.id().rpartition(".")[2]

    def addSuccess(self, test):
        super().addSuccess(test)
        print("   passes:", self.getDescription(test), flush=True)


if __name__ == "__main__":
    names = unittest.TestLoader().getTestCaseNames(Own)
    names = [name for name in names if not WORDS or any(word in name for word in WORDS)]
    names = [name for name in names if "send_recv_any_source" not in name]
    with open(os.devnull, "w") as quiet:
        result = unittest.TextTestRunner(quiet, resultclass=Told).run(unittest.TestSuite(map(Own, names)))
    for test, why in result.failures + result.errors:
        print(f"FAILS: {test.id()}\n{why}", file=sys.stderr)
    failed = len(result.failures) + len(result.errors)
    skipped = len(result.skipped)
    print(f"{BACKEND}: {result.testsRun - failed - skipped} of PyTorch's own tests pass, {failed} fail, {skipped} skip themselves")
    sys.exit(failed > 0)
