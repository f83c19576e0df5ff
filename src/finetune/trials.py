"""The trials of a sweep: chosen by Optuna, made by DVC, and known to both."""

import contextlib
import json
import math
import re
import shlex
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from finetune import params, search
from finetune.clones import Repository
from finetune.digests import digest
from finetune.errors import UserError
from finetune.slots import Job, Slot

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ruamel.yaml import YAML
from tqdm import tqdm

POLL = 0.1  # seconds
TRAINS = "Running stage 'train'"  # what DVC prints when an experiment has its pictures and weights
TRIES = 3  # on as many machines, of an experiment that fails before it trains
FAILURES = 3  # that a sweep begins with, after which it ends: it is not the settings then
METRICS = ("results/train/metrics.json", "results/evaluate/metrics.json")


@dataclass
class Attempt:
    """A trial that is being made, an experiment after the other."""

    trial: optuna.Trial
    point: search.Point
    values: list[float] = field(default_factory=list)  # of its experiments so far
    running: Job | None = None  # None where it waits for a slot, after its machine was lost or failed it
    failed: dict[str, str] = field(default_factory=dict)  # the machines on which it did not get to train, and why
    is_pruned: bool = False


class Driver:
    """A sweep on its way."""

    def __init__(self, name: str, sweep: search.Sweep, repository: Repository, folder: Path, slots: Iterable[Slot]):
        self.name, self.sweep, self.repository, self.folder = name, sweep, repository, folder
        self.study = self._study()
        self.left = [each._trial_id for each in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
        self.slots = list(slots)  # made only now, when the sweep is known to go on
        self.attempts: list[Attempt] = []
        self.is_prepared = False  # the first trial has pictures and weights, and so the others find them in the cache
        self.end = time.monotonic() + 60 * (sweep.budget.minutes or math.inf)

    def run(self) -> None:
        """Make trials until the budget, or the grid, is used up. Raises UserError where the first ones all fail."""
        total = self.sweep.budget.trials
        if self.sweep.method == "grid":
            total = min(total or len(self._trials()), len(self._trials()))
        done = self._count(finished=True)
        with tqdm(total=total, initial=done, desc=self.name, unit="trial", disable=None) as bar:
            while self._goes_on() or self.attempts:
                self._begin()
                for attempt in list(self.attempts):
                    if self._look_at(attempt):
                        self.attempts.remove(attempt)
                        bar.update()
                        if best := self.best():
                            bar.set_postfix_str(f"best {self.sweep.metric} {best.value:.4f}, trial {best.number}")
                self._check_failures()
                time.sleep(POLL)
        for slot in self.slots:
            slot.close()

    def stop(self) -> None:
        """Stop what is running; it goes on with the next call."""
        running = [attempt.running for attempt in self.attempts if attempt.running]
        for each in running:
            each.ask_to_stop()
        for each in running:
            each.stop()

    def _study(self) -> optuna.Study:
        """Return what is known of the sweep's trials. Raises UserError where they were of another sweep."""
        sweep = self.sweep
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.folder / "trials.journal")))
        study = optuna.create_study(
            storage=storage, study_name=self.name, direction=sweep.direction, load_if_exists=True
        )
        about = {
            "its file": digest([sweep.model_dump_json(exclude={"budget", "pruner"})]),
            "params.yaml": digest([params.load().model_dump_json()]),
            "the commit (HEAD)": self.repository.commit,
        }
        if "about" not in study.user_attrs:
            if sweep.method == "grid":
                for point in list(sweep.points())[len(study.trials) :]:  # some, where it was killed while it began
                    study.enqueue_trial({key: search.label(value) for key, value in point.items()})
            study.set_user_attr("about", about)
        changed = [what for what, value in study.user_attrs["about"].items() if about[what] != value]
        if changed:
            raise UserError(
                f"{' and '.join(changed)} changed since this sweep began, so that its trials would not compare.\n"
                f"For a new sweep save the file under another name, or forget the old one: rm -r {self.folder}"
            )
        # Another seed each time, or one that goes on would draw what it has drawn before. A grid has nothing to draw.
        sampler = optuna.samplers.TPESampler if sweep.method == "tpe" else optuna.samplers.RandomSampler
        study.sampler = sampler(seed=(sweep.seed + len(study.trials)) % 2**32)
        study.pruner = {
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
            "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
        }[sweep.pruner]()
        return study

    def _begin(self) -> None:
        """Begin as many trials as there are free slots, if there is anything left to do."""
        while (slot := self._free()) and self._goes_on():
            if (self.attempts and not self.is_prepared) or any(not each.running for each in self.attempts):
                return  # those that wait go first
            trial = optuna.Trial(self.study, self.left.pop(0)) if self.left else self.study.ask()
            point = self.sweep.suggested(trial)
            trial.set_user_attr("point", point)
            try:
                search.check(self.sweep, point)
            except UserError as error:
                self._fail(trial, str(error))
                return
            attempt = Attempt(trial, point)
            if not self._next(attempt, slot):
                self.attempts.append(attempt)

    def _free(self, attempt: Attempt | None = None) -> Slot | None:
        """Return a slot for an attempt that waits, on a machine that did not fail it, or for a new one, or None.

        A new one gets none on a machine of which it is not yet known whether it or the settings were to blame.
        """
        busy = {each.running.slot for each in self.attempts if each.running}
        avoided = {place for each in ([attempt] if attempt else self.attempts) for place in each.failed}
        free = (each for each in self.slots if each not in busy and each.is_ready and each.place not in avoided)
        return next(free, None)

    def _goes_on(self) -> bool:
        if time.monotonic() > self.end:
            return False
        if self.left:
            return True
        if self.sweep.budget.trials and self._count() >= self.sweep.budget.trials:
            return False
        return self.sweep.method != "grid" or self._count() < len(self._trials())

    def _count(self, finished: bool = False) -> int:
        """Return how many trials were begun, or are over."""
        states = (each.state for each in self._trials())
        return sum(state.is_finished() or (state == TrialState.RUNNING and not finished) for state in states)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)  # copies of a thousand take tenths of a second

    def _next(self, attempt: Attempt, slot: Slot) -> bool:
        """Begin the next experiment of a trial that has none running; tell whether the trial is over instead."""
        repeats = self.sweep.repeats
        while len(attempt.values) < len(repeats):
            settings = self.sweep.set | attempt.point | repeats[len(attempt.values)]
            name = self.experiments(attempt.trial.number)[len(attempt.values)]
            revision = self.repository.find(name)
            if not revision:
                overrides = search.overrides(settings)
                attempt.running = slot.run(name, overrides, self.folder / f"{name}.log")
                return False
            self._check_is_ours(name, revision, settings)
            value = self._metric(revision)
            if value is None or not math.isfinite(value):
                self._fail(attempt.trial, f"{name} has no {self.sweep.metric}")
                return True
            attempt.values.append(value)
        attempt.trial.set_user_attr("values", attempt.values)
        mean = statistics.fmean(attempt.values)
        self.study.tell(attempt.trial, mean)
        name = self.label(attempt.trial.number)
        tqdm.write(f"{name}: {self.sweep.metric} {mean:.4f}  {self.command(attempt.point | repeats[0])}")
        return True

    def _look_at(self, attempt: Attempt) -> bool:
        """See what a running experiment has come to; tell whether its trial is over."""
        running, trial = attempt.running, attempt.trial
        if not running:
            return self._try_again(attempt)
        status = running.status  # before its last lines
        for line in running.lines():
            if line.startswith(TRAINS):
                self.is_prepared = True
                self._blame(attempt)
            epoch = re.match(r"epoch (\d+)/\d+: (.*)", line)
            if epoch and not attempt.values and self.sweep.pruner != "none":  # the first experiment speaks for all
                reported = dict(re.findall(r"(\w+) (\S+)", epoch[2]))
                trial.report(float(reported[self.sweep.metric]), int(epoch[1]))
                if not attempt.is_pruned and trial.should_prune():
                    attempt.is_pruned = True
                    running.ask_to_stop()
        if status is None:
            return False
        attempt.running = None
        if running.is_lost:
            with contextlib.suppress(UserError):  # its machine may have been done with it
                running.slot.hand_back(running.name)
            attempt.is_pruned = False
            return False
        self.is_prepared = True
        if status == 0:
            running.slot.hand_back(running.name)
            return self._next(attempt, running.slot)
        if attempt.is_pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            tqdm.write(f"{running.name}: stopped early  {self.command(attempt.point | self.sweep.repeats[0])}")
            return True
        said = [line for line in running.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("error: ")] or said[-1:]
        why = f"{' '.join(errors)}  ({running.log})"
        if not any(line.startswith(TRAINS) for line in said):
            attempt.failed[str(running.slot.place)] = why
            if len(attempt.failed) < TRIES and {each.place for each in self.slots} - {None, *attempt.failed}:
                return False
        self._fail(trial, why)
        return True

    def _try_again(self, attempt: Attempt) -> bool:
        """Begin a waiting trial's experiment where it may; tell whether the trial is over, for want of such a place."""
        if slot := self._free(attempt):
            return self._next(attempt, slot)
        is_over = bool(attempt.failed) and all(each.place in (None, *attempt.failed) for each in self.slots)
        if is_over:
            self._fail(attempt.trial, " ".join(attempt.failed.values()))
        return is_over

    def _blame(self, attempt: Attempt) -> None:
        """Leave the machines on which an experiment failed that trains on another."""
        for slot in self.slots:
            if slot.place in attempt.failed:
                slot.leave(attempt.failed[slot.place])
        attempt.failed.clear()

    def _fail(self, trial: optuna.Trial, why: str) -> None:
        self.study.tell(trial, state=TrialState.FAIL)
        tqdm.write(f"{self.label(trial.number)}: failed: {why}")

    def _check_failures(self) -> None:
        """Raise UserError where nothing but failures came of the first trials."""
        over = [each.state for each in self._trials() if each.state.is_finished()]
        if len(over) >= FAILURES and set(over) == {TrialState.FAIL}:
            self.stop()
            raise UserError(
                f"the first {len(over)} trials failed, so the sweep ends here.\n"
                f"Mend what they say, and forget them: rm -r {self.folder}"
            )

    def _check_is_ours(self, name: str, revision: str, settings: search.Point) -> None:
        """Raise UserError where an experiment of a trial's name has other settings."""
        found = YAML(typ="safe").load(self.repository.read(revision, "params.yaml"))
        for key, value in settings.items():
            *groups, last = key.split(".")
            section = found
            for group in groups:
                section = section[group]
            if section[last] != value:
                raise UserError(
                    f"there is an experiment {name} already, with another {key} than this sweep's: {section[last]!r}.\n"
                    f"Save the sweep's file under another name, or remove what has its names: dvc exp remove {name} …"
                )

    def _metric(self, revision: str) -> float | None:
        """Return the sweep's metric of an experiment; None where it has none."""
        metrics: dict = {}
        for path in METRICS:
            metrics |= json.loads(self.repository.read(revision, path) or "{}")
        for key in self.sweep.metric.split("."):
            metrics = metrics.get(key, {})
        return metrics if isinstance(metrics, (int, float)) else None

    def best(self) -> optuna.trial.FrozenTrial | None:
        with contextlib.suppress(ValueError):  # there is none yet
            return self.study.best_trial
        return None

    def label(self, number: int) -> str:
        """Return a trial's name, of which its experiments' begin."""
        return f"{self.name}-{number:03}"

    def experiments(self, number: int) -> list[str]:
        """Return the names of a trial's experiments: its own, or one for each of the repeats."""
        count = len(self.sweep.repeats)
        return [self.label(number) + (f"-{index + 1}" if count > 1 else "") for index in range(count)]

    def command(self, settings: search.Point) -> str:
        options = [f"-S {shlex.quote(each)}" for each in search.overrides(self.sweep.set | settings)]
        return " ".join(["dvc exp run", *options])
