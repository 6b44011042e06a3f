"""Devices, precision, state, stopping, resuming and logging of a run, for both training commands, on top of Accelerate.

with Runner(options, config, name="vidtok-train", best="validation_loss") as runner:
    if runner.is_finished:
        return
    model, optimizer = runner.prepare(model, build_optimizer(model, options))
    for step, batches in runner.steps(dataset):
        logs = runner.update(model, optimizer, batches, compute_loss)
        runner.after_step(step, logs, evaluate, save)
"""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from vidtok.run import checkpoints
from vidtok.run.checkpoints import TrainState
from vidtok.run.clock import ALL_STEPS, SIGNALLED, TIME_IS_UP, RunClock, renew_plan
from vidtok.run.failure import TrainingError, deciding_value, describe_step, explain, write_failure
from vidtok.run.interrupts import Interrupts
from vidtok.run.optimizer import build_optimizer, describe
from vidtok.run.parts import TrainedPart, evaluating, ready_to_train
from vidtok.run.processes import from_all, from_main, leave, on_main, uses_bf16
from vidtok.run.progress import TrainingProgress
from vidtok.run.run_folder import RunFolder, Value, open_run
from vidtok.run.run_log import RunLog
from vidtok.run.sampler import StepLoader, seed_everything, spread
from vidtok.run.trackers import Trackers
from vidtok.run_options import RunOptions, check_options, default_values

__all__ = ["ComputeLoss", "Evaluate", "RunOptions", "Runner", "Save", "TrainingError", "build_optimizer"]

ComputeLoss = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, Any]]]
Evaluate = Callable[[], Mapping[str, float]]
Save = Callable[[Path], None]
Logs = dict[str, Tensor]


class Runner:
    """Own one run: its folder, device and clock. Every random draw of step s follows from (seed, s, rank).

    best: the key of `evaluate`'s result that picks model/: the lowest value wins. groups: the class of the options of each group of
    config; a key that an older version did not record counts as its default there, or in the class of options.
    Build the model after the Runner, whose seed its first weights then follow. Raises ValueError for impossible options, a folder
    in use, or a folder of another configuration.
    """

    def __init__(
        self, options: RunOptions, config: Mapping[str, Any], name: str, *, best: str = "validation_loss",
        groups: Mapping[str, type] | None = None,
    ) -> None:  # fmt: skip
        check_options(options)
        self.options = options
        self.path = Path(options.run_dir)
        self._best_key = best
        # Precision is ours (see autocast): Accelerate would rewrite the model's forward and fix one precision for the process.
        self._accelerator = Accelerator(mixed_precision="no")
        atexit.register(leave)
        self._uses_bf16 = uses_bf16(options.precision, self.device)
        self._progress = TrainingProgress(name, self._accelerator.is_main_process)
        self._interrupts = Interrupts()
        self._parts: dict[str, TrainedPart] = {}
        self._due: list[TrainedPart] = []
        self._describe_clips: Callable[[int], list[str]] = lambda step: []
        self._current, self._exit_status = 1, 0
        self._clips = options.batch_size * options.gradient_accumulation * self._accelerator.num_processes
        self._folder: RunFolder | None = None
        self._state, self._resume_from = on_main(lambda: self._open(config, name, groups))
        self._clock = RunClock(options, self._state)
        self._trackers = Trackers(options.trackers, self.path, name, config)
        self._log = RunLog(self._folder, self._progress, self._clock, self._trackers, self._clips, options.log_every)
        self.seed_step(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(is_refused=error is not None)

    def close(self, is_refused: bool = False) -> None:
        """Give back the folder, the signal handlers and the terminal; a folder is not kept of a start refused before its first step."""
        self._progress.close()
        self._interrupts.restore()
        self._trackers.finish(is_failed=is_refused)
        if self._folder is not None:
            self._folder.close(is_refused)

    @property
    def device(self) -> torch.device:
        """Give the device of this process."""
        return self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Tell whether this is the one process that writes and shows."""
        return self._folder is not None

    @property
    def step(self) -> int:
        """Give the number of finished optimizer steps."""
        return self._state.step

    @property
    def planned_steps(self) -> int | None:
        """Give the last step once minutes are planned; None before, and in a run limited by steps alone."""
        return None if self._clock.plan is None else self._clock.horizon

    @property
    def is_finished(self) -> bool:
        """Tell whether an earlier start has done all steps or used up the minutes; `steps` then says so and gives nothing."""
        return self._clock.is_finished

    @property
    def is_resumed(self) -> bool:
        """Tell whether `steps` goes on from a checkpoint, from which the weights then come."""
        return self._resume_from is not None

    def say(self, text: str) -> None:
        """Print one line, once for all processes."""
        self._progress.say(text)

    def check_data(self, name: str, fingerprint: str) -> None:
        """Keep the fingerprint of the data called `name`; raises ValueError when an earlier start trained on other data."""
        on_main(lambda: None if self._folder is None else self._folder.check_data(name, fingerprint))

    def first_value(self, name: str, value: Value) -> Value:
        """Give what the run's first start gave under this name, in every process; before the first checkpoint, what the last one gave."""
        return on_main(lambda: value if self._folder is None else self._folder.first_value(name, value))

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Give (step, value) of every figure logged under this name, over all starts; in the main process, else nothing."""
        return [] if self._folder is None else self._folder.curve(name)

    def known_value(self, name: str) -> Any:
        """Give what first_value kept under this name, in every process; None where it kept nothing yet."""
        return on_main(lambda: None if self._folder is None else self._folder.first_values().get(name))

    def report(self, model: nn.Module, optimizer: Optimizer, memory_bytes: int | None = None) -> None:
        """Print parameters, untrained tensors, the caller's memory estimate, and how the run steps."""
        devices = f"{self._accelerator.num_processes} x {self.device.type}, {'bf16' if self._uses_bf16 else 'fp32'}"
        lines = describe(self.unwrap(model), optimizer, memory_bytes)
        self.say("\n".join([*lines, f"{devices}, {self._clips} clips a step, lr {self._clock.describe_rates()}"]))

    def prepare(self, model: nn.Module, optimizer: Optimizer, name: str = "model") -> tuple[nn.Module, Optimizer]:
        """Put a model and its optimizer on the device, in every process; they belong to the checkpoints under `name`.

        Only the part called "model" is averaged (ema_decay), compiled and checkpointed (gradient_checkpointing). A second part
        (a discriminator) is a second call. With "model" the trackers open: one that refuses is a ValueError before any work.
        """
        is_main = name == "model"
        if is_main:
            ready_to_train(model, self.options)
            if not self.is_finished:
                on_main(lambda: self._trackers.start(self.step, self.say))
        model.train()
        wrapped, prepared = self._accelerator.prepare(model, optimizer)
        self._parts[name] = TrainedPart(name, model, prepared, self.options.lr, self.options.ema_decay if is_main else 0.0)
        return wrapped, prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Give the model without the wrapper of several processes."""
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def show(self, name: str, draw: Callable[[], np.ndarray]) -> None:
        """Keep a picture of this step, uint8 (H, W, 3), in samples/ and in the trackers; only the main process draws it."""
        self._log.show(self.step, name, draw)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the run's precision; update and evaluation do so by themselves."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._uses_bf16)

    def seed_step(self, step: int) -> None:
        """Seed every generator from (seed, step, rank), so that resuming needs no generator state."""
        seed_everything(self.options.seed, step, self._accelerator.process_index)

    def steps(self, dataset: Dataset[Any]) -> Iterator[tuple[int, list[Any]]]:
        """Give (step, micro batches on the device) from where the run stands until it is finished.

        On Ctrl-C or SIGTERM the step in progress ends, a checkpoint is saved and SystemExit(130 or 143) leaves the loop.
        """
        if self.is_finished:
            self.say(f"{self.path} is finished, at step {self.step}: raise max_steps or max_minutes to train on.")
            return
        if self._resume_from is not None:
            checkpoints.load_parts(self._resume_from, self._parts)
            self.say(f"Resuming {self.path} after step {self.step}.")
        self._interrupts.catch()
        loader = StepLoader(dataset, self.options, self.device, self._accelerator.process_index, self._accelerator.num_processes)
        self._describe_clips = loader.describe
        batches_of_steps = loader.after(self.step, self._clock.horizon)
        self._clock.start()
        while not self._exit_status:
            self._current = self.step + 1
            batches = send_to_device(next(batches_of_steps), self.device)
            for part in self._parts.values():
                part.keep_buffers()
            self.seed_step(self._current)
            yield self._current, batches
            assert self.step == self._current, "after_step was not called"
        self._progress.close()
        self.say(self._clock.farewell(self._exit_status, self._best_key))
        if self._exit_status > SIGNALLED:
            raise SystemExit(self._exit_status)

    def update(self, model: nn.Module, optimizer: Optimizer, batches: Sequence[Any], compute_loss: ComputeLoss) -> Logs:
        """Make one optimizer step over the micro batches: `accumulate`, then `apply`."""
        logs = self.accumulate(model, optimizer, batches, compute_loss)
        self.apply()
        return logs

    def accumulate(self, model: nn.Module, optimizer: Optimizer, batches: Sequence[Any], compute_loss: ComputeLoss) -> Logs:
        """Leave the clipped gradient of the mean loss over the micro batches in the parameters; weights change in `apply`.

        compute_loss(model, batch) gives a scalar loss and scalars to log, among them `loss` where only a part of it is to be logged so.
        Gives their means over the micro batches, with loss, gradient_norm and lr. Raises TrainingError when loss or gradient is not
        finite; the step before is then saved.
        """
        optimizer.zero_grad(set_to_none=True)
        logs: Logs = {}
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else self._accelerator.no_sync(model):
                with self.autocast():
                    loss, extra = compute_loss(model, batch)
                self._accelerator.backward(loss / len(batches))
            for key, value in {**extra, "loss": extra.get("loss", loss)}.items():
                share = torch.as_tensor(value, device=self.device).detach() / len(batches)
                logs[key] = logs[key] + share if key in logs else share
        part = next(part for part in self._parts.values() if part.model is self.unwrap(model))
        logs["gradient_norm"] = part.gradient_norm()
        mean_loss = self._accelerator.reduce(logs["loss"], "mean")
        if not (math.isfinite(float(mean_loss)) and math.isfinite(float(logs["gradient_norm"]))):
            self._stop_before_step(part, logs)
        part.clip_gradient(logs["gradient_norm"], self.options.clip_norm)
        self._due.append(part)
        rate = part.rate(self._clock.learning_rate(self._current))
        return logs | {"loss": mean_loss, "lr": torch.tensor(rate, dtype=torch.float64)}

    def apply(self) -> None:
        """Step every part that has accumulated a gradient since the last call, and average its weights."""
        for part in self._due:
            part.step(self._current, self._clock.learning_rate(self._current))
        self._due.clear()

    def after_step(self, step: int, logs: Mapping[str, Any], evaluate: Evaluate | None = None, save: Save | None = None) -> None:
        """Log, and where the step is due evaluate, save model/ and write a checkpoint; decides whether the run ends.

        Both see the evaluation weights in the model given to `prepare`. evaluate runs in every process, on the same data.
        save(folder) runs in the main process when the best value improves or, without evaluate, at every checkpoint.
        """
        self._state.step = step
        status = self._clock.end_step()
        self._log.end_step(step, logs)
        # Clocks and signals differ between processes: the main one decides for all.
        status, is_measured = from_main((self._interrupts.exit_status or status, self._clock.is_plan_due()))
        is_last = 0 < status < SIGNALLED
        if evaluate is not None and (is_last or is_measured or step % self.options.evaluate_every == 0):
            if status > SIGNALLED:
                self._save_checkpoint()  # whoever sent the signal may not wait for the evaluation
            self._evaluate(step, evaluate, save)
        if status == TIME_IS_UP:
            self._state.minutes_used_up = self.options.max_minutes or 0.0
        if status or is_measured or step % self.options.checkpoint_every == 0:
            if evaluate is None and save is not None:
                self._save_model(save)
            self._save_checkpoint()
        if is_measured and not status:
            self._make_plan()
            # Minutes that measuring has used up leave no step to plan.
            status = ALL_STEPS if self._clock.is_finished else status
        self._exit_status = status

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Put every model in eval mode, with averaged weights where averaging is on; all is as before afterwards."""
        return evaluating(self._parts.values())

    def evaluation_batches(self, dataset: Dataset[Any], max_items: int) -> Iterator[Any]:
        """Give batches on the device of at most max_items items, spread evenly over the data set, always the same ones."""
        for batch in DataLoader(spread(dataset, max_items), batch_size=self.options.batch_size):
            yield send_to_device(batch, self.device)

    def _open(self, config: Mapping[str, Any], name: str, groups: Mapping[str, type] | None) -> tuple[TrainState, Path | None]:
        self._folder, state, checkpoint = open_run(self.path, config, name, default_values(type(self.options), groups))
        if renew_plan(self.options, state):
            self._folder.write_plan(state.plan)
        return state, checkpoint

    def _stop_before_step(self, part: TrainedPart, logs: Mapping[str, Tensor]) -> NoReturn:
        """Save the last good step, to which no weight was changed since, and raise TrainingError."""
        rate = part.rate(self._clock.learning_rate(self._current))
        failures = from_all(describe_step(part, self._current, rate, logs, self._describe_clips(self._current)))
        for changed in self._parts.values():
            changed.restore_buffers()
        # A checkpoint of step 0 would only bind the folder to a configuration that fails.
        if self.step:
            self._save_checkpoint()
        on_main(lambda: write_failure(self.path, failures))
        raise TrainingError(explain(failures, self.path))

    def _evaluate(self, step: int, evaluate: Evaluate, save: Save | None) -> None:
        started = time.monotonic()
        self.seed_step(0)  # every evaluation draws the same numbers
        with self.evaluation_weights(), torch.no_grad(), self.autocast():
            values = from_main({key: float(value) for key, value in evaluate().items()})
        value, best = deciding_value(values, self._best_key, step, self.path), self._state.best
        self._log.write(step, values)
        self.say(f"step {step}: " + ", ".join(f"{key} {number:.4g}" for key, number in values.items() if math.isfinite(number)))
        # An infinite value (a codebook that is still empty) is no model to keep, not even the first one.
        if math.isfinite(value) and (best is None or value < best):
            if save is not None:
                self._save_model(save)
            self._state.best, self._state.best_step = value, step
        self._state.evaluation_seconds = time.monotonic() - started
        self._clock.start_step()

    def _save_model(self, save: Save) -> None:
        with self.evaluation_weights():
            on_main(lambda: checkpoints.write_folder(self.path / "model", save))

    def _save_checkpoint(self) -> None:
        started = time.monotonic()
        self._state.elapsed_seconds = self._clock.elapsed_seconds
        folder, keep = self.path / "checkpoints", self.options.keep_checkpoints
        on_main(lambda: checkpoints.save_checkpoint(folder, self._state, self._parts, keep))
        self._state.saving_seconds = time.monotonic() - started
        self._clock.start_step()

    def _make_plan(self) -> None:
        self._clock.make_plan()
        self._state.plan = from_main(self._state.plan)
        if self._folder is not None:
            self._folder.write_plan(self._state.plan)
        self.say(f"{self._clock.horizon} steps fit into {self.options.max_minutes} minutes.")
