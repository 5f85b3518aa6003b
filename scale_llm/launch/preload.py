"""What every rank on a CPU imports, imported once: ranks are forked from the process that has done it.

Importing this module makes its process that server (multiprocessing's fork server; see forked_ranks.py). No more than
imports may happen here: threads, and memory in use by an operation, do not survive a fork.
"""

import signal
from contextlib import suppress

from scale_llm.launch.environment import quiet_imports
from scale_llm.launch.rank import STOP_SIGNALS, die_with_parent

die_with_parent()
for _number in STOP_SIGNALS:  # they are for the launcher, which passes them on, though a terminal sends them to both
    signal.signal(_number, signal.SIG_IGN)
quiet_imports()

with suppress(Exception):  # the ranks will meet it, too, and say it
    import scale_llm.launch.forked_ranks
    from scale_llm.parallel import cpu

    cpu.adapt()  # before megatron-core is first imported
    import scale_llm.stages.evaluate
    import scale_llm.stages.loop
    import scale_llm.stages.pretrain  # noqa: F401
