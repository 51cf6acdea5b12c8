"""Trainer: steps of the optimizer from a config to a run's folder; log, evaluate, sample, save in between."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    gather_object,
)
from torch import Tensor

from headway import HeadwayError
from headway_apps.proteins.config import FILE, Config
from headway_apps.proteins.data.packing import BOUNDARIES, Batch, Batches
from headway_apps.proteins.data.shards import Part, Prepared
from headway_apps.proteins.diffusion.bound import Bound
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.evaluate.likelihood import likelihood
from headway_apps.proteins.generate.files import save
from headway_apps.proteins.generate.lengths import draw
from headway_apps.proteins.generate.sample import generate
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.train import state
from headway_apps.proteins.train.ahead import Ahead
from headway_apps.proteins.train.objective import Objective, seed_of
from headway_apps.proteins.train.replay import Replay
from headway_apps.proteins.train.window import Window
from headway_apps.proteins.trained import Trained
from headway_apps.training import folders, precision
from headway_apps.training.average import Average
from headway_apps.training.checkpoints import Checkpoint, Checkpoints
from headway_apps.training.interrupts import Asked
from headway_apps.training.rates import Rate
from headway_apps.training.trackers import Trackers

MIXED = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
MAY_CHANGE = (
    "every", "keep", "look", "data.folder", "run.steps", "run.device", "run.compile", "run.replay",
    "run.checkpointing", "run.shard",
)  # fmt: skip
"""Keys of a config with which a run may go on: the others would make another run of it."""

Told = Callable[[str], None]


class TrainingError(HeadwayError, RuntimeError):
    """A run cannot begin, or cannot go on."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    loss: float
    """Nats per residue of the last steps that were logged."""
    best: float | None
    """Least nats per residue of the part that was held out."""
    folder: Path
    rank: int
    """The process whose outcome this is, from 0."""


def train(
    config: Config,
    run: Path,
    *,
    resume: bool = False,
    told: Told = lambda _: None,
    asked_to_stop: Asked = lambda: None,
) -> Outcome:
    """Train into the folder `run`, which is new, or with `resume` goes on from its last checkpoint.

    Once `asked_to_stop` says so the run ends with a checkpoint: after this step, or where several processes train after
    the next that is logged, as they ask each other there.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())), contextlib.ExitStack() as closing:
        trainer = Trainer(config, run, resume=resume, told=told, closing=closing, asked_to_stop=asked_to_stop)
        outcome = trainer.steps()
        trainer.accelerator.end_training()
        return outcome


class Trainer:
    """One process's part of a run."""

    def __init__(
        self,
        config: Config,
        run: Path,
        *,
        resume: bool,
        told: Told,
        closing: contextlib.ExitStack,
        asked_to_stop: Asked = lambda: None,
    ) -> None:
        self.config, self.run, self.asked_to_stop = config, run, asked_to_stop
        closing.callback(AcceleratorState._reset_state, reset_partial_state=True)
        self.accelerator = _accelerator(config)
        closing.callback(self.accelerator.free_memory)
        self.device = self.accelerator.device
        self.is_first = self.accelerator.is_main_process
        self.told: Told = told if self.is_first else lambda _: None
        try:
            prepared = Prepared(Path(config.data.folder))
        except DataError as error:
            raise DataError(f"data.folder: {error}") from error
        self.part = prepared["train"]
        self.looked_at = prepared[config.look.part]
        symbols, noise = config.data.symbols, config.noise
        graph = noise.of(symbols, "".join(sorted({*self.part.letters, *self.looked_at.letters})))
        self.objective = Objective(graph, noise.levels, config.curriculum.curriculum, noise.loss, config.run.seed)
        self.rate = Rate(config.optim.lr, config.optim.warmup, config.run.steps, config.optim.least * config.optim.lr)
        self.checkpoints = Checkpoints(run / "checkpoints", config.keep.checkpoints)
        self.ranks, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        begun = self._begun(resume)
        self.batches = self._stream()
        self._make_model(begun)
        chosen = precision.chosen(self.device, config.run.precision)
        self.dtype = chosen.dtype
        self.told(f"on {self.device}, {chosen.why}")
        self.told(self._size())
        self.average = None if config.optim.average is None else Average(self.bare, config.optim.average)
        self.trained = Trained(self.bare, symbols, graph, self.objective.schedule, _histogram(self.part))
        self.step = self.updates = 0
        self.best: float | None = None
        self.score: float | None = None
        """What this step's weights were found to be worth, if they were looked at."""
        if begun is not None:
            self._restore(begun)
        self.place: dict[str, Any] = self.batches.state_dict()
        self.ahead = Ahead(self.batches, config.batch.per_step // self.ranks, pinned=self.device.type == "cuda")
        closing.callback(self.ahead.close)
        self.tracker = self._tracker() if self.is_first else None
        if self.tracker is not None:
            closing.callback(self.tracker.close)
        self.recent: deque[tuple[int, list[Tensor]]] = deque(maxlen=config.every.log)
        self.window = Window(self.device)

    # -- beginning and ending -----------------------------------------------------------------------------------------

    def _size(self) -> str:
        count, batch, steps = len(self.part), self.config.batch, self.config.run.steps
        epochs = steps * batch.per_step * batch.tokens / (self.part.residues + BOUNDARIES * count)
        weights = sum(weight.numel() for weight in self.bare.parameters())
        return (
            f"{weights:,} weights; {count:,} proteins of {self.part.residues:,} residues, each met {epochs:.3g} times"
            f" or less in {steps:,} steps"
        )

    def _stream(self) -> Batches:
        """This process's part of the batches."""
        batch = self.config.batch
        if batch.per_step % self.ranks:
            raise TrainingError(
                f"got {batch.per_step} batches a step for {self.ranks} processes, takes a multiple of those:"
                f" batch.per_step={self.ranks * math.ceil(batch.per_step / self.ranks)}"
            )
        return Batches(
            self.part, self.config.data.symbols, batch.tokens, seed=self.config.run.seed, buckets=batch.buckets,
            per_step=batch.per_step, rank=self.rank, ranks=self.ranks,
        )  # fmt: skip

    def _make_model(self, begun: Checkpoint | None) -> None:
        """`model` as it is trained, over all processes; `bare`, the network in it; `replay`, if its passes are."""
        run, optim = self.config.run, self.config.optim
        torch.manual_seed(seed_of(run.seed, 0, "weights"))
        network = DiT(self.config.network)
        network.checkpointing = run.checkpointing
        if begun is not None:
            network.load_state_dict(begun.tensors("model"))
        if not run.shard:  # a sharded one is moved part by part
            network.to(self.device)
        network.train()
        optimizer = torch.optim.AdamW(
            network.parameters(), optim.lr, betas=(optim.betas[0], optim.betas[1]), weight_decay=optim.weight_decay,
            fused=self.device.type == "cuda",
        )  # fmt: skip
        self.replay: Replay | None = None
        lengths = self.part.lengths() + BOUNDARIES
        longest, tokens = int(lengths.max()), min(self.config.batch.tokens, int(lengths.sum()))
        if self._replays(network, [longest] * (tokens // longest)):
            for each in network.state_dict().values() if self.ranks > 1 else ():
                torch.distributed.broadcast(each, 0)  # as DistributedDataParallel does
            self.replay = Replay(
                network, self.objective, self.accelerator.autocast, tokens=tokens, longest=longest,
                mean=float(lengths.mean()),
            )  # fmt: skip
            self.model, self.optimizer = network, self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        if run.compile:
            # What is recorded has one shape, and is faster for being compiled for it.
            network.compile_parts(one_shape=self.replay is not None)
        self.bare: DiT = self.accelerator.unwrap_model(self.model)

    def _replays(self, network: DiT, lengths: list[int]) -> bool:
        """Whether passes of batches such as of these lengths are recorded, as the config asks or by itself."""
        run = self.config.run
        obstacle = self._obstacle(network, lengths)
        obstacles = gather_object([obstacle]) if self.ranks > 1 else [obstacle]
        obstacle = next(filter(None, obstacles), None)  # one for all processes, or they would wait for each other
        if run.replay is True and obstacle:
            raise TrainingError(f"got run.replay=true {obstacle}; leave run.replay at auto")
        return run.replay is not False and obstacle is None

    def _obstacle(self, network: DiT, lengths: list[int]) -> str | None:
        """Why passes cannot be recorded here."""
        if self.device.type != "cuda":
            return f"on {self.device}, takes a GPU of CUDA"
        kind = self.accelerator.distributed_type
        if self.config.run.shard or kind not in (DistributedType.NO, DistributedType.MULTI_GPU):
            return f"under {kind.value}, takes whole weights that stay in one place"
        if self.config.run.checkpointing:
            return "with run.checkpointing, takes activations that are kept"
        if self.accelerator.scaler is not None:
            return "in float16, takes a precision without a scaler, which reads what it finds"
        with self.accelerator.autocast():
            return network.not_recordable(lengths)

    def _begun(self, resume: bool) -> Checkpoint | None:
        found = self.checkpoints.latest()
        if resume and found is None:
            raise TrainingError(f"got --resume for {self.run}, which has no checkpoint; begin it without --resume")
        if not resume:
            if self.run.exists() and not self.run.is_dir():
                raise TrainingError(f"got {self.run}, which is a file, takes a folder; give another name")
            if found is not None:
                raise TrainingError(
                    f"got {self.run}, which has checkpoints up to step {found.step}, takes a new folder; go on with"
                    " --resume, or give another"
                )
            occupied = self._occupied() if self.is_first else None
            # One verdict for all processes: the others would wait for the one that raises.
            if occupied := next(filter(None, gather_object([occupied]) if self.ranks > 1 else [occupied]), None):
                raise TrainingError(occupied)
            return None
        assert found is not None
        was, now = (_flat(each) for each in (found.state["config"], self.config.model_dump()))
        if found.state["data"] != self.part.fingerprint:
            raise TrainingError(f"got other data than {self.run} was trained on; give the folder it was prepared in")
        if differ := [key for key in now if now[key] != was.get(key) and not key.startswith(MAY_CHANGE)]:
            told = "; ".join(f"{key} was {was.get(key)!r}, is {now[key]!r}" for key in differ)
            raise TrainingError(f"got another config than {self.run} was begun with ({told}); begin a new run with it")
        if found.step > self.config.run.steps:
            raise TrainingError(
                f"got run.steps={self.config.run.steps} for {self.run}, which is at step {found.step}, takes no fewer"
            )
        self.told(f"going on after step {found.step}")
        if was["run.steps"] != now["run.steps"]:
            self.told(
                f"run.steps was {was['run.steps']}, is {now['run.steps']}: from here the learning rate falls to that"
                " step, and this is another run than one that was begun so; with neither a config nor --set it goes"
                " on as it was begun"
            )
        return found

    def _occupied(self) -> str | None:
        """Why no run begins in this folder: it is neither new nor empty nor this run's before its first checkpoint."""
        if not self.run.is_dir():
            return None
        left, kept = folders.unfinished(self.run), self.run / FILE
        there = sorted(each.name for each in self.run.iterdir() if each not in left)
        if not there or (kept.is_file() and kept.read_bytes() == self.config.to_yaml().encode()):
            return None
        return (
            f"got {self.run}, which holds {', '.join(there[:3])}{' and more' if there[3:] else ''} and no checkpoint of"
            " this config, takes a new or an empty folder; give another"
        )

    def _restore(self, begun: Checkpoint) -> None:
        kept = begun.state
        self.step, self.updates, self.best = begun.step, kept["updates"], kept["best"]
        state.give_optimizer(self.model, self.optimizer.optimizer, begun.tensors("optimizer"))
        if self.average is not None:
            self.average.load(state.divided(begun.tensors("average"), self.average.weights), kept["averaged"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept["scaler"])
        self.batches.load_state_dict(kept["place"])

    def _tracker(self) -> Trackers:
        keep, told, file = self.config.keep, _flat(self.config.model_dump()), self.run / FILE
        self.run.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        folders.replace(file, self.config.to_yaml())  # first of all, as it says whose folder this is
        try:
            return Trackers(keep.trackers, self.run, keep.project, keep.name or self.run.name, told, after=self.step)
        except HeadwayError:
            if is_new:
                file.unlink()
            raise

    # -- the loop -----------------------------------------------------------------------------------------------------

    def steps(self) -> Outcome:
        """To the last step of the config."""
        loss = math.nan
        if self.step == self.config.run.steps:
            self.told(f"step {self.step} is the last of run.steps: nothing is left to do")
            return Outcome(self.step, loss, self.best, self.run, self.rank)
        stops = False
        while self.step < self.config.run.steps and not stops:
            self._one()
            stops = self._stops()
            if stops or self._due(self.config.every.log):
                loss = self._log()
            with self.window.paused():
                self._between(stops)
        if self.tracker is not None and not stops:
            self.tracker.log(
                {"summary/final_step": self.step, "summary/final_train_loss": loss, "summary/training_completed": True}
                | ({} if self.best is None else {"summary/best_loss": self.best}),
                self.step,
            )
        return Outcome(self.step, loss, self.best, self.run, self.rank)

    def _due(self, every: int) -> bool:
        return self.step == self.config.run.steps or not self.step % every

    def _stops(self) -> bool:
        """Whether the run ends before its last step: one answer for all processes, who wait for each other to agree."""
        if self.step == self.config.run.steps or (self.ranks > 1 and not self._due(self.config.every.log)):
            return False
        asked = self.asked_to_stop() is not None
        return any(gather_object([asked])) if self.ranks > 1 else asked

    def _between(self, stops: bool) -> None:
        """What is done after some steps."""
        every = self.config.every
        if self._due(every.evaluate) or self._due(every.save):
            self._check()
        if self._due(every.evaluate):
            self._evaluate()
        if self.config.look.samples and self._due(every.samples):
            self._sample()
        if stops or self._due(every.save) or (self.score is not None and self.score == self.best):
            self._save()

    def _one(self) -> None:
        """One step of the optimizer."""
        self.score = None
        ready = next(self.ahead)
        self.recent.append((self.step, [each.index for each in ready.batches]))
        residues = sum(each.residues for each in ready.batches)
        whole = torch.full((), residues, device=self.device)  # a copy from the host would wait
        if self.ranks > 1:
            whole = self.accelerator.reduce(whole)
        rate = self.rate(self.updates + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nats = torch.zeros((), device=self.device)
        for at, batch in enumerate(ready.batches):
            last = at == len(ready.batches) - 1
            number = self.step * self.config.batch.per_step + at * self.ranks + self.rank
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                # Gradients are averaged over processes, but a step's loss is one mean over all its residues.
                nats += self._backward(batch, number, self.ranks / whole)
        if self.replay is not None and self.ranks > 1:
            self.replay.gradients.average()
        bound = math.inf if self.config.optim.clip is None else self.config.optim.clip
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), bound)
        self.optimizer.step()
        if self.replay is not None:
            self.replay.gradients.zero()
        else:
            self.optimizer.zero_grad()
        self.step += 1
        self.place = ready.place
        if not self.accelerator.optimizer_step_was_skipped:
            self.updates += 1
            if self.average is not None:
                self.average.update(self.bare)
        self.window.add(nats, residues, sum(len(each.lengths) for each in ready.batches), norm, self.step)
        self.window.rate, self.window.epoch = rate, ready.epoch

    def _backward(self, batch: Batch, number: int, share: Tensor) -> Tensor:
        lengths = batch.lengths
        try:
            noised = self.objective.noised(batch.to(self.device, non_blocking=True), self.step, number)
            if self.replay is not None:
                return self.replay.backward(noised, lengths, share)
            with self.accelerator.autocast():
                packed = self.bare.pack(batch.tokens, lengths)
            nats = self.objective.cost(self.model(noised.tokens, noised.level, packed), noised)
            self.accelerator.backward(nats * share)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory at step {self.step} with a batch of {batch.tokens.numel():,} tokens, the longest"
                f" sequence {int(lengths.max()):,}: lower batch.tokens and raise batch.per_step, or set"
                f" run.checkpointing{' or run.replay=false' if self.replay else ''} ({str(error).splitlines()[0]})"
            ) from error
        return nats.detach()

    # -- in between ---------------------------------------------------------------------------------------------------

    def _log(self) -> float:
        values = self.window.told(self.accelerator, self.step)
        self._check()
        if self.tracker is not None:
            self.tracker.log(values, self.step)
        self.told(
            f"step {self.step:,} of {self.config.run.steps:,}  loss {values['train/loss']:.4f}"
            f"  {values['train/residues_per_second']:,.0f} residues/s"
            f"  {_left(values['train/batch_time'] * (self.config.run.steps - self.step))} left"
        )
        return float(values["train/loss"])

    def _check(self) -> None:
        """Stop where the loss was no number in any step since the last look."""
        wrong = self.window.first_wrong(self.accelerator)
        if wrong is None:
            return
        indices = next(([int(i) for each in found for i in each] for step, found in self.recent if step == wrong), [])
        last = self.checkpoints.latest()
        told = f"the last checkpoint is of step {last.step}: {last.folder}" if last else "there is no checkpoint yet"
        raise TrainingError(
            f"the loss is no number at step {wrong}, in a batch of the sequences {indices[:20]} of {self.part.name}"
            f"{' and more' if len(indices) > 20 else ''}; {told}. Lower optim.lr, raise optim.warmup, or take"
            " run.precision=float32"
        )

    @contextlib.contextmanager
    def _looking(self) -> Iterator[Trained]:
        """With the averaged weights, in the precision of training."""
        averaged = contextlib.nullcontext() if self.average is None else self.average.applied(self.bare)
        with averaged, self.accelerator.autocast():
            yield self.trained

    def _evaluate(self) -> None:
        with self._looking() as trained:
            bound = self._bound(trained)
        loss = bound.per_residue
        self.best = loss if self.best is None else min(self.best, loss)
        self.told(f"step {self.step:,}  held out {loss:.4f} nats per residue, perplexity {bound.perplexity:.3f}")
        if self.tracker is not None:
            values = {"val/loss": loss, "val/perplexity": bound.perplexity, "val/best_loss": self.best}
            self.tracker.log(values, self.step)
        self.score = loss

    def _bound(self, trained: Trained) -> Bound:
        """Of the part that is looked at, each process scoring its share."""
        look = self.config.look
        # The forward of a sharded model is one of all processes together: they all score all.
        ranks, rank = (1, 0) if self.config.run.shard else (self.ranks, self.rank)
        mine = []
        if rank < min(len(self.looked_at), look.sequences or len(self.looked_at)):
            mine.append(
                likelihood(
                    trained, self.looked_at, tokens=self.config.batch.tokens, draws=look.draws,
                    seed=self.config.run.seed, sequences=look.sequences, share=(rank, ranks),
                )
            )  # fmt: skip
        return Bound.merged(gather_object(mine) if ranks > 1 else mine)

    def _sample(self) -> None:
        if not (self.is_first or self.config.run.shard):
            return
        with self._looking() as trained:
            seed = seed_of(self.config.run.seed, self.step, "samples")
            lengths = draw(trained.lengths, self.config.look.samples, seed)
            found = generate(trained, lengths, seed=seed, dtype=self.dtype).proteins
        if self.tracker is not None:
            folder = self.run / "samples"
            folder.mkdir(exist_ok=True)
            save(folder / f"step-{self.step:09d}.fasta", found, seed=seed, sampler="first-hitting", force=True)
            self.tracker.log(
                {"samples/generated_proteins": found[:5], "samples/avg_length": sum(map(len, found)) / len(found)},
                self.step,
            )

    def _save(self) -> None:
        files = {
            "model": state.weights_of(self.model),
            "optimizer": state.optimizer_of(self.model, self.optimizer.optimizer),
        }
        kept = {
            "config": self.config.model_dump(), "trained": self.trained.told(), "data": self.part.fingerprint,
            "updates": self.updates, "best": self.best, "place": self.place,
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }  # fmt: skip
        if self.average is not None:
            files["average"], kept["averaged"] = state.whole(self.average.weights), self.average.count
        if self.tracker is not None:
            self.checkpoints.save(self.step, files, kept, score=self.score)
            told = {"checkpoint/step": self.step, "checkpoint/is_best": int(self.score == self.best is not None)}
            scores = {"checkpoint/current_loss": self.score, "checkpoint/best_loss": self.best}
            self.tracker.log(told | {name: value for name, value in scores.items() if value is not None}, self.step)
        self.accelerator.wait_for_everyone()


def _accelerator(config: Config) -> Accelerator:
    device = precision.device(config.run.device)
    chosen = precision.chosen(device, config.run.precision)
    plugin = None
    if config.run.shard:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=MIXED[chosen.dtype],
        fsdp_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def _histogram(part: Part) -> dict[int, int]:
    return {int(length): count for length, count in sorted(Counter(part.lengths().tolist()).items())}


def _flat(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Nested sections as 'section.key'."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{at}{name}.") if isinstance(value, dict) else {at + name: value}
    return found


def _left(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
