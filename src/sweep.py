"""Search for good settings as a file says: a grid, at random, or by what has worked so far (Optuna's TPE).

    python src/sweep.py sweeps/walkthrough.yaml         # one experiment at a time
    python src/sweep.py sweeps/squeezenet.yaml -j 2     # two
    python src/sweep.py sweeps/squeezenet.yaml --ray 10.0.0.1:6379    # on a Ray cluster, as many as fit

Every trial is an experiment of DVC's, or one for each of the settings that it repeats: `dvc exp show` lists it, and the
command that is printed with it makes it again. A sweep that was stopped goes on with the same command. What is known of
it is in .dvc/tmp/sweeps/NAME, with each trial's output.
"""

import argparse
import contextlib
import re
import signal
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune import nodes, runs, search, sharing, stage
from finetune.clones import Clone, Repository
from finetune.errors import UserError
from finetune.slots import Slot
from finetune.tables import aligned
from finetune.trials import Driver

import optuna
from filelock import FileLock, Timeout
from optuna.trial import TrialState

SHOWN = 10  # trials in the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="such as sweeps/walkthrough.yaml")
    parser.add_argument("-j", "--jobs", type=int, help="experiments at a time (default 1; of a cluster: what fits)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run them on this Ray cluster, or `local`: see docs/ray.md")
    parser.add_argument("--cpus", type=float, default=1, help="cores of an experiment on a cluster (default 1)")
    parser.add_argument("--gpus", type=float, help="GPUs of one, such as 1 or 0.5 (default 1 where nodes have any)")
    arguments = parser.parse_args()
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"-j {arguments.jobs}: give the number of experiments at a time, 1 or more.")
    sweep = search.load(arguments.file)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = arguments.file.stem
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(
            f"{arguments.file}: experiments begin with the file's name, so it has letters, digits, - and _."
        )
    repository = Repository(Path.cwd())
    with contextlib.ExitStack() as stack:
        if arguments.ray:
            url = sharing.check(repository)
            stack.enter_context(nodes.connected(arguments.ray))
            cluster = nodes.Nodes(repository, url, arguments.cpus, arguments.gpus)
            sharing.fetch(repository, f"{name}-*")  # what the nodes have pushed since an earlier call was killed
        folder = stack.enter_context(held(runs.scratch() / "sweeps" / name))
        slots: Iterable[Slot]
        if arguments.ray:
            slots = cluster.slots(arguments.jobs)
        else:
            slots = (Clone(repository, folder / f"clone-{number}") for number in range(arguments.jobs or 1))
        driver = Driver(name, sweep, repository, folder, slots)
        try:
            driver.run()
            if arguments.ray and (best := driver.best()):
                sharing.pull(repository, driver.experiments(best.number))  # the others' files on demand
        except KeyboardInterrupt as error:
            driver.stop()
            said = "stopped. What was running is saved; the same command goes on from there."
            raise stage.Interrupted(*(error.args or (signal.SIGINT,)), said) from None
        finally:
            show(driver)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Hold a sweep's folder. Raises UserError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process runs this sweep: {folder / 'lock'} is held.") from None
    with lock:
        yield folder


def show(driver: Driver) -> None:
    """Print the best trials, what they depend on, and the best one's command."""
    best = driver.best()
    if not best:
        return
    sign = -1 if driver.sweep.direction == "maximize" else 1
    complete = driver.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ranked = sorted(complete, key=lambda trial: sign * (trial.value or 0.0))
    keys = [key for key in driver.sweep.search if any(key in trial.params for trial in complete)]
    rows = [["experiment", driver.sweep.metric, *keys]]
    for trial in ranked[:SHOWN]:
        values = trial.user_attrs["values"]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        point = trial.user_attrs["point"]
        rows.append(
            [driver.label(trial.number), f"{trial.value:.4f}{spread}", *(str(point.get(key, "-")) for key in keys)]
        )
    counts = {"finished": len(complete)}
    for what, state in {"stopped early": TrialState.PRUNED, "failed": TrialState.FAIL}.items():
        counts[what] = len(driver.study.get_trials(deepcopy=False, states=(state,)))
    print("\n" + ", ".join(f"{count} {what}" for what, count in counts.items() if count))
    print(*aligned(rows), sep="\n")
    if len({trial.value for trial in complete}) > 1 and len(keys) > 1:
        shares = optuna.importance.get_param_importances(driver.study)
        print("importance: " + ", ".join(f"{key} {share:.0%}" for key, share in shares.items()))
    print(f"best: {driver.label(best.number)}, {driver.sweep.metric} {best.value:.4f}")
    for repeat in driver.sweep.repeats:
        print(f"  {driver.command(best.user_attrs['point'] | repeat)}")


if __name__ == "__main__":
    stage.run(main)
