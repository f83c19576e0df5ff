"""What the frozen part of a network makes of the pictures: computed side by side, once, and kept in the bank."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune import augment, backbones, cuts, device, distributed, inference, runs, training
from finetune.bank import Bank
from finetune.cuts import Cut
from finetune.images import ImageStore
from finetune.params import Params
from finetune.training import Batch, Visits

import numpy as np
import torch
from torch import Tensor

CODE = (augment, backbones, cuts, device, inference, training)  # what features are made by
AT_HAND = 2**28  # bytes of validation features that stay in memory from epoch to epoch


def bank_of(settings: Params) -> Bank:
    """Return the bank that all runs of the main checkout share, as large as the settings allow."""
    return Bank(runs.scratch() / "features", settings.feature_bank_gb * 1e9)


class Features:
    """The features of a store's pictures, in the batches of an experiment's epochs."""

    def __init__(
        self,
        store: ImageStore,
        settings: Params,
        normalization: dict[str, Sequence[float]],
        place: torch.device,
        bank: Bank,
    ):
        self._store, self._settings, self._place, self._bank = store, settings, place, bank
        self._inputs_of = functools.partial(augment.normalize, mean=normalization["mean"], std=normalization["std"])
        self._about = {
            "pictures": store.manifest["files"],
            "image_size": settings.data.image_size,
            "normalization": normalization,
            "precision": device.precision(settings.precision, place),
            "device": device.about(place),
            "lot": device.LOT[place.type],
            "versions": runs.versions(settings.model_name),
            "model": backbones.canonical_name(settings.model_name),
            "code": [runs.code_digest(Path(str(module.__file__)).read_text("utf-8")) for module in CODE],
        }
        self._at_hand: dict[str, list[Tensor]] = {}  # validation's lots, by the trunk's digest

    def training_batches(self, cut: Cut, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield what training.training_batches does, with features instead of pictures."""
        visits = training.visits(self._settings, self._store, epoch)
        parts = visits.steps[first:]
        own = [distributed.share(part) for part in parts]
        visited = np.concatenate([np.arange(part.start, part.stop) for part in own]) if own else np.arange(0)

        def pictures(lot: slice) -> Tensor:
            return training.augmented(self._store, self._settings, visits, visited[lot])

        lots = self._lots(cut, self.training_key(cut, visits), len(visits.rows), visits.rows[visited], pictures)
        for part, inputs, seed in zip(parts, _regrouped(lots, own), visits.seeds[first:], strict=True):
            device.seed(seed)
            yield Batch(inputs, self._store.labels[visits.indices[part]])

    def validation_batches(self, cut: Cut) -> Iterator[Batch]:
        """Yield what training.plain_batches does of val, with features instead of pictures."""
        indices, size = self._store.indices("val"), self._settings.data.image_size
        rows = np.arange(len(indices))[distributed.rows(slice(0, len(indices)))]

        def pictures(lot: slice) -> Tensor:
            return training.cropped([self._store[i] for i in indices[rows[lot]]], size)

        known = self._at_hand.get(cut.digest)
        lots = known or self._lots(cut, self.validation_key(cut), len(indices), rows, pictures)
        seen, position = [], 0
        for lot in lots:
            if not known and lot[0].nbytes * len(indices) <= AT_HAND:
                seen.append(lot)
            labels = self._store.labels[indices[rows[position : position + len(lot)]]]
            yield Batch(lot.clone(), labels)  # to work on in place
            position += len(lot)
        if seen:
            self._at_hand = {cut.digest: seen}

    def training_key(self, cut: Cut, visits: Visits) -> dict[str, Any]:
        """Return all that an epoch's rows follow from."""
        return self._about | {"split": "train", "trunk": cut.digest, "drawn": visits.drawn}

    def validation_key(self, cut: Cut) -> dict[str, Any]:
        """Return all that the rows of the validation pictures follow from."""
        return self._about | {"split": "val", "trunk": cut.digest}

    def _lots(
        self,
        cut: Cut,
        key: dict[str, Any],
        count: int,
        rows: np.ndarray,
        pictures: Callable[[slice], Tensor],
    ) -> Iterator[Tensor]:
        """Yield features a lot at a time; `pictures` returns those of a part of `rows`, which are some of the `count`
        rows that an entry of the bank has.
        """
        trunk = device.in_precision(cut.trunk, self._about["precision"])
        frozen = inference.Inference(trunk, self._inputs_of, self._place)
        # More numbers than a picture has take longer to read than they took to compute.
        most = 3 * self._settings.data.image_size**2
        entry = self._bank.entry(key, count)
        is_kept = distributed.size() == 1  # of several processes, none has all rows

        def features(lot: slice) -> Tensor:
            found = entry.read(rows[lot])
            if found is None:
                found = frozen(pictures(lot))
                if found.untyped_storage().nbytes() > found.nbytes:  # a part of a larger tensor would keep that one
                    found = found.clone()
                if is_kept and found[0].numel() <= most:
                    entry.put(rows[lot], found)
            return found.to(self._place)

        try:
            starts = range(0, len(rows), device.LOT[self._place.type])
            yield from inference.side_by_side(features, (slice(at, at + starts.step) for at in starts), self._place)
        finally:
            entry.close()


def _regrouped(tensors: Iterable[Tensor], parts: Sequence[slice]) -> Iterator[Tensor]:
    """Yield the rows of tensors one after another, in groups as long as the parts."""
    tensors, waiting, count = iter(tensors), [], 0
    for part in parts:
        size = part.stop - part.start
        while count < size:
            waiting.append(next(tensors))
            count += len(waiting[-1])
        joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
        yield joined[:size]
        count -= size
        waiting = [joined[size:]] if count else []
