"""Settings of the process that are required before torch is imported: streams and allocator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import warnings

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MADV_HUGEPAGE = 14  # sys/mman.h
HUGE_PAGE_BYTES = 2 * 2**20
# Size in bytes from which `configure_malloc_to_return_memory` maps a block separately, and the
# maximum number of these blocks.
MAPPED_BLOCK_BYTES, MAX_MAPPED_BLOCKS = 256 * 2**10, 65_536
# Iterations for which a thread of GNU OpenMP looks for work before it sleeps.
SPIN_COUNT = 10_000


def prepare_process() -> None:
    """Prepare the standard streams, environment variables and the allocator.

    Further calls set the same values again.
    """
    _open_closed_streams()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # TRL itself sets the deprecated argument, so the warning is not useful to the user.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    _shorten_openmp_spinning()
    configure_malloc_to_keep_memory()


def _shorten_openmp_spinning() -> None:
    """Let the threads of an operation sleep soon while they wait for each other.

    GNU OpenMP reads the number of iterations when torch is imported. Its default, 300,000, occupies
    a processor for milliseconds. If another process uses a processor of the machine, the thread
    that is waited for is then not scheduled, and a small matrix product on two threads takes tens
    of times as long as on one. With 1,000 iterations the effect is smaller, but on an idle machine
    a step of PPO takes 6% longer, because every operation then wakes a sleeping thread.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def _open_closed_streams() -> None:
    """Open /dev/null for each standard stream that the caller closed, as in ``rlhf ppo >&- 2>&-``.

    Otherwise, Python has no stream object, and the next file that the process opens, such as a
    checkpoint, receives the text that native code writes to the closed stream.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, that is, `descriptor`
            os.set_inheritable(opened, True)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            stream = os.fdopen(descriptor, mode, encoding="utf-8", errors="replace", closefd=False)
            setattr(sys, name, stream)


def collect_garbage_and_trim_heap() -> None:
    """Collect garbage, and return the memory that the allocator would keep to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return the unused pages of glibc's heap to the operating system, without a collection."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def configure_malloc_to_return_memory() -> None:
    """Configure glibc to return freed blocks to the kernel, instead of keeping them.

    Training of a sharded model needs this. The whole weights and gradients of a block exist only
    while the block is computed, so that the memory of a process would otherwise stay as large as
    the sum of all blocks that were whole at any time.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_MAX, MAX_MAPPED_BLOCKS)
            libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BLOCK_BYTES)  # a fixed threshold does not grow
            libc.mallopt(M_TRIM_THRESHOLD, MAPPED_BLOCK_BYTES)
            libc.malloc_trim(0)


def configure_malloc_to_keep_memory() -> None:
    """Configure glibc to keep freed blocks instead of returning them to the kernel at every step.

    The activations of a training step need hundreds of megabytes. By default, malloc maps and
    unmaps this memory in every step. On a CPU, the page faults take more than a third of the time
    of a step. With other C libraries, this function does nothing.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            if mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1):
                _request_huge_pages()


def _request_huge_pages() -> None:
    """Request transparent huge pages for the next 8 GiB of the heap with madvise.

    A block of 8 GiB is allocated, which extends the heap, and freed immediately. The pages of the
    block are not accessed, so no physical memory is used. Later allocations in this region cause
    fewer TLB misses.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = 8 << 30
    block = libc.malloc(size)
    if not block:  # the address space is limited
        return
    start = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    libc.madvise(start, size - HUGE_PAGE_BYTES, MADV_HUGEPAGE)
    libc.free(block)
