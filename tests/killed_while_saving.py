"""What tests/test_resume.py runs: kills itself, again and again, at points inside the saving of a checkpoint.

python tests/killed_while_saving.py RUN_JSON POINTS: at so many accesses to files (Python's audit events), then at so
many moments spread over the time that one save takes, inside safetensors' own writing too. One checkpoint is kept, so
that nothing but it can be continued from.
"""

import os
import signal
import sys
import time
import warnings

import torch

from vqhit import checkpoint
from vqhit.recipe import RunConfig
from vqhit.train import Trainer

EVENTS = ("open", "os.", "shutil.", "pathlib.", "tempfile.")
counted = [0]
kill_at = [-1]


def audit(event, _):
    if kill_at[0] != -1 and event.startswith(EVENTS):
        counted[0] += 1
        if counted[0] == kill_at[0]:
            os.kill(os.getpid(), signal.SIGKILL)


def save_in_a_child(trainer, point=-1, seconds=0.0):
    """Save in a process that dies at an event or after a time, if it is not done by then; returns its exit status."""
    child = os.fork()
    if child == 0:
        counted[0], kill_at[0] = 0, point
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the alarm ends a process that does not handle it
        trainer._save()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(config, points):
    trainer = Trainer(RunConfig.from_yaml(config, ["train.steps=1", "train.keep_checkpoints=1"]))
    trainer.run()
    trainer.state.step, kill_at[0] = 2, sys.maxsize
    started = time.monotonic()
    trainer._save()
    seconds, total = time.monotonic() - started, counted[0]
    kill_at[0] = -1
    at_events = [{"point": 1 + number * total // points} for number in range(points)]
    at_times = [{"seconds": (number + 1) * seconds / points} for number in range(points)]
    killed = 0
    for when in at_events + at_times:
        before = trainer.state.step
        trainer.state.step += 1
        status = save_in_a_child(trainer, **when)
        assert os.WIFSIGNALED(status) or "seconds" in when, (when, status)
        killed += os.WIFSIGNALED(status)
        found = checkpoint.newest(trainer.folder.checkpoints)
        assert found is not None, when
        trainer.state.load(found)
        assert trainer.state.step in (before, before + 1), (when, found)
    trainer.state.step += 1
    trainer._save()  # removes what was left over
    names = [path.name for path in trainer.folder.checkpoints.iterdir()]
    assert names == [f"step_{trainer.state.step:09d}"], names
    print(f"{total} events; killed {killed} times")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # no checkpoint may be found damaged
    sys.addaudithook(audit)
    main(sys.argv[1], int(sys.argv[2]))
