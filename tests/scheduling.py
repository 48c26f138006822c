"""What pytest-xdist does with the tests of a process that has died: those it had not begun go to another process."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class Files(LoadFileScheduling):
    """`LoadFileScheduling`, mended.

    As of version 3.8, the files of a process that has died are given away again with those that were done. Whoever
    gets one that was done has nothing to run, reports nothing, and gets nothing more: the run stands still. And the
    test that the process has died of is run again, though it may well end the next one.
    """

    def remove_node(self, node: WorkerController) -> str | None:
        """Returns the test that the process has died of, if it was running one."""
        left = {file: tests for file, tests in self.assigned_work.pop(node).items() if not all(tests.values())}
        if not left:
            return None
        began = next(iter(left.values()))
        died_of = next(test for test, done in began.items() if not done)
        began[died_of] = True
        self.workqueue.update({file: tests for file, tests in left.items() if not all(tests.values())})
        for other in self.assigned_work:
            self._reschedule(other)
        return died_of

    def schedule(self) -> None:
        """Twice: a process begins its last test only when it knows that there are no more, or what comes next."""
        super().schedule()
        for node in self.nodes:
            self._reschedule(node)
