"""Memory of this process."""

import ctypes


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step instead of giving it back to the kernel.

    Activations of a step are megabytes each; by default every one is mapped and unmapped, and its pages are zeroed
    again by the kernel. No effect where the C library is another.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
        libc.mallopt(m_arena_max, 1)  # the heaps of other threads cannot hold large blocks, and map every one
    except (OSError, AttributeError):
        pass
